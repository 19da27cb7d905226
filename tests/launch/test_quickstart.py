"""The quickstart's commands fit together and its summary is complete; `make quickstart` runs the commands."""

import json
from pathlib import Path

import pytest

from finetune.config import FinetuneConfig
from launch import quickstart
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.tracking.tracker import default_uri


def test_every_command_uses_the_output_of_the_previous_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart.ROOT)
    pretrain_shards, finetune_shards, pretrain, export, finetune, from_scratch, predict = (
        command for _, command in quickstart.steps()
    )
    assert pretrain[0] == "deepspeed"
    pretrained = load_config(PretrainConfig, Path(pretrain[pretrain.index("--config") + 1])).config
    assert pretrained.data.train == [str(Path(command[4]) / "train") for command in (pretrain_shards, finetune_shards)]
    assert Path(export[2]) == pretrained.run_dir
    runs = [load_config(FinetuneConfig, Path(command[3]), command[4:]).config for command in (finetune, from_scratch)]
    for run in runs:
        assert run.model == Path(export[3])
        assert Path(run.data.train) == Path(finetune_shards[4]) / "train"
        assert Path(str(run.data.validation)) == Path(finetune_shards[4]) / "validation"
    differing = {"from_scratch", "run_dir"}
    assert runs[0].model_dump(exclude=differing) == runs[1].model_dump(exclude=differing)
    assert (runs[0].from_scratch, runs[1].from_scratch) == (False, True)
    assert Path(predict[2]) == runs[0].run_dir / "model"
    assert len(predict[3:]) == 5
    stores = {default_uri(config.run_dir) for config in (pretrained, *runs)}
    assert stores == {quickstart.store_uri()}


def test_summary_names_results_and_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for run_dir, top1 in ((quickstart.FINETUNED, 0.781), (quickstart.FROM_SCRATCH, 0.658)):
        run_dir.mkdir(parents=True)
        rows = [{"validation/top1": 0.99}, {"train/loss": 1.0}, {"validation/top1": top1}, {"train/loss": 0.5}]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quickstart.summarize(114.0)
    out = capsys.readouterr().out
    for expected in (
        "Done in 1.9 minutes",
        "top-1 78.1%",
        "top-1 65.8%",
        "runs/quickstart-finetune/model",
        "runs/quickstart/pictures",
    ):
        assert expected in out
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/runs/mlflow.db" in out
