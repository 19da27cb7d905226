"""The manifest of a checkpoint: the run's state and config, and which file holds which piece of every tensor.

All random numbers of a run are keyed by `config.seed`, the step and the sample, and its schedules are functions of the
step. The resolved config and a `TrainState` are therefore the whole state besides the tensors.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pretrain.config import PretrainConfig
from pretrain.errors import CheckpointError, VersionError
from pretrain.files import atomic_write
from pretrain.state import TrainState

VERSION = 4
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SavedFile:
    """The file that one rank wrote.

    Attributes:
        name: File name within the checkpoint.
        num_bytes: Size of the file.
        sha256: Checksum of its content in hexadecimal form.
    """

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedTensor:
    """A parameter or buffer, and where its pieces are.

    Attributes:
        shape: Shape of the whole tensor.
        kinds: Kinds of values that are saved: "weight", "ema" and the names of the optimizer's moments.
        pieces: Lists [number of the file, start, stop] of ranges of the flattened tensor.
    """

    shape: list[int]
    kinds: list[str]
    pieces: list[list[int]]


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint's manifest.

    Attributes:
        state: State of the run when the checkpoint was taken.
        world_size: Number of ranks that wrote the checkpoint.
        data_digests: Digest of the dataset "training" and, if the run has one, "validation".
        class_names: Names of the classes in the order of their labels; empty without labels.
        config: Resolved config of the run as JSON.
        git_commit: Commit of the code, or "unknown".
        mlflow_run_id: Id of the run in MLflow, if it is tracked there.
        optimizer_steps: Number of updates that the optimizer has counted, which its bias correction needs.
        files: Files of the checkpoint, in the order of the ranks.
        tensors: Saved tensors by name.
    """

    state: TrainState
    world_size: int
    data_digests: dict[str, str]
    class_names: list[str]
    config: dict[str, Any]
    git_commit: str | None
    mlflow_run_id: str | None = None
    optimizer_steps: float = 0.0
    files: list[SavedFile] = field(default_factory=list)
    tensors: dict[str, SavedTensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the manifest into the folder of its checkpoint and flush it to the disk."""
        content = {"version": VERSION, **asdict(self)}
        atomic_write(folder / MANIFEST, json.dumps({**content, "sha256": _digest(content)}))

    def parse_config(self, folder: Path) -> PretrainConfig:
        """Return the config of the run.

        Args:
            folder: Folder of the checkpoint, for the error message.

        Raises:
            VersionError: If another version of Vitrail wrote it, whose keys this one does not know.
        """
        try:
            return PretrainConfig.model_validate_json(json.dumps(self.config))
        except ValidationError as error:
            keys = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
            raise VersionError(
                f"{folder}: this version of Vitrail cannot read the config of the run ({keys}); use the version that "
                "wrote it"
            ) from None

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of a checkpoint.

        Raises:
            CheckpointError: If the folder has no manifest or the manifest is damaged.
            VersionError: If another version of Vitrail wrote it.
        """
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: not a checkpoint (it has no {MANIFEST}); choose a folder step-*"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / MANIFEST}: damaged ({error})") from None
        sha256 = content.pop("sha256", None) if isinstance(content, dict) else None
        if sha256 is None or sha256 != _digest(content):
            raise CheckpointError(f"{folder / MANIFEST}: damaged (its checksum differs)")
        if content.get("version") != VERSION:
            version = content.get("version")
            raise VersionError(
                f"{folder}: checkpoint format {version} is not supported, this version of Vitrail reads format "
                f"{VERSION}; use the version that wrote it, or choose another run_dir"
            )
        del content["version"]
        content["state"] = TrainState.from_json(content["state"])
        content["files"] = [SavedFile(**file) for file in content["files"]]
        content["tensors"] = {name: SavedTensor(**tensor) for name, tensor in content["tensors"].items()}
        return cls(**content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
