"""Write checkpoints beside training: it stops only while its tensors are copied, a thread of each rank does the rest.

Each rank writes the pieces it owns and then a report, a small file of its own; the main rank's thread waits for all
reports, writes the manifest and gives the folder its name. So no rank talks to another while a save goes on.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from pretrain.checkpoint.history import PARTIAL, checkpoints_folder, remove, superfluous
from pretrain.checkpoint.manifest import Manifest, SavedFile, SavedTensor
from pretrain.checkpoint.pieces import Layout, NotFiniteError, Piece, write_file
from pretrain.distributed import gather, is_main, rank
from pretrain.engine.partitions import count_optimizer_steps, fragments_to_save, full_shapes
from pretrain.engine.protocol import TrainingEngine

PAUSES = (1.0, 5.0, 20.0)  # seconds before a failed write is tried again
POLL_SECONDS = 0.02


@dataclass
class _Save:
    """One checkpoint on its way to the disk."""

    manifest: Manifest
    folder: Path
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    error: str | None = None

    @property
    def partial(self) -> Path:
        return self.folder.with_name(self.folder.name + PARTIAL)

    @property
    def reports(self) -> list[Path]:
        return [self.partial / f"rank-{number:05d}.json" for number in range(self.manifest.world_size)]


class Saver:
    """A run's checkpoints, at most one of them in flight. All ranks call `begin` and `finish` at the same steps.

    Args:
        run_dir: of the run.
        keep_last: how many checkpoints to keep.
        keep_every: keep those at its multiples too; 0 for none.
        say: is told, on any rank, what became of a save.
    """

    def __init__(
        self, run_dir: Path, keep_last: int, keep_every: int = 0, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.say = say
        self._layout = Layout([])
        self._values = torch.empty(0)
        self._shapes: dict[str, list[int]] = {}
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None

    def begin(self, engine: TrainingEngine, manifest: Manifest) -> None:
        """Copy this rank's pieces and let them be written. Waits for a save that is still under way."""
        self.finish()
        self._copy(engine)
        if is_main():
            self._shapes = full_shapes(engine)
            manifest = replace(manifest, optimizer_steps=count_optimizer_steps(engine))
        self._save = _Save(manifest, checkpoints_folder(self.run_dir) / f"step-{manifest.state.step:08d}")
        self._thread = threading.Thread(target=self._work, args=[self._save], name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Wait until the save in flight is a checkpoint; return whether it is, or there was none. All ranks meet."""
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
        """Whether this rank's part of the save in flight has failed for good."""
        return self._save is not None and self._save.error is not None

    def give_up(self) -> None:
        """Clear away a save that has failed on some rank, as all ranks have heard."""
        if self._save is not None:
            self._save.abandoned.set()
        self.finish()

    def _copy(self, engine: TrainingEngine) -> None:
        """Copy all that this rank owns into one buffer, which is made once."""
        fragments = fragments_to_save(engine)
        pieces = [Piece(f.name, f.start, f.start + f.numel, f.kinds) for f in fragments]
        if pieces != self._layout.pieces:
            self._layout = Layout(pieces)
            self._values = torch.empty(self._layout.numel, pin_memory=torch.cuda.is_available())
        views = (fragment.view(kind) for fragment in fragments for kind in fragment.kinds)
        for (_, piece, place), view in zip(self._layout.spans, views, strict=True):
            self._values[place : place + piece.stop - piece.start].copy_(view, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _work(self, save: _Save) -> None:
        """What the thread does; whatever goes wrong is said, and costs this checkpoint alone."""
        try:
            self._persist(save, self._write)
            save.written.set()
            if is_main() and self._wait_for_reports(save):
                self._persist(save, self._compose)
                self._persist(save, self._commit)
                self.say(f"saved {save.folder}")
                self._clean_up()
        except BaseException as error:  # whatever ends this thread, training must hear of it
            save.error = _sentence(error, save.partial)
            self.say(f"rank {rank()}: {save.folder.name} is not saved, training goes on: {save.error}")
        finally:
            save.written.set()

    def _persist(self, save: _Save, work: Callable[[_Save], None]) -> None:
        """Do what the disk may refuse, and do it again if it does."""
        for pause in PAUSES:
            try:
                work(save)
            except OSError as error:
                self.say(
                    f"rank {rank()}: {save.folder.name}: {_sentence(error, save.partial)}; next try in {pause:.0f} s"
                )
                if save.abandoned.wait(pause):
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
            report = path.with_suffix(".json")
            aside = report.with_suffix(".new")
            aside.write_text(json.dumps({"file": asdict(file), "pieces": pieces}))
            aside.rename(report)
        except (OSError, NotFiniteError):
            path.unlink(missing_ok=True)  # what little space there is, the next try needs
            raise

    def _wait_for_reports(self, save: _Save) -> bool:
        while not all(report.exists() for report in save.reports):
            if save.abandoned.wait(POLL_SECONDS):
                return False
        return True

    def _compose(self, save: _Save) -> None:
        """Complete the manifest by what the ranks have reported."""
        files: list[SavedFile] = []
        tensors = {name: SavedTensor(shape, [], []) for name, shape in self._shapes.items()}
        for number, report in enumerate(save.reports):
            content = json.loads(report.read_text())
            files.append(SavedFile(**content["file"]))
            for name, start, stop, kinds in content["pieces"]:
                tensors[name].pieces.append([number, start, stop])
                tensors[name].kinds[:] = kinds
        save.manifest = replace(save.manifest, files=files, tensors=tensors)

    def _commit(self, save: _Save) -> None:
        """Make the ranks' files a checkpoint: the manifest, then the name. May be done again from its beginning."""
        save.manifest.save(save.partial)
        for report in save.reports:
            report.unlink(missing_ok=True)
        sync(save.partial)
        if save.folder.exists():  # of a run that went back before this step
            remove(save.folder)
        save.partial.rename(save.folder)
        sync(save.folder.parent)

    def _clean_up(self) -> None:
        """Let old checkpoints go; one that stays costs room, not this one."""
        for old in superfluous(self.run_dir, self.keep_last, self.keep_every):
            try:
                remove(old)
            except OSError as error:
                self.say(f"{old.name} could not be removed: {_sentence(error, old)}")


def sync(folder: Path) -> None:
    """Make sure that a folder's names are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sentence(error: BaseException, place: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or place}: {error.strerror or error}"
    return str(error) if isinstance(error, NotFiniteError) else f"{type(error).__name__}: {error}"
