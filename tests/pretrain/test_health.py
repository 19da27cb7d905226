"""Steps that are not fit to be taken: no weight moves, their samples are named, and the run gets on."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import HealthConfig
from pretrain.data.storage.index import DatasetInfo
from pretrain.health import MIN_STEPS, WINDOW_STEPS, Health
from tests.pretrain.ranks_health import AFTER_A_SAVE, BATCH, FAULTS, IN_A_ROW, SETTINGS, STEPS
from tests.support.launching import ROOT, TINY, Shell, free_port

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seen(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks saw."""
    folder = tmp_path_factory.mktemp("health")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY.format(run_dir="unused", shards=digits))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    script = ROOT / "tests" / "pretrain" / "ranks_health.py"
    done = Shell(folder)([*launcher, script, recipe, folder], PYTHONPATH=str(ROOT))
    assert done.code == 0, done.err[-3000:]
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return seen


@pytest.mark.parametrize("setting", SETTINGS)
def test_poisoned_steps_are_skipped_and_named_at_every_stage(seen: dict[str, Any], digits: Path, setting: str) -> None:
    result = seen[setting]
    assert result["outcomes"] == ["DONE"]
    assert result["finite"]
    assert result["steps"] == list(range(1, STEPS + 1))
    assert [row["step"] for row in result["skipped"]] == [position // BATCH for position in FAULTS]
    reasons = [row["reason"] for row in result["skipped"]]
    assert "is nan" in reasons[0]
    assert "is above the limit of" in reasons[1]
    assert "is inf" in reasons[2] or "is nan" in reasons[2]
    assert "is above the limit of" in reasons[3]
    assert reasons[4] in ("the gradient norm is nan", "the gradient norm is inf")  # as DeepSpeed has it
    for row, poisoned in zip(result["skipped"], result["poisoned"], strict=True):
        assert poisoned in row["samples"]
    shards = {entry.name for entry in DatasetInfo.load(digits / "train").shards}
    for row in result["skipped"]:
        assert len({tuple(sample) for sample in row["samples"]}) == BATCH
        assert {Path(shard).name for shard, _ in row["samples"]} <= shards
    assert result["loss"][-1] == pytest.approx(seen["clean"]["loss"][-1], rel=0.01)


def test_a_clean_run_skips_nothing(seen: dict[str, Any]) -> None:
    assert not seen["clean"]["skipped"]
    assert seen["clean"]["outcomes"] == ["DONE"]


@pytest.mark.parametrize(
    ("setting", "poison"), [("rolled back", IN_A_ROW), ("rolled back to their beginning", AFTER_A_SAVE)]
)
def test_after_some_in_a_row_the_run_goes_back_and_passes_over_them(
    seen: dict[str, Any], setting: str, poison: dict[int, float]
) -> None:
    result = seen[setting]
    assert result["outcomes"] == ["DIVERGED", "DONE"]
    assert [row["step"] for row in result["skipped"]] == [position // BATCH for position in poison]
    assert result["steps"] == list(range(1, STEPS + 1))
    assert result["samples"] == (STEPS + len(poison)) * BATCH
    assert result["last_position"] // BATCH == STEPS + len(poison) - 1  # what the manifest says was trained on
    assert result["finite"]


def test_a_run_that_going_back_does_not_help_ends_with_a_report(seen: dict[str, Any]) -> None:
    result = seen["hopeless"]
    assert result["outcomes"] == ["DIVERGED"] * 3
    assert "3 steps in a row were skipped (the loss is nan) after health.max_rollbacks=2 rollbacks" in result["message"]
    assert "skipped.jsonl" in result["message"]
    assert result["finite"]


def judged(health: Health, loss: float, norm: float, step: int = 0) -> bool:
    health.all_reduce(torch.tensor(loss), position=step, stop_requested=False)
    is_skipped = bool(health.should_skip(torch.tensor(norm)))
    health.end_step(torch.tensor(norm), step, step)
    return is_skipped


def test_spikes_are_told_from_what_is_usual() -> None:
    torch.manual_seed(0)
    health = Health(HealthConfig(), CPU)
    noise = torch.randn(600, 2).tolist()
    values = [(3.0 - step / 500 + 0.1 * first, math.exp(second / 4)) for step, (first, second) in enumerate(noise)]
    assert not any(judged(health, *pair) for pair in values)
    assert judged(health, 2.0, 50.0)
    assert judged(health, 30.0, 1.0)
    assert judged(health, math.nan, 1.0)
    assert judged(health, 2.0, math.inf)
    assert not judged(health, *values[-1])  # and a bad step does not become what is usual
    assert not judged(Health(HealthConfig(spike_threshold=0), CPU), 1e9, 1e9)


@pytest.mark.parametrize("count", [MIN_STEPS, WINDOW_STEPS, 3 * WINDOW_STEPS + 7])
def test_what_is_usual_survives_a_restart(count: int) -> None:
    torch.manual_seed(0)
    health = Health(HealthConfig(), CPU)
    for _ in range(count):
        judged(health, 2 + float(torch.rand(())), 1 + float(torch.rand(())))
    again = Health(HealthConfig(), CPU, json.loads(json.dumps(health.spike_window())))
    for step in range(2 * WINDOW_STEPS):
        pair = 2 + float(torch.rand(())), 1 + float(torch.rand(()))
        assert judged(health, *pair, step) == judged(again, *pair, step)
        first, second = health.flush(), again.flush()
        assert first == second
        assert first is not None
        assert math.isfinite(first.loss_limit)


def test_ranks_at_different_samples_are_found() -> None:
    health = Health(HealthConfig(), CPU)
    health.all_reduce(torch.tensor(1.0), position=32, stop_requested=False)
    health.end_step(torch.tensor(1.0), 2, 16)
    with pytest.raises(RuntimeError, match="step 2: the ranks are not at the same position"):
        health.flush()
