"""What a checkpoint says of itself: where the run stands, and where every piece of every tensor lies.

The run's randomness is keyed by `config.seed`, the step and the sample, and its schedule is a function of the step, so
the resolved config and two numbers are the whole state beside the tensors.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.errors import CheckpointError, VersionError

VERSION = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SavedFile:
    """One rank's file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedTensor:
    """A tensor's shape, what is saved of it, and its pieces: (number of the file, start, stop) of the flat tensor."""

    shape: list[int]
    kinds: list[str]
    pieces: list[list[int]]


@dataclass(frozen=True)
class Manifest:
    """Where a run stands, what it is, and, once it is saved, where its tensors lie."""

    step: int
    samples: int
    world_size: int
    data_digests: dict[str, str]  # of the training data and, if there is one, the validation set
    class_names: list[str]
    config: dict[str, Any]
    git_commit: str | None
    mlflow_run_id: str | None = None
    optimizer_steps: float = 0.0
    usual: list[list[float]] = field(default_factory=list)  # what a spike is measured by
    passed: list[list[int]] = field(default_factory=list)  # ranges of samples that are passed over
    files: list[SavedFile] = field(default_factory=list)
    tensors: dict[str, SavedTensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the manifest and make sure that it is on the disk."""
        content = {"version": VERSION, **asdict(self)}
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({**content, "sha256": _digest(content)}, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of a checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged.
            VersionError: another version wrote it.
        """
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: is no checkpoint, it has no {MANIFEST}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / MANIFEST}: damaged ({error})") from None
        sha256 = content.pop("sha256", None) if isinstance(content, dict) else None
        if sha256 is None or sha256 != _digest(content):
            raise CheckpointError(f"{folder / MANIFEST}: damaged (its checksum differs)")
        if content.get("version") != VERSION:
            version = content.get("version")
            raise VersionError(f"{folder}: its format is {version}, this version of Vitrail reads {VERSION}")
        del content["version"]
        content["files"] = [SavedFile(**file) for file in content["files"]]
        content["tensors"] = {name: SavedTensor(**tensor) for name, tensor in content["tensors"].items()}
        return cls(**content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
