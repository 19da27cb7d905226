"""A run's checkpoints: which there are, and which may go.

A checkpoint is a folder with a manifest. It gets its name last, by a rename, so a name is a promise: all is there.
"""

import shutil
from pathlib import Path

from pretrain.checkpoint.manifest import MANIFEST, Manifest
from pretrain.errors import CheckpointError

PARTIAL = ".partial"  # of a folder that is being written, or whose writer died
DAMAGED = ".damaged"  # of a checkpoint that did not prove itself, set aside


def checkpoints_folder(run_dir: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first; that their files are whole is not looked at."""
    folders = checkpoints_folder(run_dir).glob("step-*")  # a copy that a person has named step-best is theirs
    named = (folder for folder in folders if folder.name.removeprefix("step-").isdigit())
    return sorted(folder for folder in named if (folder / MANIFEST).exists())


def list_remains(run_dir: Path) -> list[Path]:
    """Return what saves that never ended have left."""
    return sorted(checkpoints_folder(run_dir).glob(f"step-*{PARTIAL}"))


def list_damaged(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were set aside because they did not prove themselves."""
    return sorted(checkpoints_folder(run_dir).glob(f"step-*{DAMAGED}"))


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest one with a valid manifest of the run `path`.

    Raises:
        CheckpointError: neither.
        VersionError: another version of Vitrail wrote the newest.
    """
    path = path.resolve()
    if (path / MANIFEST).exists():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here; expected a run folder or one of its checkpoints/step-*")
    return next(filter(_has_valid_manifest, reversed(found)), found[-1])


def _has_valid_manifest(checkpoint: Path) -> bool:
    try:
        Manifest.load(checkpoint)
    except CheckpointError:
        return False
    return True


def set_aside(checkpoint: Path) -> None:
    """Give a checkpoint that did not prove itself another name."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)  # of the same step, and damaged before
    checkpoint.rename(aside)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name tells."""
    return int(checkpoint.name.removeprefix("step-"))


def superfluous(run_dir: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Return the checkpoints that may go: neither among the last ones nor at a step that `keep_every` divides."""
    old = list_checkpoints(run_dir)[:-keep_last]
    return [path for path in old if not keep_every or step_of(path) % keep_every]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, first its name, so that no half of it is ever listed."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
