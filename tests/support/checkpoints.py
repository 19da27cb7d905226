"""A manifest, an engine without DeepSpeed, and checkpoints of tensors that no run has trained."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pretrain.checkpoint.manifest import Manifest, SavedTensor
from pretrain.checkpoint.pieces import Layout, Piece, write_file
from pretrain.config import DataConfig, ModelConfig, PreprocessingConfig, PretrainConfig, ScheduleConfig
from pretrain.engine.partitions import WEIGHT
from pretrain.model.vit import ViT
from pretrain.state import TrainState

MANIFEST = Manifest(
    state=TrainState(step=4, position=64, images_seen=48, skipped_ranges=((16, 32),), spike_window=[[1.0], [0.5]]),
    world_size=2,
    data_digests={"training": "abc"},
    class_names=["cat", "dog"],
    config={
        "seed": 0,
        "model": {"hidden_size": 32},
        "engine": {"zero_stage": 2, "precision": "fp32", "global_batch_size": 16},
        "schedule": {"total_steps": 8},
    },
    git_commit=None,
)


def one_rank_manifest(step: int = 4) -> Manifest:
    """Return the manifest of a run on one rank at a step."""
    return replace(MANIFEST, world_size=1, state=replace(MANIFEST.state, step=step))


@dataclass
class PlainEngine:
    """What DeepSpeed's engine is at stage 0 in fp32 for checkpoints and averages: a module and a torch optimizer."""

    module: nn.Module
    optimizer: Optimizer

    @classmethod
    def adamw(cls, module: nn.Module, **options: float) -> "PlainEngine":
        """Return an engine that trains a module with torch's AdamW."""
        return cls(module, AdamW(module.parameters(), **options))

    def take_step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """Take one optimizer step for a loss of the module."""
        loss(self.module).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def write_run(folder: Path, model: ModelConfig, class_names: list[str]) -> Path:
    """Write a run folder with one checkpoint, of a supervised classifier with random weights; return the folder."""
    config = PretrainConfig(
        run_dir=folder,
        data=DataConfig(train=str(folder)),
        model=model,
        preprocessing=PreprocessingConfig(resize_ratio=1.25),
        schedule=ScheduleConfig(total_steps=9),
    )
    torch.manual_seed(1)
    weights = {f"encoder.{name}": weight for name, weight in ViT(model).state_dict().items()}
    size = (len(class_names), model.hidden_size)
    weights |= {"classifier.weight": torch.randn(size), "classifier.bias": torch.randn(size[0])}
    weights = {name: weight + 0.05 * torch.randn_like(weight) for name, weight in weights.items()}
    resolved = json.loads(config.model_dump_json())
    manifest = Manifest(TrainState(9, 99, 72), 1, {"training": "digest"}, class_names, resolved, "commit")
    write_checkpoint(folder / "checkpoints" / "step-00000009", manifest, weights, num_files=2)
    return folder


def write_checkpoint(folder: Path, manifest: Manifest, weights: dict[str, Tensor], num_files: int = 1) -> Path:
    """Write a checkpoint as `num_files` ranks would, each with its share of every tensor; return its folder."""
    folder.mkdir(parents=True)
    files = []
    tensors = {name: SavedTensor(list(weight.shape), [WEIGHT], []) for name, weight in weights.items()}
    for number in range(num_files):
        pieces, values = [], []
        for name, weight in weights.items():
            start, stop = (weight.numel() * (number + i) // num_files for i in (0, 1))
            pieces.append(Piece(name, start, stop, (WEIGHT,)))
            values.append(weight.flatten()[start:stop].float())
            tensors[name].pieces.append([number, start, stop])
        path = folder / f"rank-{number:05d}.safetensors"
        files.append(write_file(path, Layout(pieces), torch.cat(values)))
    replace(manifest, files=files, tensors=tensors).save(folder)
    return folder
