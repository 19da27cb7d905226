"""Steps whose loss or gradient is NaN, infinite or a spike are skipped, listed with their samples, and left behind."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import HealthConfig
from pretrain.data.storage.index import DatasetInfo
from pretrain.health import MIN_STEPS, WINDOW_STEPS, Health, SkippedSteps, StepResult
from pretrain.journal import read_rows
from tests.support.launching import ROOT, TINY
from tests.support.poisoning import BATCH_SIZE, ROLLING_BACK, SINGLE_STEPS, SKIPPING, STEPS
from tests.support.ranks import RankServer
from tests.support.shared import once

CPU = torch.device("cpu")
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def run_poisoned(digits: Path, session_folder: Path) -> Iterator[Callable[[str], Seen]]:
    """Run one of the poisoned runs on two ranks, each when a test first asks for it; return what the main rank saw."""
    root = session_folder / "ranks_health"
    root.mkdir(exist_ok=True)
    recipe = TINY.format(run_dir="unused", shards=digits)
    once(root / "tiny.yaml", lambda path: path.write_text(recipe))
    server = RankServer(ROOT / "tests" / "pretrain" / "ranks_health.py", root)
    yield lambda name: server.run(name, 2)
    server.close()


@pytest.mark.parametrize("name", SKIPPING)
def test_poisoned_steps_are_skipped_and_listed(run_poisoned: Callable[[str], Seen], digits: Path, name: str) -> None:
    seen, clean = run_poisoned(name), run_poisoned("clean")
    assert seen["outcomes"] == ["DONE"]
    assert seen["finite"]
    assert seen["steps"] == list(range(1, STEPS + 1))
    assert seen["images_seen"] == (STEPS - len(SINGLE_STEPS)) * BATCH_SIZE
    assert seen["saved"] == [STEPS, STEPS * BATCH_SIZE, seen["images_seen"]]
    assert [row["step"] for row in seen["skipped"]] == [position // BATCH_SIZE for position in SINGLE_STEPS]
    reasons = [row["reason"] for row in seen["skipped"]]
    assert "is nan" in reasons[0]
    assert "is above the limit of" in reasons[1]
    assert "is inf" in reasons[2] or "is nan" in reasons[2]
    assert "is above the limit of" in reasons[3]
    assert reasons[4] in ("the gradient norm is nan", "the gradient norm is inf")  # it depends on the ZeRO stage
    for row, poisoned in zip(seen["skipped"], seen["poisoned"], strict=True):
        assert poisoned in row["samples"]
    shards = {entry.name for entry in DatasetInfo.load(digits / "train").shards}
    for row in seen["skipped"]:
        assert len({tuple(sample) for sample in row["samples"]}) == BATCH_SIZE
        assert {Path(shard).name for shard, _ in row["samples"]} <= shards
    assert seen["validation_losses"][-1] == pytest.approx(clean["validation_losses"][-1], rel=0.01)


def test_a_clean_run_skips_nothing(run_poisoned: Callable[[str], Seen]) -> None:
    seen = run_poisoned("clean")
    assert seen["outcomes"] == ["DONE"]
    assert not seen["skipped"]
    assert seen["images_seen"] == STEPS * BATCH_SIZE


@pytest.mark.parametrize("name", ROLLING_BACK)
def test_consecutive_skips_roll_the_run_back_and_leave_their_samples_out(
    run_poisoned: Callable[[str], Seen], name: str
) -> None:
    seen, poison = run_poisoned(name), ROLLING_BACK[name].poison
    assert seen["outcomes"] == ["DIVERGED", "DONE"]
    assert [row["step"] for row in seen["skipped"]] == [position // BATCH_SIZE for position in poison]
    assert seen["steps"] == list(range(1, STEPS + 1))
    assert seen["position"] == (STEPS + len(poison)) * BATCH_SIZE
    assert seen["images_seen"] == STEPS * BATCH_SIZE  # those of the discarded steps are not counted
    assert seen["saved"] == [STEPS, seen["position"], seen["images_seen"]]
    assert seen["last_position"] // BATCH_SIZE == STEPS + len(poison) - 1
    assert seen["finite"]


def test_a_run_that_rollbacks_do_not_help_ends_with_an_error(run_poisoned: Callable[[str], Seen]) -> None:
    seen = run_poisoned("diverging")
    assert seen["outcomes"] == ["DIVERGED"] * 3
    assert "3 steps in a row were skipped (the loss is nan) after health.max_rollbacks=2 rollbacks" in seen["message"]
    assert "skipped.jsonl" in seen["message"]
    assert seen["finite"]


def is_skipped(health: Health, loss: float, norm: float, step: int = 0) -> bool:
    health.judge(torch.tensor(loss), torch.tensor(norm).square(), position=step, stop_requested=False)
    health.end_step(step, step)
    return bool(health.skipped)


def test_spikes_are_skipped_and_noise_is_not() -> None:
    torch.manual_seed(0)
    health = Health(HealthConfig(), CPU)
    noise = torch.randn(600, 2).tolist()
    values = [(3.0 - step / 500 + 0.1 * first, math.exp(second / 4)) for step, (first, second) in enumerate(noise)]
    assert not any(is_skipped(health, *pair) for pair in values)
    assert is_skipped(health, 2.0, 50.0)
    assert is_skipped(health, 30.0, 1.0)
    assert is_skipped(health, math.nan, 1.0)
    assert is_skipped(health, 2.0, math.inf)
    assert not is_skipped(health, *values[-1])  # a skipped step is not added to the window
    assert not is_skipped(Health(HealthConfig(spike_threshold=0), CPU), 1e9, 1e9)


@pytest.mark.parametrize("count", [MIN_STEPS, WINDOW_STEPS, 3 * WINDOW_STEPS + 7])
def test_the_spike_window_survives_a_restart(count: int) -> None:
    torch.manual_seed(0)
    health = Health(HealthConfig(), CPU)
    for _ in range(count):
        is_skipped(health, 2 + float(torch.rand(())), 1 + float(torch.rand(())))
    restored = Health(HealthConfig(), CPU, json.loads(json.dumps(health.spike_window())))
    for step in range(2 * WINDOW_STEPS):
        pair = 2 + float(torch.rand(())), 1 + float(torch.rand(()))
        assert is_skipped(health, *pair, step) == is_skipped(restored, *pair, step)
        first, second = health.flush(), restored.flush()
        assert first == second
        assert first is not None
        assert math.isfinite(first.loss_limit)


def test_ranks_at_different_positions_are_an_error() -> None:
    health = Health(HealthConfig(), CPU)
    health.judge(torch.tensor(1.0), torch.tensor(1.0), position=32, stop_requested=False)
    health.end_step(2, 16)
    with pytest.raises(RuntimeError, match="step 2: the ranks are not at the same position"):
        health.flush()


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (2.0, math.inf, "the gradient norm is inf"),
        (12.0, 1.0, "the loss of 12 is above the limit of 3"),
        (2.0, 8.25, "the gradient norm of 8.25 is above the limit of 4"),
        (2.0, 1.0, ""),
    ],
)
def test_the_reason_names_the_value_and_its_limit(loss: float, grad_norm: float, reason: str) -> None:
    result = StepResult(1, 16, True, loss, grad_norm, 3.0, 4.0, stop_requested=False, save_failed=False)
    assert result.reason == reason


def test_skipped_steps_are_listed_and_later_ones_removed_on_resume(tmp_path: Path) -> None:
    skipped = SkippedSteps(tmp_path / "skipped.jsonl", 0, writes=True)
    for step, is_bad in enumerate([True, False, True, True]):
        result = StepResult(step, step, is_bad, math.nan, 1.0, 3.0, 4.0, stop_requested=False, save_failed=False)
        skipped.record(result, [("shard", f"key-{step}")])
    assert (skipped.total, [result.step for result in skipped.consecutive]) == (3, [2, 3])
    resumed = SkippedSteps(tmp_path / "skipped.jsonl", 3, writes=True)
    assert (resumed.total, resumed.consecutive) == (2, [])
    rows = read_rows(tmp_path / "skipped.jsonl")
    assert [(row["step"], row["samples"]) for row in rows] == [(0, [["shard", "key-0"]]), (2, [["shard", "key-2"]])]


def test_the_norm_is_the_root_of_the_squares_of_all_ranks() -> None:
    health = Health(HealthConfig(), CPU)
    health.judge(torch.tensor(1.0), torch.tensor(9.0), position=0, stop_requested=False)
    assert float(health.grad_norm) == 3.0


def test_the_host_does_not_wait_for_a_decision() -> None:
    """On the meta device, an operation for which the host would wait raises an error."""
    meta = torch.device("meta")
    health = Health(HealthConfig(), meta)
    value = torch.ones((), device=meta)
    health.judge(value, value, position=0, stop_requested=False)
    health.end_step(0, 0)
    with pytest.raises(RuntimeError, match="meta"):
        float(health.grad_norm)
