"""Checkpoints of tensors that no run has trained."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.manifest import Manifest, SavedTensor
from pretrain.checkpoint.pieces import Layout, Piece, write_file
from pretrain.engine.partitions import WEIGHT


def write_checkpoint(folder: Path, manifest: Manifest, weights: dict[str, Tensor], num_files: int = 1) -> Path:
    """Write weights as so many ranks would, each with its share of every tensor."""
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
