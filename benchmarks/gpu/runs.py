"""Tiny shards and recipes, and the real training loop around them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pretrain.train
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.journal import read_rows
from pretrain.outcome import Outcome
from pretrain.run import Run, open_run
from pretrain.stop_signal import StopSignal

BATCH_SIZE = 16
TINY = """
seed: 3
run_dir: unused
data: {{train: {shards}/train, num_workers: 0, shuffle_window: 4}}
preprocessing: {{image_mean: [0.5, 0.5, 0.5], image_std: [0.5, 0.5, 0.5]}}
model: {{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, mlp_ratio: 2, patch_size: 8, image_size: 32}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{total_steps: 8, warmup_steps: 2}}
engine: {{zero_stage: 1, precision: fp32, global_batch_size: 16, micro_batch_size: 8}}
logging: {{every_steps: 1}}
checkpoint: {{every_steps: 1000}}
tracking: {{uri: "off"}}
"""
OBJECTIVES = {
    "supervised": ["objective={augment: {crop_scale: [0.5, 1.0], brightness: 0.2, mixup: 0.8, cutmix: 1.0}}"],
    "mae": [
        "objective={name: mae, mask_ratio: 0.5, decoder_hidden_size: 32, decoder_num_hidden_layers: 1, "
        "decoder_num_attention_heads: 2, decoder_intermediate_size: 64}"
    ],
    "self_distillation": [
        "objective={name: self_distillation, num_local_crops: 2, local_image_size: 16, num_prototypes: 32, "
        "head_hidden_size: 32, head_bottleneck_size: 16, augment: {crop_scale: [0.5, 1.0], blur: 0.5}}",
        "ema.decay=0",
        "engine.micro_batch_size=16",  # Sinkhorn balances the micro-batches of all ranks together
    ],
}
OPTIMIZERS = {
    "adamw": ["optimizer.layer_decay=0.7"],
    "lamb": ["optimizer.name=lamb", "optimizer.learning_rate=1e-2", "optimizer.layer_decay=0.7"],
    "muon": ["optimizer.name=muon", "optimizer.learning_rate=1e-2", "optimizer.layer_decay=0.7"],
}


def make_recipe(work: Path) -> Path:
    """Write shards of the digits 0 to 2 and a recipe for them, once for all ranks; return the recipe (collective)."""
    path = work / "tiny.yaml"
    if distributed.is_main():
        source = keep_classes(list_digits(), ["0", "1", "2"])
        make_shards(source, work / "shards", ShardOptions(validation_fraction=0.1, shard_bytes=50_000, seed=0))
        path.write_text(TINY.format(shards=work / "shards"), encoding="utf-8")
    distributed.barrier()
    return path


def load(recipe: Path, run_dir: Path, *overrides: str) -> PretrainConfig:
    """Read a recipe with overrides."""
    return load_config(PretrainConfig, recipe, [f"run_dir={run_dir}", *overrides]).config


TakeStep = Callable[..., Any]


@contextlib.contextmanager
def around_steps(take_step: TakeStep) -> Iterator[None]:
    """Call another function in place of `take_step` of the training loop."""
    with mock.patch("pretrain.train.take_step", take_step):
        yield


def train(config: PretrainConfig, inspect: Callable[[Run], object] = lambda run: None) -> list[dict[str, Any]]:
    """Train to the end in the real loop (collective).

    Args:
        config: Resolved run configuration.
        inspect: Function that is given the open run before the first step.

    Returns:
        The rows of its metrics.
    """
    with open_run(config) as run:
        inspect(run)
        outcome = pretrain.train.train_with_tracking(run, "", StopSignal())
        run.watch.finish(outcome)
    if outcome is not Outcome.DONE:
        raise RuntimeError(f"the run ended with {outcome.value}")
    return read_rows(config.run_dir / "metrics.jsonl")


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """Return the loss of each step."""
    return [row["train/loss"] for row in rows if "train/loss" in row]
