"""Put a saved run back under an engine, exactly: the same weights, moments and place in the data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import ENGINE, CheckpointError, Manifest
from pretrain.engine import Engine

# What makes a run that run: changing one of these in mid-run would make its curve a lie.
IDENTITY = ("seed", "model", "objective", "preprocessing", "data.shuffle_window", "engine.global_batch_size")
# Until checkpoints can be resharded, the engine's files fit one topology.
TOPOLOGY = ("engine.zero_stage", "engine.precision", "engine.offload_optimizer")


def restore(engine: Engine, folder: Path, expected: Manifest) -> Manifest:
    """Load a checkpoint into the engine; every rank calls this.

    Args:
        engine: built from the same config.
        folder: of the checkpoint.
        expected: this run's manifest; what differs from the saved one is refused where it would change the run.

    Returns:
        The saved manifest.

    Raises:
        CheckpointError: the checkpoint belongs to another run, data set or topology.
    """
    saved = Manifest.load(folder)
    differences = list(_differences(saved, expected))
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise CheckpointError(f"{folder}: saved by a different run:\n{lines}\nrestore these, or choose another run_dir")
    path, _ = engine.load_checkpoint(str(folder), tag=ENGINE)
    if path is None:
        raise CheckpointError(f"{folder}: the engine's files are missing")
    return saved


def _differences(saved: Manifest, expected: Manifest) -> Iterator[str]:
    """Yield a sentence for each difference that matters."""
    for key, before, now in _changes(saved.config, expected.config):
        if key.startswith(IDENTITY + TOPOLOGY):
            yield f"{key} was {before}, is {now}"
    if saved.world_size != expected.world_size:
        yield f"it ran on {saved.world_size} ranks, this run has {expected.world_size}"
    if saved.data_digest != expected.data_digest:
        yield "the training data changed (its digest differs)"


def _changes(before: dict[str, Any], now: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value before, value now) for all that differs."""
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{above}{name}.")
        elif old != new:
            yield above + name, old, new
