"""What a run prints at its start and at its end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.messages import describe_end, describe_long_schedule


def config(tmp_path: Path, uri: str) -> PretrainConfig:
    path = tmp_path / "x.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\ndata: {{train: x}}\nschedule: {{total_steps: 9}}\ntracking: {{uri: '{uri}'}}"
    )
    return load_config(PretrainConfig, path).config


@pytest.mark.parametrize(("num_epochs", "warns"), [(0.0, False), (1999.0, False), (2000.0, True), (640_000.0, True)])
def test_thousands_of_epochs_are_warned_of(num_epochs: float, warns: bool, tmp_path: Path) -> None:
    data = SimpleNamespace(samples_per_epoch=200)
    run = SimpleNamespace(num_epochs=num_epochs, config=config(tmp_path, "off"), data=data)
    warning = describe_long_schedule(cast(Any, run))
    assert bool(warning) == warns
    if warning:
        assert f"passes {num_epochs:,.0f} times over the 200 training images; for fewer passes, " in warning


def test_the_end_names_what_there_is_and_the_next_command(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    metrics, following = f"  metrics  {run_dir}/metrics.jsonl", f"  next     vitrail export {run_dir} {run_dir}/export"
    assert describe_end(config(tmp_path, "off")).splitlines() == ["done: 9 steps", metrics, following]
    (run_dir / "pictures").mkdir(parents=True)
    for uri, shown in (
        ("http://tracking:5000", "http://tracking:5000"),
        ("sqlite:////data/x.db", "mlflow ui --backend-store-uri sqlite:////data/x.db  # http://127.0.0.1:5000"),
    ):
        lines = describe_end(config(tmp_path, uri)).splitlines()
        pictures, mlflow = f"  pictures  {run_dir}/pictures", f"  MLflow    {shown}"
        assert lines[1:] == [metrics.replace("  /", "   /"), pictures, mlflow, following.replace("     v", "      v")]
