"""Any range of a checkpoint reads back whatever ranges were written, and damage of any kind is found."""

import json
import math
import multiprocessing
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pretrain.checkpoint import pieces as pieces_module
from pretrain.checkpoint import save as save_module
from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import Layout, NonFiniteError, Piece, Reader, find_faults, load_weights, write_file
from pretrain.checkpoint.restore import newest_intact
from pretrain.checkpoint.save import Saver
from pretrain.errors import CheckpointError
from tests.support.checkpoints import MANIFEST, PlainEngine, one_rank_manifest, write_checkpoint
from tests.support.disk import full_disk
from tests.support.launching import ROOT


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=5),
    num_files=st.integers(1, 6),
    data=st.data(),
)
def test_any_range_reads_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], num_files: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("pieces") / "step-00000001"
    weights = {f"tensor {i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    write_checkpoint(folder, MANIFEST, weights, num_files)
    assert not list(find_faults(folder))
    loaded = load_weights(folder)
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    reader = Reader(folder, Manifest.load(folder))
    for name, weight in weights.items():
        start = data.draw(st.integers(0, weight.numel() - 1))
        out = torch.empty(data.draw(st.integers(1, weight.numel() - start)))
        reader.read_into(out, name, start)
        assert torch.equal(out, weight.flatten()[start : start + len(out)])


def test_safetensors_reads_the_file_of_a_rank(tmp_path: Path) -> None:
    values = torch.arange(7.0)
    layout = Layout([Piece("a", 3, 5, ("weight", "exp_avg")), Piece("b", 0, 3, ("weight",))])
    saved = write_file(tmp_path / "file", layout, values)
    assert saved.num_bytes == (tmp_path / "file").stat().st_size
    found = {name: value.tolist() for name, value in load_file(tmp_path / "file").items()}
    assert found == {"weight:a:3": [0.0, 1.0], "exp_avg:a:3": [2.0, 3.0], "weight:b:0": [4.0, 5.0, 6.0]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_never_written(tmp_path: Path, value: float) -> None:
    layout = Layout([Piece("a", 0, 4, ("weight", "exp_avg"))])
    values = torch.zeros(8)
    values[6] = value
    with pytest.raises(NonFiniteError, match="exp_avg of a is not finite"):
        write_file(tmp_path / "file", layout, values)
    assert not (tmp_path / "file").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints of two ranks."""
    run_dir = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    for step in (1, 2, 3):
        weights = {"layer.weight": torch.randn(7, 11), "layer.bias": torch.randn(11), "head": torch.randn(1)}
        write_checkpoint(run_dir / "checkpoints" / f"step-{step:08d}", MANIFEST, weights, num_files=2)
    return run_dir


@pytest.mark.slow
def test_none_of_300_damaged_checkpoints_loads(run: Path, tmp_path: Path) -> None:
    """Files are flipped, cut, missing, zeroed, swapped or pickled, or the folder has a temporary name."""
    chance = random.Random(0)
    for number in range(300):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        damaged_steps = {step for step in (3, 2) if step == 3 or chance.random() < 0.3}
        for step in damaged_steps:
            damage(copy / "checkpoints" / f"step-{step:08d}", chance)
        found, faults = newest_intact(copy)
        assert found is not None
        assert found.name == f"step-{3 - len(damaged_steps):08d}"
        weights, intact = load_weights(found), load_weights(run / "checkpoints" / found.name)
        assert all(torch.equal(weights[name], intact[name]) for name in intact)
        listed = [path.name for path in list_checkpoints(copy)]
        assert listed[-1] == found.name  # a damaged checkpoint is no longer listed
        assert all(str(copy) in fault for fault in faults)
        shutil.rmtree(copy)


@pytest.mark.processes
@pytest.mark.parametrize("way", ["killed", "full disk"])
def _saves_leave_the_newest_intact_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Saves are killed at 20 different moments, or the disk is full after 20 different numbers of bytes."""
    monkeypatch.setattr(save_module, "RETRY_DELAYS", (0.0, 0.0))
    monkeypatch.setattr(pieces_module, "CHUNK_BYTES", 1 << 12)  # so that most of a save is writing
    module = torch.nn.Linear(512, 512)
    engine = PlainEngine.adamw(module)

    def save(run_dir: Path, step: int) -> bool:
        torch.set_num_threads(1)  # other threads would be missing in the forked process
        torch.nn.init.constant_(module.weight, step)
        saver = Saver(run_dir, keep_last=2)
        saver.begin(engine, one_rank_manifest(step))
        return saver.finish()

    assert save(tmp_path / "older", 1)
    started = time.perf_counter()
    assert save(tmp_path / "undisturbed", 2)
    save_seconds = time.perf_counter() - started
    for number in range(20):
        copy = shutil.copytree(tmp_path / "older", tmp_path / str(number))
        if way == "killed":
            process = multiprocessing.get_context("fork").Process(target=save, args=[copy, 2])
            process.start()
            time.sleep(1.5 * save_seconds * number / 20)  # a forked process is slower
            process.kill()
            process.join()
        else:
            with full_disk(module.weight.nbytes * number // 20):
                assert not save(copy, 2)
        found, faults = newest_intact(copy)
        assert found is not None
        assert not faults
        assert found.name == f"step-0000000{1 + (found.parent / 'step-00000002').exists()}"
        assert torch.equal(load_weights(found)["weight"], torch.full((512, 512), float(found.name[-1])))


def damage(folder: Path, chance: random.Random) -> None:
    victim = chance.choice(sorted(folder.iterdir()))
    data = bytearray(victim.read_bytes())
    kind = chance.choice(["flip", "cut", "missing", "zeros", "swapped", "partial", "pickle"])
    if kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        victim.write_bytes(data)
    elif kind == "cut":
        victim.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "missing":
        victim.unlink()
    elif kind == "zeros":
        start = chance.randrange(len(data) - 8)
        victim.write_bytes(data[:start] + bytes(len(data) - start))
    elif kind == "swapped":
        (folder / "rank-00000.safetensors").rename(folder / "aside")
        (folder / "rank-00001.safetensors").rename(folder / "rank-00000.safetensors")
        (folder / "aside").rename(folder / "rank-00001.safetensors")
    elif kind == "partial":
        folder.rename(folder.with_name(folder.name + ".partial"))
    else:
        victim.write_bytes(pickle.dumps(Bomb()))


class Bomb:
    """An object that ends the process which unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exit, (99,))


def test_a_pickle_in_place_of_any_file_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"):
        folder = Path(shutil.copytree(run / "checkpoints" / "step-00000003", tmp_path / name / "step-00000003"))
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        assert list(find_faults(folder))
        with pytest.raises(CheckpointError, match=name if name == "manifest.json" else "cannot be read"):
            load_weights(folder)


def test_pieces_with_a_gap_are_found(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "checkpoints" / "step-00000003", tmp_path / "step-00000003"))
    manifest = Manifest.load(folder)
    manifest.tensors["layer.weight"].pieces[0][2] -= 1
    manifest.save(folder)
    assert list(find_faults(folder)) == [f"{folder}: damaged (the pieces of layer.weight leave a gap or overlap)"]
    assert json.loads((folder / "manifest.json").read_text())["version"] == 4


@pytest.mark.processes
def test_reading_a_checkpoint_does_not_import_deepspeed() -> None:
    """Its import takes seconds, which `vitrail export` and `vitrail checkpoints` need not spend."""
    code = "import sys, pretrain.checkpoint.restore, pretrain.engine.ema; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
