"""The average of the weights; that it is torch's own, at every stage and after a resume, `test_train.py` shows."""

from types import SimpleNamespace

import torch
from torch import nn

from pretrain.engine.ema import Ema

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def engine_after_a_step() -> SimpleNamespace:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return SimpleNamespace(module=model, optimizer=optimizer)


def test_a_step_that_was_skipped_moves_no_average() -> None:
    engine = engine_after_a_step()
    ema = Ema(engine, 0.5)
    ema.update(100, GOOD)
    weight = engine.module.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    ema.update(101, BAD)
    assert torch.equal(ema.states[weight]["ema"], before)
    ema.update(102, GOOD)
    torch.testing.assert_close(ema.states[weight]["ema"], before + 0.5)


def test_it_stands_in_for_the_weights_for_a_while() -> None:
    engine = engine_after_a_step()
    ema = Ema(engine, 0.9)
    ema.update(100, GOOD)
    weight = engine.module.weight
    average = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3.0)
    live = weight.detach().clone()
    with ema.swapped_in():
        assert torch.equal(weight, average)
    assert torch.equal(weight, live)
    assert torch.equal(ema.states[weight]["ema"], average)


def test_a_run_that_keeps_none_forgets_the_one_it_was_given() -> None:
    engine = engine_after_a_step()
    Ema(engine, 0.9).update(0, GOOD)
    assert "ema" in engine.optimizer.state[engine.module.weight]
    Ema(engine, 0.0)
    assert "ema" not in engine.optimizer.state[engine.module.weight]
