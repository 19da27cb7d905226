"""Saving while training continues: a save is a snapshot, and a failing disk costs one checkpoint and nothing else."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.checkpoint import save as save_module
from pretrain.checkpoint.history import list_checkpoints, list_unfinished
from pretrain.checkpoint.manifest import SavedFile
from pretrain.checkpoint.pieces import find_faults, load_weights, write_file
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import Saver
from tests.support.checkpoints import PlainEngine, one_rank_manifest
from tests.support.disk import full_disk


@pytest.fixture
def engine() -> PlainEngine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    return PlainEngine.adamw(module, lr=0.1)


def step(engine: PlainEngine) -> None:
    engine.take_step(lambda module: module(torch.ones(3, 16)).square().sum())


def names(folders: list[Path]) -> list[int]:
    return [int(folder.name.split("-")[1].split(".")[0]) for folder in folders]


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "RETRY_DELAYS", (0.01, 0.01))


def test_a_checkpoint_holds_the_weights_of_the_moment_it_began(
    engine: PlainEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(*arguments: Any) -> SavedFile:
        assert go_on.wait(10)
        return write_file(*arguments)

    monkeypatch.setattr(save_module, "write_file", slow)
    step(engine)
    moment = {name: weight.clone() for name, weight in engine.module.state_dict().items()}
    saver = Saver(tmp_path, keep_last=2)
    saver.begin(engine, one_rank_manifest(1))
    step(engine)  # training continues while nothing is written yet
    assert not list_checkpoints(tmp_path)
    go_on.set()
    assert saver.finish()
    saved = load_weights(list_checkpoints(tmp_path)[0])
    assert all(torch.equal(saved[name], weight) for name, weight in moment.items())
    assert not torch.equal(saved["0.weight"], engine.module.state_dict()["0.weight"])


def test_moments_and_steps_are_restored(engine: PlainEngine, tmp_path: Path) -> None:
    for _ in range(3):
        step(engine)
    saver = Saver(tmp_path, keep_last=2)
    saver.begin(engine, one_rank_manifest())
    assert saver.finish()
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    other = PlainEngine.adamw(module, lr=0.1)
    assert restore(other, list_checkpoints(tmp_path)[0], one_rank_manifest()).optimizer_steps == 3
    step(engine)
    step(other)
    for name, weight in engine.module.state_dict().items():
        assert torch.equal(weight, other.module.state_dict()[name])


def test_a_tensor_of_another_shape_is_refused_by_name(engine: PlainEngine, tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=2)
    saver.begin(engine, one_rank_manifest())
    assert saver.finish()
    engine.module[1] = nn.Linear(16, 5)
    with pytest.raises(Exception, match=r"1.bias: saved \[4\], expected \[5\]\n.*1.weight: saved \[4, 16\]"):
        restore(engine, list_checkpoints(tmp_path)[0], one_rank_manifest())


def test_keep_last_and_keep_every(engine: PlainEngine, tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=2, keep_every=4)
    for number in range(1, 11):
        saver.begin(engine, one_rank_manifest(number))
    assert saver.finish()
    assert names(list_checkpoints(tmp_path)) == [4, 8, 9, 10]
    assert not list_unfinished(tmp_path)


def test_a_full_disk_costs_one_checkpoint_and_the_next_one_is_saved(engine: PlainEngine, tmp_path: Path) -> None:
    logged: list[str] = []
    saver = Saver(tmp_path, keep_last=2, log=logged.append)
    saver.begin(engine, one_rank_manifest(1))
    assert saver.finish()
    with full_disk():
        saver.begin(engine, one_rank_manifest(2))
        assert not saver.finish()
    assert [line for line in logged if "retrying in" in line]
    assert logged[-1].startswith("rank 0: step-00000002 was not saved, training continues: ")
    assert "File too large" in logged[-1]
    assert names(list_checkpoints(tmp_path)) == [1]
    assert not list_unfinished(tmp_path)
    saver.begin(engine, one_rank_manifest(3))
    assert saver.finish()
    assert names(list_checkpoints(tmp_path)) == [1, 3]


def test_a_write_is_retried_until_the_disk_recovers(
    engine: PlainEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError(28, "No space left on device"), OSError(5, "Input/output error")])

    def refuse(*arguments: Any) -> SavedFile:
        if error := next(failures, None):
            raise error
        return write_file(*arguments)

    monkeypatch.setattr(save_module, "write_file", refuse)
    logged: list[str] = []
    saver = Saver(tmp_path, keep_last=2, log=logged.append)
    saver.begin(engine, one_rank_manifest())
    assert saver.finish()
    assert "No space left on device; retrying in 0 s" in logged[0]
    assert logged[-1].startswith("saved ")
    assert not list(find_faults(list_checkpoints(tmp_path)[0]))


def test_nan_weights_are_not_saved(engine: PlainEngine, tmp_path: Path) -> None:
    logged: list[str] = []
    saver = Saver(tmp_path, keep_last=2, log=logged.append)
    with torch.no_grad():
        engine.module[1].bias[2] = math.nan
    saver.begin(engine, one_rank_manifest())
    assert not saver.finish()
    assert logged == ["rank 0: step-00000004 was not saved, training continues: weight of 1.bias is not finite"]
    assert not list_checkpoints(tmp_path)
