"""Shards to predictions through the real commands on two ranks, and what MLflow has of them."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pretrain.checkpoint.history import list_checkpoints
from pretrain.journal import read_rows
from pretrain.tracking.tracker import git_commit
from tests.support.launching import Shell, free_port, run_vitrail
from tests.support.runs import FINETUNE, FINETUNE_YAML, PRETRAIN, logged, mlflow_runs

Tool = Callable[[str], str]


def test_all_stages_on_two_ranks(shell: Shell, tiny: Path, digits: Path, tool: Tool, tmp_path: Path) -> None:
    """The launchers are torchrun, deepspeed and accelerate."""
    run_dir = tmp_path / "runs" / "tiny"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = shell([*torchrun, "--master_port", free_port(), PRETRAIN, "--config", tiny, "checkpoint.keep_last=1"])
    assert done.code == 0, done.err[-3000:]
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000008"]
    assert re.search(r"step 8/8  loss \d\.\d+  \d+ images/s  waiting for data \d+%  ETA 0:00:00", done.out)
    assert "2 ranks on cpu, ZeRO 2, fp32, batch 16, from step 0" in done.out

    exported = run_vitrail("export", run_dir, run_dir / "export")
    assert exported.code == 0, exported.err
    assert "loads strictly with transformers" in exported.out

    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(FINETUNE_YAML.format(folder=tmp_path, digits=digits))
    deepspeed = [tool("deepspeed"), "--num_gpus", "2", "--master_port", free_port()]
    done = shell([*deepspeed, FINETUNE, "--config", recipe, "data.num_workers=0"])
    assert done.code == 0, done.err[-3000:]
    assert f"best top-1 {best_top1(tmp_path / 'runs' / 'finetune'):.4f}" in done.out
    accelerate = [tool("accelerate"), "launch", "--cpu", "--num_processes", "1"]
    alone = shell([*accelerate, FINETUNE, "--config", recipe, f"run_dir={tmp_path}/runs/alone"])
    assert alone.code == 0, alone.err[-3000:]
    for name in ("train/loss", "validation/loss", "validation/top1"):
        one, both = (logged(tmp_path / "runs" / run, name) for run in ("alone", "finetune"))
        assert len(one) == (2 if name.startswith("validation") else 8)  # two epochs of 483 images, 32 a step
        assert one == pytest.approx(both, abs=1e-4), name

    image = next((digits / "validation").glob("*.tar"))
    shutil.unpack_archive(image, tmp_path / "images", "tar", filter="data")
    images = sorted((tmp_path / "images").rglob("*.png"))[:5]
    done = shell([tool("vitrail"), "predict", tmp_path / "runs" / "finetune" / "model", *images, "--json"])
    assert done.code == 0, done.err
    predicted = [json.loads(line) for line in done.out.splitlines()]
    assert [Path(row["image"]) for row in predicted] == images
    for row in predicted:
        assert sum(item["probability"] for item in row["classes"]) == pytest.approx(1.0, abs=1e-4)
        assert {item["class"] for item in row["classes"]} == {"0", "1", "2"}
    predict = ["predict", tmp_path / "runs" / "finetune" / "model", images[0]]
    shown = run_vitrail(*predict, "--top-k", "2")
    assert re.fullmatch(rf"{re.escape(str(images[0]))}: [012] \d+\.\d%, [012] \d+\.\d%\n", shown.out)
    refused = run_vitrail(*predict, tiny)
    assert refused.code == 1
    assert f"{tiny}: cannot be used as an image: not an image of a known format" in refused.err

    check_mlflow(tmp_path)


def best_top1(run_dir: Path) -> float:
    return max(logged(run_dir, "validation/top1"))


def check_mlflow(folder: Path) -> None:
    """Assert that each stage is one MLflow run with its params, its commit, its folder and every metric of its file."""
    runs = mlflow_runs(folder)
    assert runs.keys() == {"tiny", "finetune", "alone"}
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["stage"] == ("pretrain" if name == "tiny" else "finetune")
        assert run.data.tags["git_commit"] == git_commit()
        rows = read_rows(folder / "runs" / name / "metrics.jsonl")
        for metric in (
            "train/loss",
            "optim/learning_rate",
            "optim/grad_norm",
            "speed/images_per_second",
            "validation/top1",
        ):
            history = client.get_metric_history(run.info.run_id, metric)
            assert [(p.step, p.value) for p in history] == [(r["step"], r[metric]) for r in rows if metric in r]
    assert runs["tiny"].data.params["model.hidden_size"] == "32"
    assert runs["finetune"].data.params["optimizer.learning_rate"] == "0.001"
    assert runs["finetune"].data.tags["model_folder"] == str(folder / "runs" / "finetune" / "model")
    assert runs["tiny"].data.tags["exported_folder"] == str(folder / "runs" / "tiny" / "export")
