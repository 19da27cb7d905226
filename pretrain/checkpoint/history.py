"""Find, list and expire the checkpoints of a run."""

from pathlib import Path

from pretrain.checkpoint.manifest import MANIFEST, Manifest
from pretrain.errors import CheckpointError
from pretrain.files import PARTIAL, remove_folder

DAMAGED = ".damaged"  # suffix of a checkpoint that failed verification


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder in which a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first, without verifying their files.

    Only names that end in a step number count. A copy that a user has named `step-best` is ignored.
    """
    folders = checkpoints_folder(run_dir).glob("step-*")
    named = (folder for folder in folders if folder.name.removeprefix("step-").isdigit())
    return sorted(folder for folder in named if (folder / MANIFEST).exists())


def list_unfinished(run_dir: Path) -> list[Path]:
    """Return the folders of saves and removals that are in progress, or that were interrupted."""
    return sorted(checkpoints_folder(run_dir).glob(f"step-*{PARTIAL}"))


def list_damaged(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were renamed because they failed verification."""
    return sorted(checkpoints_folder(run_dir).glob(f"step-*{DAMAGED}"))


def list_expired(run_dir: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Return the checkpoints that may be removed, oldest first.

    Args:
        run_dir: Folder of the run.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Steps whose multiples are kept as well; 0 keeps none.
    """
    old = list_checkpoints(run_dir)[:-keep_last]
    return [path for path in old if not keep_every or step_of(path) % keep_every]


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest checkpoint with a valid manifest of the run in `path`.

    Args:
        path: Checkpoint, or folder of a run.

    Raises:
        CheckpointError: If `path` is neither a checkpoint nor a run that has one.
    """
    path = path.resolve()
    if (path / MANIFEST).exists():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here; expected a run folder or one of its checkpoints/step-*")
    return next(filter(_has_valid_manifest, reversed(found)), found[-1])


def _has_valid_manifest(checkpoint: Path) -> bool:
    """Return whether a manifest is valid; another version raises an error, so that no older checkpoint is used."""
    try:
        Manifest.load(checkpoint)
    except CheckpointError:
        return False
    return True


def mark_damaged(checkpoint: Path) -> None:
    """Rename a checkpoint that failed verification, so that it is no longer listed."""
    renamed = checkpoint.with_name(checkpoint.name + DAMAGED)
    if renamed.exists():  # an earlier checkpoint of the same step
        remove_folder(renamed)
    checkpoint.rename(renamed)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))
