"""Train tiny models and write their losses; the checks in right.py compare those of the CPU with those of the GPU.

python -m benchmarks.gpu.losses --recipe tiny.yaml --out losses.json --only supervised mae
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import runs
from launch.quiet import hide_warnings
from pretrain import distributed
from pretrain.engine.deepspeed import start_distributed
from pretrain.optimizers.muon import orthogonalize

SETTINGS = {
    "supervised": [*runs.OBJECTIVES["supervised"], *runs.OPTIMIZERS["adamw"]],
    "lamb": [*runs.OBJECTIVES["supervised"], *runs.OPTIMIZERS["lamb"]],
    "muon": [*runs.OBJECTIVES["supervised"], *runs.OPTIMIZERS["muon"]],
    "mae": runs.OBJECTIVES["mae"],
    "self_distillation": runs.OBJECTIVES["self_distillation"],
}


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute in fp32 what a GPU would compute in TF32 or, for Muon, in bf16."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False

    def orthogonalize_in_fp32(matrices: Tensor, precision: torch.dtype) -> Tensor:
        return orthogonalize(matrices, torch.float32)

    with mock.patch("pretrain.optimizers.muon.orthogonalize", orthogonalize_in_fp32):
        yield


def train(recipe: Path, run_dir: Path, overrides: list[str]) -> list[float]:
    """Train one setting in fp32; return the loss of each step (collective)."""
    with exact_products():
        return runs.losses(runs.train(runs.load(recipe, run_dir, *overrides)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="recipe of the tiny model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the losses by setting")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to train")
    options = parser.parse_args()
    hide_warnings()
    start_distributed()
    work = options.out.with_suffix("")
    found = {name: train(options.recipe, work / name, SETTINGS[name]) for name in options.only}
    options.out.write_text(json.dumps(found), encoding="utf-8")
    distributed.leave_process_group()


if __name__ == "__main__":
    main()
