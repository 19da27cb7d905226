"""`vitrail checkpoints`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.state import TrainState
from tests.support.checkpoints import MANIFEST, write_checkpoint
from tests.support.launching import Vitrail


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Create a run with checkpoints at steps 2, 4, 6 and 8, a damaged one and an interrupted save."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (2, 4, 6, 8):
        manifest = replace(MANIFEST, state=TrainState(step))
        write_checkpoint(folder / f"step-{step:08d}", manifest, {"weight": torch.randn(9)}, num_files=2)
    (folder / "step-00000010.partial").mkdir()
    (folder / "step-00000005.damaged").mkdir()
    return tmp_path / "run"


def test_complete_and_damaged_checkpoints_are_told_apart(run: Path, vitrail: Vitrail) -> None:
    listed = vitrail("checkpoints", "list", run)
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == [
        *(f"step-{step:08d}" for step in (2, 4, 6, 8)),
        "step-00000010.partial",
        "step-00000005.damaged",
    ]
    assert "2 ranks, ZeRO 2, fp32  complete" in listed.out
    intact = vitrail("checkpoints", "verify", run)
    assert intact.code == 0
    assert intact.out.splitlines() == [f"step-{step:08d}: complete" for step in (2, 4, 6, 8)]

    victim = run / "checkpoints" / "step-00000006" / "rank-00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x99")
    damaged = vitrail("checkpoints", "verify", run)
    assert damaged.code == 1
    assert f"{victim}: damaged (its checksum differs)" in damaged.out
    assert vitrail("checkpoints", "verify", run / "checkpoints" / "step-00000008").code == 0
    (run / "checkpoints" / "step-00000004" / "rank-00000.safetensors").unlink()
    assert "incomplete: rank-00000.safetensors" in vitrail("checkpoints", "list", run).out


def test_prune_keeps_the_last_and_every_nth_checkpoint(run: Path, vitrail: Vitrail) -> None:
    tried = vitrail("checkpoints", "prune", run, "--keep-every", "4", "--dry-run")
    assert [line.split(",")[0] for line in tried.out.splitlines()[:-1]] == [
        "would remove step-00000002",
        "would remove step-00000006",
        "would remove step-00000005.damaged",
        "would remove step-00000010.partial",
    ]
    assert len(list((run / "checkpoints").iterdir())) == 6
    assert vitrail("checkpoints", "prune", run, "--keep-every", "4").code == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]


def test_folder_without_checkpoints_exits_with_code_2(tmp_path: Path, vitrail: Vitrail) -> None:
    for verb in ("list", "verify", "prune"):
        done = vitrail("checkpoints", verb, tmp_path / "nowhere")
        assert done.code == 2
        assert "no checkpoint here; expected a run folder" in done.err
