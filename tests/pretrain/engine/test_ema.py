"""The moving average of the weights; `test_train.py` compares it with torch's, at every ZeRO stage and when resumed."""

import torch
from torch import nn

from pretrain.engine.ema import Ema
from tests.support.checkpoints import PlainEngine

APPLIED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def engine_after_a_step() -> PlainEngine:
    engine = PlainEngine.adamw(nn.Linear(3, 2))
    engine.take_step(lambda module: module(torch.ones(1, 3)).sum())
    return engine


def test_a_skipped_step_does_not_change_the_average() -> None:
    engine = engine_after_a_step()
    ema = Ema(engine, 0.5)
    ema.update(100, APPLIED)
    weight = engine.module.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    ema.update(101, SKIPPED)
    assert torch.equal(ema.states[weight]["ema"], before)
    ema.update(102, APPLIED)
    torch.testing.assert_close(ema.states[weight]["ema"], before + 0.5)


def test_the_average_is_swapped_in_and_out_again() -> None:
    engine = engine_after_a_step()
    ema = Ema(engine, 0.9)
    ema.update(100, APPLIED)
    weight = engine.module.weight
    average = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3.0)
    live = weight.detach().clone()
    with ema.swapped_in():
        assert torch.equal(weight, average)
    assert torch.equal(weight, live)
    assert torch.equal(ema.states[weight]["ema"], average)


def test_a_decay_of_zero_drops_a_restored_average() -> None:
    engine = engine_after_a_step()
    Ema(engine, 0.9).update(0, APPLIED)
    assert "ema" in engine.optimizer.state[engine.module.weight]
    Ema(engine, 0.0)
    assert "ema" not in engine.optimizer.state[engine.module.weight]
