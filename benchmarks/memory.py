"""Measure the memory of `vitrail export`, compared with the size of the weights and of the whole checkpoint.

    python benchmarks/memory.py                 # ViT-B/16 and L/16, saved by eight ranks, about a minute
    python benchmarks/memory.py --sizes S/16    # the smallest run

The checkpoint contains the weights and AdamW's two moments. The export and its verification run in a separate process.
Its memory is the increase of the peak resident memory over that after the imports.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pretrain.checkpoint.manifest import Manifest, SavedTensor
from pretrain.checkpoint.pieces import Layout, Piece, write_file
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.engine.partitions import WEIGHT
from pretrain.export.folder import export
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.state import TrainState

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "vit_b16.yaml"
NUM_RANKS = 8
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")
SIZES = {"S/16": (384, 12, 6), "B/16": (768, 12, 12), "L/16": (1024, 24, 16)}


def save(folder: Path, size: str) -> tuple[int, int]:
    """Write a checkpoint as eight ranks would at ZeRO 3, and return the bytes of its weights and of all its files."""
    width, depth, heads = SIZES[size]
    overrides = [f"model={{hidden_size: {width}, num_hidden_layers: {depth}, num_attention_heads: {heads}}}"]
    config = load_config(PretrainConfig, RECIPE, ["run_dir=unused", "data.train=unused", *overrides]).config
    names = [str(number) for number in range(1000)]
    objective = build_objective(config.objective, ViT(config.model), [1 / 1000] * 1000, config.preprocessing)
    weights = objective.state_dict()
    tensors = {name: SavedTensor(list(weight.shape), list(KINDS), []) for name, weight in weights.items()}
    files = []
    for rank in range(NUM_RANKS):
        pieces, values = [], []
        for name, weight in weights.items():
            start, stop = (weight.numel() * (rank + i) // NUM_RANKS for i in (0, 1))
            pieces.append(Piece(name, start, stop, KINDS))
            values += [weight.flatten()[start:stop]] * len(KINDS)
            tensors[name].pieces.append([rank, start, stop])
        files.append(write_file(folder / f"rank-{rank:05d}.safetensors", Layout(pieces), torch.cat(values)))
    resolved = json.loads(config.model_dump_json())
    Manifest(TrainState(1), NUM_RANKS, {"training": ""}, names, resolved, None, files=files, tensors=tensors).save(
        folder
    )
    return 4 * sum(weight.numel() for weight in weights.values()), sum(file.num_bytes for file in files)


def export_memory(checkpoint: Path, out: Path) -> int:
    """Export a checkpoint, and return by how many bytes this raised the peak resident memory of the process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export(checkpoint, out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", nargs=2, type=Path, metavar=("CHECKPOINT", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["B/16", "L/16"], help="sizes of the ViT")
    arguments = parser.parse_args()
    if arguments.export:
        print(export_memory(*arguments.export))
        return
    print("| | weights | checkpoint | memory of the export | relative to the weights |\n|---|---|---|---|---|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            checkpoint = Path(name) / "step-00000001"
            checkpoint.mkdir()
            weights, whole = save(checkpoint, size)
            command = [sys.executable, __file__, "--export", checkpoint, Path(name) / "out"]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(
            f"| {size} | {weights / 1e9:.2f} GB | {whole / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {peak / weights:.1f}x |"
        )


if __name__ == "__main__":
    main()
