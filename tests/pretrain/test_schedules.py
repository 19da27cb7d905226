"""Learning rates equal those of torch's and transformers' schedulers."""

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import CosineAnnealingLR

from pretrain.config import OptimizerConfig
from pretrain.schedules import learning_rate_at, split_by_image_size


def test_cosine_equals_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01)
    for step in range(50):
        ours = learning_rate_at(step, peak=0.3, final=0.01, warmup_steps=0, total_steps=50)
        assert abs(ours - scheduler.get_last_lr()[0]) < 1e-12
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["linear", "wsd"])
def test_linear_and_wsd_equal_transformers(name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    if name == "linear":
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 10, 60)
    else:
        scheduler = transformers.get_wsd_schedule(
            optimizer, num_warmup_steps=10, num_decay_steps=20, num_training_steps=60, decay_type="1-sqrt"
        )
    for step in range(60):
        ours = learning_rate_at(
            step, peak=0.3, final=0.0, warmup_steps=10, total_steps=60, name=name, cooldown_steps=20 * (name == "wsd")
        )
        if step >= 10:  # their warm-up starts at 0, ours at the first step above it
            assert abs(ours - scheduler.get_last_lr()[0]) < 1e-12, step
        optimizer.step()
        scheduler.step()


def test_wsd_run_can_be_extended_before_its_cooldown() -> None:
    short, long = (
        [
            learning_rate_at(s, peak=1.0, final=0.0, warmup_steps=5, total_steps=total, name="wsd", cooldown_steps=10)
            for s in range(total)
        ]
        for total in (50, 100)
    )
    assert short[:40] == long[:40]
    assert short[40:] == long[90:]


def test_peak_learning_rate_scales_with_the_batch() -> None:
    for scaling, expected in (("none", 1.5e-4), ("linear", 2.4e-3), ("sqrt", 6e-4)):
        config = OptimizerConfig.model_validate({"learning_rate": 1.5e-4, "scaling": scaling})
        assert config.peak_learning_rate(4096) == pytest.approx(expected)
    assert config.describe_learning_rate(4096) == "learning rate 0.0006 (0.00015 x sqrt(4096 / 256))"
    assert OptimizerConfig().describe_learning_rate(64) == "learning rate 0.0001"


def test_warmup_ends_at_the_peak_and_decay_at_the_final_rate() -> None:
    rates = [learning_rate_at(step, peak=1.0, final=0.1, warmup_steps=4, total_steps=10) for step in range(11)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert abs(rates[10] - 0.1) < 1e-12


def test_range_is_split_where_the_image_size_changes() -> None:
    changes = [(20, 128), (50, 192)]
    assert [*split_by_image_size(0, 100, changes, 224)] == [(0, 20, 128), (20, 50, 192), (50, 100, 224)]
    assert [*split_by_image_size(30, 40, changes, 224)] == [(30, 40, 192)]
    assert [*split_by_image_size(20, 60, changes, 224)] == [(20, 50, 192), (50, 60, 224)]
    assert [*split_by_image_size(60, 90, changes, 224)] == [(60, 90, 224)]
    assert [*split_by_image_size(5, 9, [], 224)] == [(5, 9, 224)]
