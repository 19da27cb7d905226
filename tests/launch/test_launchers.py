"""The real launchers, started from another directory: all stages on two ranks, two nodes, stops and restarts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from typer.testing import CliRunner

from finetune.backbone import load_classifier, load_preprocessor
from finetune.evaluate import evaluate
from launch.cli import app
from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.manifest import Manifest
from pretrain.config import FaultBudget
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.quarantine import Quarantine
from pretrain.heartbeat.beats import START, Beat, read_beat
from pretrain.journal import read_rows
from pretrain.tracking.tracker import git_commit
from tests.support.classifiers import save_classifier, tiny_configs
from tests.support.launching import ROOT, Running, Shell, free_port
from tests.support.training import LONG, LONG_RUN, Trained
from tests.support.training import column as column_of

PRETRAIN, FINETUNE = ROOT / "launch" / "pretrain.py", ROOT / "launch" / "finetune.py"
FINETUNE_YAML = """
run_dir: {folder}/runs/finetune
model: {folder}/runs/tiny/export
data: {{train: {digits}/train, validation: {digits}/validation, num_workers: 1}}
augment: {{crop_scale: [0.6, 1.0], flip: 0.0, mixup: 0.2}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{epochs: 2, warmup_epochs: 0.5}}
engine: {{global_batch_size: 32, micro_batch_size: 8}}
logging: {{every_steps: 5}}
tracking: {{experiment: tests}}
"""
Tool = Callable[[str], str]


def column(run_dir: Path, name: str) -> list[float]:
    return [row[name] for row in read_rows(run_dir / "metrics.jsonl") if name in row]


def losses(run_dir: Path) -> list[float]:
    return column(run_dir, "train/loss")


def mlflow_runs(folder: Path) -> dict[str, Run]:
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    return {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}


def test_all_stages_on_two_ranks(shell: Shell, tiny: Path, digits: Path, tool: Tool, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = shell([*torchrun, "--master_port", free_port(), PRETRAIN, "--config", tiny, "checkpoint.keep_last=1"])
    assert done.code == 0, done.err[-3000:]
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000008"]
    assert re.search(r"step 8/8  loss \d\.\d+  \d+ images/s  waiting for data \d+%  ETA 0:00:00", done.out)
    assert "2 ranks on cpu, ZeRO 2, fp32, batch 16, from step 0" in done.out

    exported = shell([tool("vitrail"), "export", run_dir, run_dir / "export"])
    assert exported.code == 0, exported.err
    assert "loads strictly with transformers" in exported.out

    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(FINETUNE_YAML.format(folder=tmp_path, digits=digits))
    done = shell([*torchrun, "--master_port", free_port(), FINETUNE, "--config", recipe])
    assert done.code == 0, done.err[-3000:]
    assert f"best top-1 {best_top1(tmp_path / 'runs' / 'finetune'):.4f}" in done.out
    settings = [f"run_dir={tmp_path}/runs/alone", "data.num_workers=0"]
    alone = shell([sys.executable, FINETUNE, "--config", recipe, *settings])
    assert alone.code == 0, alone.err[-3000:]
    for name in ("train/loss", "validation/loss", "validation/top1"):
        one, both = (column(tmp_path / "runs" / run, name) for run in ("alone", "finetune"))
        assert len(one) == (2 if name.startswith("validation") else 7)  # two epochs of 483 images, 32 a step
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
    predict = ["predict", str(tmp_path / "runs" / "finetune" / "model"), str(images[0])]
    shown = CliRunner().invoke(app, [*predict, "--top-k", "2"])
    assert re.fullmatch(rf"{re.escape(str(images[0]))}: [012] \d+\.\d%, [012] \d+\.\d%\n", shown.stdout)
    refused = CliRunner().invoke(app, [*predict, str(tiny)])
    assert refused.exit_code == 2
    assert f"{tiny}: cannot be used as an image: not an image of a known format" in refused.stderr

    check_mlflow(tmp_path)


def test_finetuning_of_other_architectures_on_two_ranks(shell: Shell, digits: Path, tool: Tool, tmp_path: Path) -> None:
    """DINOv2 has a parameter that classification never uses, and ResNet has statistics that differ between ranks.

    They also cover each way to start fine-tuning: deepspeed, torchrun, accelerate.
    """
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(FINETUNE_YAML.format(folder=tmp_path, digits=digits))
    settings = ["--config", recipe, "schedule.epochs=1", "tracking.uri=off", "data.num_workers=0"]
    launchers = {
        "dinov2": [tool("deepspeed"), "--num_gpus", "2"],
        "resnet": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
    }
    for architecture, launcher in launchers.items():
        folder, run_dir = (
            save_classifier(tiny_configs()[architecture], tmp_path / architecture),
            tmp_path / "runs" / architecture,
        )
        two = [*launcher, "--master_port", free_port()]
        done = shell([*two, FINETUNE, *settings, f"model={folder}", f"run_dir={run_dir}"])
        assert done.code == 0, done.err[-3000:]
        evaluation = evaluate(
            load_classifier(run_dir / "model"),
            open_dataset(digits / "validation"),
            load_preprocessor(run_dir / "model"),
            batch_size=8,
            num_workers=0,
            device=torch.device("cpu"),
            quarantine=Quarantine(tmp_path / "quarantine.jsonl", FaultBudget(), 0, writes=True),
        )
        assert evaluation is not None
        assert column(run_dir, "validation/loss") == pytest.approx([evaluation.loss], abs=1e-5)
    one = [tool("accelerate"), "launch", "--cpu", "--num_processes", "1", FINETUNE, *settings]
    alone = shell([*one, f"model={tmp_path}/dinov2", f"run_dir={tmp_path}/runs/alone"])
    assert alone.code == 0, alone.err[-3000:]
    assert losses(tmp_path / "runs" / "alone") == pytest.approx(losses(tmp_path / "runs" / "dinov2"), abs=1e-4)


def best_top1(run_dir: Path) -> float:
    return max(column(run_dir, "validation/top1"))


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


@pytest.mark.usefixtures("stores")
def test_run_that_is_stopped_hangs_and_is_killed_gives_identical_losses(
    shell: Shell, tiny: Path, tool: Tool, trained: Trained, tmp_path: Path
) -> None:
    """One rank gets a stop signal. Then, under a supervisor, one rank is frozen by SIGSTOP, and later one is killed."""
    settings = ["--config", tiny, *LONG_RUN, "health.hang_seconds=10"]
    deepspeed = [tool("deepspeed"), "--num_gpus", "2", "--master_port", free_port(), PRETRAIN, *settings]
    run_dir = tmp_path / "runs" / "stopped"
    with shell.start([*deepspeed, f"run_dir={run_dir}"]) as process:
        process.wait_until(lambda: len(losses(run_dir)) >= 3)
        os.kill(process_of(process, run_dir, 1), signal.SIGUSR1)
        done = process.finish()
    assert done.code == 75, done.err[-3000:]
    assert "stopped as requested; the same command continues the run" in done.out, done.err[-3000:]
    stopped_at = len(losses(run_dir))
    assert 3 <= stopped_at < 150
    if "MLflow: not all metrics arrived in time" not in done.err:  # on a busy machine it has not even been imported
        assert mlflow_runs(tmp_path)["stopped"].info.status == "KILLED"
    manifest = Manifest.load(list_checkpoints(run_dir)[-1])
    assert (manifest.state.step, manifest.state.position, manifest.world_size) == (stopped_at, 16 * stopped_at, 2)
    assert manifest.state.images_seen == 16 * stopped_at
    assert manifest.git_commit == git_commit()
    assert manifest.data_digests.keys() == {"training", "validation"}

    with shell.start([tool("vitrail"), "supervise", "--", *deepspeed, f"run_dir={run_dir}", "--resume"]) as process:
        process.wait_until(lambda: len(losses(run_dir)) >= stopped_at + 15)
        hanging = process_of(process, run_dir, 1)
        os.kill(hanging, signal.SIGSTOP)
        again, saved = process_of(process, run_dir, 1, other_than=hanging), list_checkpoints(run_dir)
        process.wait_until(lambda: list_checkpoints(run_dir) != saved)  # a second failure without one costs a rank
        os.kill(again, signal.SIGKILL)
        done = process.finish()
    out, err = done.out, done.err
    assert done.code == 0, err[-3000:]
    assert len(re.findall(r"batch 16, from step [1-9]", out)) == 3
    assert f"rank 1 (process {hanging} on " in err
    assert "no progress for more than health.hang_seconds=10; ending the run, which the same command resumes" in err
    assert len(re.findall(r"supervise: exit code -?\d+ at step \d+; restarting from step \d+ in 1 s", err)) == 2, err[
        -3000:
    ]
    assert re.search(r"goodput \d+.\d% of \d+ s, 2 restarts: compute \d+ s, ", err)
    assert losses(run_dir) == column_of(trained(2, LONG), "train/loss")
    run = mlflow_runs(tmp_path)["stopped"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["goodput.restart"].endswith(" s")
    assert run.info.run_id == Manifest.load(list_checkpoints(run_dir)[-1]).mlflow_run_id


def process_of(launcher: Running, run_dir: Path, rank: int, other_than: int = 0) -> int:
    """Return the process ID of a rank once it trains, in a process other than `other_than`."""
    beats: list[Beat] = []

    def is_training() -> bool:
        beats[:] = [beat for beat in [read_beat(run_dir, rank)] if beat and beat.phase != START]
        return bool(beats) and beats[0].pid != other_than

    launcher.wait_until(is_training)
    return beats[0].pid


def test_exit_codes_with_plain_python(shell: Shell, tiny: Path, tool: Tool, tmp_path: Path) -> None:
    """With and without a supervisor: Ctrl-C, which a terminal sends to both, and errors that no restart fixes."""
    run = [sys.executable, "-u", PRETRAIN, "--config", tiny, "tracking.uri=off", "schedule.total_steps=5000"]
    supervise = [tool("vitrail"), "supervise", "--"]
    with shell.start([*supervise, *run, f"run_dir={tmp_path}/stopped"]) as running:
        running.wait_until(lambda: len(losses(tmp_path / "stopped")) >= 2)
        running.process.send_signal(signal.SIGINT)
        done = running.finish()
    assert done.code == 75, done.err[-3000:]

    steps = len(losses(tmp_path / "stopped"))
    shorter = [*run[:-1], f"schedule.total_steps={steps}", "schedule.warmup_steps=0"]
    assert (
        f"from step {steps}" in shell([*shorter, f"run_dir={tmp_path}/stopped"]).out
    )  # only the final evaluation is left
    assert len(column(tmp_path / "stopped", "validation/loss")) == 1
    refused = shell([*run, f"run_dir={tmp_path}/stopped", "seed=4"])
    assert refused.code == 2
    assert "seed was 3, is 4" in refused.err
    begun = [*run[:-1], "schedule.total_steps=1", "schedule.warmup_steps=0"]
    begun += [f"run_dir={tmp_path}/new", f"init_from={tmp_path}/stopped", "engine.zero_stage=3"]
    assert f"started from {tmp_path}/stopped" in shell(begun).out
    diverging = ["optimizer.learning_rate=1e30", "logging.every_steps=2"]
    diverged = shell([*supervise, *run, f"run_dir={tmp_path}/nan", *diverging])
    assert diverged.code == 1
    assert "steps in a row were skipped (the loss is nan), and there is no checkpoint to roll back to" in diverged.err
    assert "0 restarts" in diverged.err  # a restart would diverge again
    assert "Traceback" not in diverged.err


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """Create two network namespaces, each with its own address, that are connected by a virtual cable."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (iproute2) to make network namespaces")
    names = f"vitrail{os.getpid()}a", f"vitrail{os.getpid()}b"
    cable = f"tsa{os.getpid()}", f"tsb{os.getpid()}"
    commands = [["ip", "netns", "add", name] for name in names]
    commands += [["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]]]
    for i, (name, end_of_cable) in enumerate(zip(names, cable, strict=True), start=1):
        inside = ["ip", "netns", "exec", name, "ip"]
        commands += [
            ["ip", "link", "set", end_of_cable, "netns", name],
            [*inside, "addr", "add", f"10.77.0.{i}/24", "dev", end_of_cable],
            [*inside, "link", "set", end_of_cable, "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_nodes_give_the_losses_of_one(
    shell: Shell, tiny: Path, tool: Tool, two_nodes: tuple[str, str], trained: Trained, tmp_path: Path
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    with ExitStack() as stack:
        nodes = []
        for i, namespace in enumerate(two_nodes):
            launcher = [tool("deepspeed"), "--hostfile", hostfile, "--no_ssh", "--node_rank", str(i)]
            launcher += ["--master_addr", "10.77.0.1", "--master_port", "29631"]  # free: the namespaces are new
            command = ["ip", "netns", "exec", namespace, *launcher, PRETRAIN, "--config", tiny, "tracking.uri=off"]
            card = f"ts{'ab'[i]}{os.getpid()}"
            nodes.append(stack.enter_context(shell.start(command, GLOO_SOCKET_IFNAME=card)))
        done = [node.finish() for node in nodes]
    assert [each.code for each in done] == [0, 0], [each.err[-3000:] for each in done]
    one = column_of(trained(2, "zero2"), "train/loss")
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(one, abs=1e-5)
    assert len(one) == 8
    assert len(list_checkpoints(tmp_path / "runs" / "tiny")) == 2
