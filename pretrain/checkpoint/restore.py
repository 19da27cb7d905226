"""Find the newest intact checkpoint and load it into an engine, on any number of ranks and at any ZeRO stage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.checkpoint.history import checkpoints_folder, list_checkpoints, mark_damaged
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import Reader, find_faults
from pretrain.distributed import barrier, gather, is_main, on_all_ranks, rank, world_size
from pretrain.engine.partitions import (
    WEIGHT,
    copy_masters_to_model,
    create_optimizer_state,
    full_shapes,
    local_fragments,
)
from pretrain.engine.protocol import TrainingEngine
from pretrain.errors import CheckpointError

# Settings that must stay the same when a run resumes, because its losses would no longer be those of one run.
IDENTITY = (
    "seed",
    "model",
    "objective",
    "preprocessing",
    "data.shuffle_window",
    "data.repeats",
    "engine.global_batch_size",
)


def newest_intact(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that passes verification (collective). Each rank verifies its share of the files.

    Newer checkpoints that fail are renamed to `step-*.damaged`. A `VersionError` is raised if another version of
    Vitrail wrote the newest one.

    Args:
        run_dir: Folder of the run.

    Returns:
        The checkpoint, or None if the run has none, and the faults of the newer ones.

    Raises:
        CheckpointError: If the run has checkpoints, but all are damaged. Starting again would silently drop the run.
    """
    found: list[str] = []
    damaged: list[Path] = []
    for folder in reversed(gather(list_checkpoints(run_dir))[0]):
        faults = sorted(set().union(*gather(list(find_faults(folder, slice(rank(), None, world_size()))))))
        if not faults:
            if is_main():
                for each in damaged:
                    mark_damaged(each)
            barrier()
            return folder, found
        damaged.append(folder)
        found += faults
    if found:
        cure = f"choose another run_dir, or delete {checkpoints_folder(run_dir)} to start again"
        raise CheckpointError("\n".join([*found, f"{run_dir}: all checkpoints are damaged; {cure}"]))
    return None, []


def restore(engine: TrainingEngine, folder: Path, expected: Manifest) -> Manifest:
    """Load a checkpoint into an engine (collective). Each rank reads only what it holds.

    Args:
        engine: Engine for the same model, at any world size, ZeRO stage and precision.
        folder: Folder of the checkpoint.
        expected: Manifest of the current run, whose identity and data must match the saved one.

    Returns:
        The saved manifest.

    Raises:
        CheckpointError: If the checkpoint belongs to another run, dataset or model.
    """
    saved = Manifest.load(folder)
    if changes := list(_identity_changes(saved, expected)):
        lines = "\n".join(f"  {line}" for line in changes)
        raise CheckpointError(
            f"{folder}: cannot resume, because the run has changed:\n{lines}\n"
            "undo these changes, or choose another run_dir"
        )
    if mismatches := list(_shape_mismatches(saved, full_shapes(engine))):
        lines = "\n  ".join(mismatches)
        raise CheckpointError(f"{folder}: does not fit the model; choose another run_dir:\n  {lines}")
    reader = Reader(folder, saved)
    fragments = local_fragments(engine)
    kinds = {name: tensor.kinds for name, tensor in saved.tensors.items()}
    create_optimizer_state(fragments, kinds, saved.optimizer_steps)

    def read() -> None:
        for fragment in fragments:
            for kind in kinds[fragment.name]:
                if kind == WEIGHT or fragment.state is not None:
                    reader.read_into(fragment.view(kind), fragment.name, fragment.start, kind)

    on_all_ranks(read)  # a rank that cannot read must not leave the others waiting in the collective below
    copy_masters_to_model(engine)
    return saved


def _shape_mismatches(saved: Manifest, expected: dict[str, list[int]]) -> Iterator[str]:
    """Yield a sentence for each tensor that exists on one side only, or whose shape differs."""
    for name in sorted(saved.tensors.keys() | expected.keys()):
        before = saved.tensors[name].shape if name in saved.tensors else "not saved"
        now = expected.get(name, "not in the model")
        if before != now:
            yield f"{name}: saved {before}, expected {now}"


def _identity_changes(saved: Manifest, expected: Manifest) -> Iterator[str]:
    """Yield a sentence for each change that makes the run another one."""
    for key, before, now in _config_changes(saved.config, expected.config):
        if key.startswith(IDENTITY):
            yield f"{key} was {before}, is {now}"
    if saved.data_digests["training"] != expected.data_digests["training"]:
        yield "the training data changed (its digest differs)"


def _config_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value before, value now) for each config value that differs."""
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _config_changes(old, new, f"{prefix}{name}.")
        elif old != new:
            yield prefix + name, old, new
