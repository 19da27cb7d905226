"""What a checkpoint says of itself, and where checkpoints stand.

A checkpoint is a folder with a manifest. It gets its name last, by a rename, so a name is a promise: all is there.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from pretrain import UserError

VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
ENGINE = "engine"
PARTIAL = ".partial"


class CheckpointError(UserError):
    """A checkpoint that cannot be used here: the message names it and the fix."""


@dataclass(frozen=True)
class Manifest:
    """Where a run stands, and what it is."""

    step: int
    samples: int
    world_size: int
    data_digest: str
    class_names: list[str]
    config: dict[str, Any]
    git_commit: str | None

    def save(self, folder: Path) -> None:
        """Write the manifest and make sure that it is on the disk."""
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({"version": VERSION, **asdict(self)}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of a checkpoint."""
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: is no checkpoint, it has no {MANIFEST}") from None
        except ValueError as error:
            raise CheckpointError(f"{folder / MANIFEST}: damaged ({error})") from None
        if content.pop("version") != VERSION:
            raise CheckpointError(f"{folder}: written by another version of Tessera")
        return cls(**content)


def checkpoints_folder(run_dir: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's whole checkpoints, oldest first."""
    folders = checkpoints_folder(run_dir).glob("step-*")
    return sorted(folder for folder in folders if folder.suffix != PARTIAL and (folder / MANIFEST).exists())


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest checkpoint of the run `path`.

    Raises:
        CheckpointError: neither.
    """
    path = path.resolve()
    if (path / MANIFEST).exists():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here; expected a run folder or one of its checkpoints/step-*")
    return found[-1]


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of a checkpoint by their names in the objective."""
    return load_file(folder / WEIGHTS)
