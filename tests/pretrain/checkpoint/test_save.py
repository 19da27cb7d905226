"""Saving beside training: the snapshot is of its moment, a disk that refuses costs one checkpoint and nothing else."""

import math
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.checkpoint import save as save_module
from pretrain.checkpoint.history import list_checkpoints, list_remains
from pretrain.checkpoint.manifest import SavedFile
from pretrain.checkpoint.pieces import find_faults, load_weights, write_file
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import Saver
from tests.pretrain.checkpoint.test_manifest import MANIFEST
from tests.support.disk import full_disk

ALONE = replace(MANIFEST, world_size=1)


class Engine(SimpleNamespace):
    """What DeepSpeed is at stage 0 in fp32: a module and torch's own optimizer."""


@pytest.fixture
def engine() -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    return Engine(module=module, optimizer=torch.optim.AdamW(module.parameters(), lr=0.1))


def step(engine: Engine) -> None:
    engine.module(torch.ones(3, 16)).square().sum().backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def names(folders: list[Path]) -> list[int]:
    return [int(folder.name.split("-")[1].split(".")[0]) for folder in folders]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "PAUSES", (0.01, 0.01))


def test_the_checkpoint_is_of_the_moment_it_was_begun(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(*arguments: Any) -> SavedFile:
        assert go_on.wait(10)
        return write_file(*arguments)

    monkeypatch.setattr(save_module, "write_file", slow)
    step(engine)
    moment = {name: weight.clone() for name, weight in engine.module.state_dict().items()}
    saver = Saver(tmp_path, keep_last=2)
    saver.begin(engine, replace(ALONE, step=1))
    step(engine)  # training goes on, while nothing is written yet
    assert not list_checkpoints(tmp_path)
    go_on.set()
    assert saver.finish()
    saved = load_weights(list_checkpoints(tmp_path)[0])
    assert all(torch.equal(saved[name], weight) for name, weight in moment.items())
    assert not torch.equal(saved["0.weight"], engine.module.state_dict()["0.weight"])


def test_moments_and_steps_come_back(engine: Engine, tmp_path: Path) -> None:
    for _ in range(3):
        step(engine)
    saver = Saver(tmp_path, keep_last=2)
    saver.begin(engine, ALONE)
    assert saver.finish()
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    other = Engine(module=module, optimizer=torch.optim.AdamW(module.parameters(), lr=0.1))
    assert restore(other, list_checkpoints(tmp_path)[0], ALONE).optimizer_steps == 3
    step(engine)
    step(other)
    for name, weight in engine.module.state_dict().items():
        assert torch.equal(weight, other.module.state_dict()[name])


def test_another_shape_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=2)
    saver.begin(engine, ALONE)
    assert saver.finish()
    engine.module[1] = nn.Linear(16, 5)
    with pytest.raises(Exception, match=r"1.bias: saved \[4\], expected \[5\]\n.*1.weight: saved \[4, 16\]"):
        restore(engine, list_checkpoints(tmp_path)[0], ALONE)


def test_the_last_ones_stay_and_every_so_many(engine: Engine, tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=2, keep_every=4)
    for number in range(1, 11):
        saver.begin(engine, replace(ALONE, step=number))
    assert saver.finish()
    assert names(list_checkpoints(tmp_path)) == [4, 8, 9, 10]
    assert not list_remains(tmp_path)


def test_a_full_disk_costs_one_checkpoint_and_the_next_is_saved(engine: Engine, tmp_path: Path) -> None:
    said: list[str] = []
    saver = Saver(tmp_path, keep_last=2, say=said.append)
    saver.begin(engine, replace(ALONE, step=1))
    assert saver.finish()
    with full_disk():
        saver.begin(engine, replace(ALONE, step=2))
        assert not saver.finish()
    assert [line for line in said if "next try" in line]
    assert said[-1].startswith("rank 0: step-00000002 is not saved, training goes on: ")
    assert "File too large" in said[-1]
    assert names(list_checkpoints(tmp_path)) == [1]
    assert not list_remains(tmp_path)
    saver.begin(engine, replace(ALONE, step=3))
    assert saver.finish()
    assert names(list_checkpoints(tmp_path)) == [1, 3]


def test_a_disk_that_recovers_is_tried_again(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([OSError(28, "No space left on device"), OSError(5, "Input/output error")])

    def refuse(*arguments: Any) -> SavedFile:
        if error := next(failures, None):
            raise error
        return write_file(*arguments)

    monkeypatch.setattr(save_module, "write_file", refuse)
    said: list[str] = []
    saver = Saver(tmp_path, keep_last=2, say=said.append)
    saver.begin(engine, ALONE)
    assert saver.finish()
    assert "No space left on device; next try" in said[0]
    assert said[-1].startswith("saved ")
    assert not list(find_faults(list_checkpoints(tmp_path)[0]))


def test_weights_that_are_not_finite_are_not_saved(engine: Engine, tmp_path: Path) -> None:
    said: list[str] = []
    saver = Saver(tmp_path, keep_last=2, say=said.append)
    with torch.no_grad():
        engine.module[1].bias[2] = math.nan
    saver.begin(engine, ALONE)
    assert not saver.finish()
    assert said == ["rank 0: step-00000004 is not saved, training goes on: weight of 1.bias is not finite"]
    assert not list_checkpoints(tmp_path)
