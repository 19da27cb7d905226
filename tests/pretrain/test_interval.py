"""Metrics of the steps between two rows of the log."""

import pytest
import torch

from pretrain.interval import Interval

CPU = torch.device("cpu")
APPLIED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def take_step(interval: Interval, losses: list[float], weights: list[float], skipped: torch.Tensor) -> None:
    for loss, weight in zip(losses, weights, strict=True):
        interval.add({"loss": torch.tensor(loss), "half": torch.tensor(loss / 2)}, weight)
    interval.end_step(torch.tensor(losses[0]), skipped)


def test_means_are_weighted_by_micro_batch_and_leave_out_skipped_steps() -> None:
    interval = Interval(CPU, accumulation_steps=2)
    take_step(interval, [2.0, 4.0], [1.0, 1.0], APPLIED)
    take_step(interval, [float("nan"), 1.0], [1.0, 1.0], SKIPPED)
    take_step(interval, [1.0, 4.0], [1.5, 0.5], APPLIED)
    totals = interval.reduce([3.0, 5.0])
    assert totals.means == pytest.approx({"loss": (3.0 + 1.75) / 2, "half": (1.5 + 0.875) / 2, "grad_norm": 1.5})
    assert (totals.num_steps, totals.num_applied) == (3, 2)
    assert totals.counts == [3.0, 5.0]
    assert totals.seconds > 0


def test_an_interval_of_skipped_steps_has_no_means() -> None:
    interval = Interval(CPU, accumulation_steps=1)
    take_step(interval, [float("inf")], [1.0], SKIPPED)
    totals = interval.reduce([])
    assert (totals.means, totals.num_steps, totals.num_applied) == ({}, 1, 0)


def test_the_loss_of_the_current_step_is_its_mean() -> None:
    interval = Interval(CPU, accumulation_steps=2)
    take_step(interval, [8.0, 8.0], [1.0, 1.0], APPLIED)
    interval.add({"loss": torch.tensor(2.0)}, 1.0)
    interval.add({"loss": torch.tensor(4.0)}, 1.0)
    assert float(interval.step_loss()) == 3.0


def test_the_time_of_a_pause_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("pretrain.interval.time.perf_counter", lambda: now)
    interval = Interval(CPU, accumulation_steps=1)
    take_step(interval, [1.0], [1.0], APPLIED)
    now = 12.0
    with interval.pause():
        now = 100.0
    now = 101.0
    assert interval.reduce([]).seconds == 3.0
