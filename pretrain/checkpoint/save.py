"""Save checkpoints while training continues. Training waits only while the tensors are copied to host memory.

On each rank a thread writes the rank's file, then a small report about it. The main rank's thread waits for the reports
of all ranks, writes the manifest and renames the folder. No collective is needed while a save is in progress.
"""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from pretrain.checkpoint.history import checkpoints_folder, list_expired
from pretrain.checkpoint.manifest import Manifest, SavedFile, SavedTensor
from pretrain.checkpoint.pieces import Layout, NonFiniteError, Piece, write_file
from pretrain.distributed import gather, is_main, rank
from pretrain.engine.partitions import count_optimizer_steps, fragments_to_save, full_shapes
from pretrain.engine.protocol import TrainingEngine
from pretrain.files import atomic_write, partial_path, publish, remove_folder

RETRY_DELAYS = (1.0, 5.0, 20.0)  # seconds before each retry of a failed write
POLL_SECONDS = 0.02


@dataclass
class _Save:
    """One save in progress.

    Attributes:
        manifest: Manifest of the checkpoint, completed by the main rank.
        folder: Final name of the checkpoint.
        written: Set once this rank's file is written, or has failed for good.
        abandoned: Set to end the save early, because some rank has failed.
        error: Reason why this rank has failed for good.
    """

    manifest: Manifest
    folder: Path
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    error: str | None = None

    @property
    def partial(self) -> Path:
        return partial_path(self.folder)

    @property
    def reports(self) -> list[Path]:
        return [self.partial / f"rank-{number:05d}.json" for number in range(self.manifest.world_size)]


class Saver:
    """Saves a run's checkpoints, at most one at a time. All ranks must call `begin` and `finish` at the same steps.

    Args:
        run_dir: Folder of the run.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Steps whose multiples are kept as well; 0 keeps none.
        log: Function that is called, on any rank and from any thread, with a sentence about the progress of a save.
    """

    def __init__(
        self, run_dir: Path, keep_last: int, keep_every: int = 0, log: Callable[[str], None] = lambda _: None
    ) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.log = log
        self._layout = Layout([])
        self._values = torch.empty(0)
        self._shapes: dict[str, list[int]] = {}
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None

    def begin(self, engine: TrainingEngine, manifest: Manifest) -> None:
        """Copy this rank's tensors and start to write them, after the previous save has finished (collective).

        Args:
            engine: Engine whose weights and optimizer state to save.
            manifest: Manifest of the checkpoint, without files and tensors.
        """
        self.finish()
        self._copy(engine)
        if is_main():
            self._shapes = full_shapes(engine)
            manifest = replace(manifest, optimizer_steps=count_optimizer_steps(engine))
        self._save = _Save(manifest, checkpoints_folder(self.run_dir) / f"step-{manifest.state.step:08d}")
        self._thread = threading.Thread(target=self._work, args=[self._save], name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Wait for the save in progress (collective).

        Returns:
            Whether it became a checkpoint; true if no save was in progress.
        """
        save = self._save
        if save is None or self._thread is None:
            return True
        save.written.wait()
        failed = any(gather(save.error is not None))
        if failed:
            save.abandoned.set()
        self._thread.join()
        self._save = self._thread = None
        if is_main() and failed:
            shutil.rmtree(save.partial, ignore_errors=True)
        return not any(gather(save.error is not None))

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the save in progress has failed for good."""
        return self._save is not None and self._save.error is not None

    def abandon(self) -> None:
        """End a save that has failed on some rank, and remove its files (collective)."""
        if self._save is not None:
            self._save.abandoned.set()
        self.finish()

    def _copy(self, engine: TrainingEngine) -> None:
        """Copy everything that this rank saves into one host buffer, which is allocated once."""
        fragments = fragments_to_save(engine)
        pieces = [Piece(f.name, f.start, f.start + f.numel, f.kinds) for f in fragments]
        if pieces != self._layout.pieces:
            self._layout = Layout(pieces)
            self._values = torch.empty(self._layout.numel, pin_memory=torch.cuda.is_available())
        views = (fragment.view(kind) for fragment in fragments for kind in fragment.kinds)
        for (_, piece, offset), view in zip(self._layout.spans, views, strict=True):
            self._values[offset : offset + piece.stop - piece.start].copy_(view, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _work(self, save: _Save) -> None:
        """Write the checkpoint in the thread. A failure is logged and costs only this checkpoint."""
        try:
            self._retry(save, self._write)
            save.written.set()
            if is_main() and self._wait_for_reports(save):
                self._retry(save, self._complete_manifest)
                self._retry(save, self._publish)
                self.log(f"saved {save.folder}")
                self._remove_expired()
        except BaseException as error:  # whatever ends this thread, the training loop has to know
            save.error = _describe(error, save.partial)
            self.log(f"rank {rank()}: {save.folder.name} was not saved, training continues: {save.error}")
        finally:
            save.written.set()

    def _retry(self, save: _Save, work: Callable[[_Save], None]) -> None:
        """Do some work, and repeat it after a delay if the disk fails."""
        for delay in RETRY_DELAYS:
            try:
                work(save)
            except OSError as error:
                reason = _describe(error, save.partial)
                self.log(f"rank {rank()}: {save.folder.name}: {reason}; retrying in {delay:.0f} s")
                if save.abandoned.wait(delay):
                    return
            else:
                return
        work(save)

    def _write(self, save: _Save) -> None:
        """Write this rank's file and its report."""
        save.partial.mkdir(parents=True, exist_ok=True)
        path = save.partial / f"rank-{rank():05d}.safetensors"
        try:
            file = write_file(path, self._layout, self._values)
            pieces = [(piece.name, piece.start, piece.stop, piece.kinds) for piece in self._layout.pieces]
            atomic_write(path.with_suffix(".json"), json.dumps({"file": asdict(file), "pieces": pieces}), durable=False)
        except (OSError, NonFiniteError):
            path.unlink(missing_ok=True)  # on a full disk, the retry needs the space
            raise

    def _wait_for_reports(self, save: _Save) -> bool:
        while not all(report.exists() for report in save.reports):
            if save.abandoned.wait(POLL_SECONDS):
                return False
        return True

    def _complete_manifest(self, save: _Save) -> None:
        """Add the files and tensors that the ranks have reported to the manifest."""
        files: list[SavedFile] = []
        tensors = {name: SavedTensor(shape, [], []) for name, shape in self._shapes.items()}
        for number, report in enumerate(save.reports):
            content = json.loads(report.read_text())
            files.append(SavedFile(**content["file"]))
            for name, start, stop, kinds in content["pieces"]:
                tensors[name].pieces.append([number, start, stop])
                tensors[name].kinds[:] = kinds
        save.manifest = replace(save.manifest, files=files, tensors=tensors)

    def _publish(self, save: _Save) -> None:
        """Write the manifest and rename the folder. A failed attempt can be repeated from the start."""
        save.manifest.save(save.partial)
        for report in save.reports:
            report.unlink(missing_ok=True)
        if save.folder.exists():  # a checkpoint from before a rollback
            remove_folder(save.folder)
        publish(save.partial, save.folder)

    def _remove_expired(self) -> None:
        """Remove old checkpoints; one that cannot be removed is logged and stays."""
        for old in list_expired(self.run_dir, self.keep_last, self.keep_every):
            try:
                remove_folder(old)
            except OSError as error:
                self.log(f"{old.name} was not removed: {_describe(error, old)}")


def _describe(error: BaseException, path: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or path}: {error.strerror or error}"
    return str(error) if isinstance(error, NonFiniteError) else f"{type(error).__name__}: {error}"
