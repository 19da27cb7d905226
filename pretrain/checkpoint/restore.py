"""Put a saved run back under an engine, on any number of ranks and at any ZeRO stage, or refuse with a sentence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.checkpoint.history import list_checkpoints, set_aside
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import Reader, find_faults
from pretrain.distributed import gather, is_main, on_all_ranks, rank, wait_for_all, world_size
from pretrain.engine.partitions import (
    WEIGHT,
    copy_masters_to_model,
    create_optimizer_state,
    full_shapes,
    local_fragments,
)
from pretrain.engine.protocol import TrainingEngine
from pretrain.errors import CheckpointError

# What makes a run that run: changing one of these in mid-run would make its curve a lie.
IDENTITY = (
    "seed",
    "model",
    "objective",
    "preprocessing",
    "data.shuffle_window",
    "data.repeats",
    "engine.global_batch_size",
)


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that proves itself; every rank calls this and reads its share of the files.

    Returns:
        The checkpoint, and what was wrong with newer ones, which are set aside under another name.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; to begin anew would be to forget the run.
        VersionError: another version of Vitrail wrote the newest.
    """
    found: list[str] = []
    damaged: list[Path] = []
    for folder in reversed(gather(list_checkpoints(run_dir))[0]):
        faults = sorted(set().union(*gather(list(find_faults(folder, slice(rank(), None, world_size()))))))
        if not faults:
            if is_main():
                for each in damaged:
                    set_aside(each)
            wait_for_all()
            return folder, found
        damaged.append(folder)
        found += faults
    if found:
        raise CheckpointError("\n".join([*found, f"{run_dir}: no checkpoint is whole; choose another run_dir"]))
    return None, []


def restore(engine: TrainingEngine, folder: Path, expected: Manifest) -> Manifest:
    """Load a checkpoint into the engine; every rank calls this, and reads what it is to hold.

    Args:
        engine: built from the same config, at any world size, ZeRO stage and precision.
        folder: of the checkpoint.
        expected: this run's manifest; what differs from the saved one is refused where it would change the run.

    Returns:
        The saved manifest.

    Raises:
        CheckpointError: the checkpoint belongs to another run or data set.
    """
    saved = Manifest.load(folder)
    differences = list(_differences(saved, expected))
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise CheckpointError(f"{folder}: saved by a different run:\n{lines}\nrestore these, or choose another run_dir")
    if wrong := list(_misfits(saved, full_shapes(engine))):
        raise CheckpointError(f"{folder}: does not fit the model:\n  " + "\n  ".join(wrong))
    reader = Reader(folder, saved)
    fragments = local_fragments(engine)
    create_optimizer_state(
        fragments, {name: tensor.kinds for name, tensor in saved.tensors.items()}, saved.optimizer_steps
    )

    def read() -> None:
        for fragment in fragments:
            for kind in saved.tensors[fragment.name].kinds:
                if kind == WEIGHT or fragment.state is not None:
                    reader.copy(kind, fragment.name, fragment.start, fragment.view(kind))

    on_all_ranks(read)  # before all meet again
    copy_masters_to_model(engine)
    return saved


def _misfits(saved: Manifest, expected: dict[str, list[int]]) -> Iterator[str]:
    """Yield a sentence for each tensor that one side lacks, or has in another shape."""
    for name in sorted(saved.tensors.keys() | expected.keys()):
        before = saved.tensors[name].shape if name in saved.tensors else "not saved"
        now = expected.get(name, "not in the model")
        if before != now:
            yield f"{name}: saved {before}, expected {now}"


def _differences(saved: Manifest, expected: Manifest) -> Iterator[str]:
    """Yield a sentence for each difference that matters."""
    for key, before, now in _changes(saved.config, expected.config):
        if key.startswith(IDENTITY):
            yield f"{key} was {before}, is {now}"
    if saved.data_digests["training"] != expected.data_digests["training"]:
        yield "the training data changed (its digest differs)"


def _changes(before: dict[str, Any], now: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value before, value now) for all that differs."""
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{above}{name}.")
        elif old != new:
            yield above + name, old, new
