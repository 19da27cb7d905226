"""How long training stands still for a checkpoint: ours beside DeepSpeed's and torch's asynchronous one.

    python benchmarks/save_stall.py                     # a ViT of 22 M parameters, one rank, about two minutes

Each save is of the same engine: weights and both moments, fp32. What is timed is the call, and, for the asynchronous
ones, what the next steps take while the writing goes on. Methods take turns; medians of the rounds.
"""

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.save import Saver
from pretrain.config import EngineConfig, ModelConfig, OptimizerConfig
from pretrain.engine import build_engine, start_distributed
from pretrain.model.vit import ViT

STEPS_BETWEEN = 3


class Objective(nn.Module):
    """Something to train."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = ViT(config)

    def forward(self, images: Tensor) -> Tensor:
        loss: Tensor = self.encoder(images)[:, 0].square().mean()
        return loss


def state_of(engine: Any) -> dict[str, Tensor]:
    """Return what all three save: weights and moments, by name."""
    flat = engine.optimizer.single_partition_of_fp32_groups
    state = {f"weight {i}": tensor.detach() for i, tensor in enumerate(flat)}
    for i, tensor in enumerate(flat):
        moments = engine.optimizer.optimizer.state[tensor]
        state |= {f"{kind} {i}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start_distributed()
    model = ModelConfig(
        hidden_size=arguments.hidden_size,
        num_hidden_layers=12,
        num_attention_heads=arguments.hidden_size // 64,
        image_size=64,
    )
    config = EngineConfig(zero_stage=1, precision="fp32", global_batch_size=2, micro_batch_size=2)
    engine = build_engine(Objective(model), config, OptimizerConfig())
    device_images = torch.randn(2, 3, 64, 64, device=engine.device)

    def step() -> None:
        engine.backward(engine(device_images))
        engine.step()

    step()
    num_bytes = sum(tensor.numel() * 4 for tensor in state_of(engine).values())
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        saver = Saver(work / "ours", keep_last=1)
        manifest = Manifest(0, 0, 1, "", [], {}, None)
        gloo = dist.new_group(backend="gloo")

        def ours(number: int) -> Callable[[], object]:
            saver.begin(engine, Manifest(**{**vars(manifest), "step": number}))
            return saver.finish

        def deepspeed(number: int) -> Callable[[], object]:
            engine.save_checkpoint(str(work / "deepspeed"), tag=f"step-{number}")
            return lambda: shutil.rmtree(work / "deepspeed")

        def torch_async(number: int) -> Callable[[], object]:
            future = dcp.async_save(state_of(engine), checkpoint_id=work / "dcp" / str(number), process_group=gloo)

            def finish() -> None:
                getattr(future, "result", None) and future.result()
                shutil.rmtree(work / "dcp")

            return finish

        methods = {"ours": ours, "engine.save_checkpoint": deepspeed, "torch dcp.async_save": torch_async}
        stalls: dict[str, list[float]] = {name: [] for name in methods}
        totals: dict[str, list[float]] = {name: [] for name in methods}
        steps: dict[str, list[float]] = {name: [] for name in [*methods, "no save"]}
        for number in range(1, arguments.rounds + 2):
            steps["no save"].append(_timed(lambda: [step() for _ in range(STEPS_BETWEEN)]))
            for method, save in methods.items():
                os.sync()
                started = time.perf_counter()
                finish = save(number)
                stall = time.perf_counter() - started
                steps[method].append(_timed(lambda: [step() for _ in range(STEPS_BETWEEN)]))
                finish()
                totals[method].append(time.perf_counter() - started)
                stalls[method].append(stall)
        saver.finish()
    print(f"{num_bytes / 1e6:.0f} MB, {arguments.rounds} rounds after one that is not counted")
    plain = statistics.median(steps["no save"][1:])
    own = statistics.median(stalls["ours"][1:])
    print(
        "| | training stands still | ours is shorter by | the next steps take | on the disk after |\n|---|---|---|---|---|"
    )
    for method in methods:
        stall, total = statistics.median(stalls[method][1:]), statistics.median(totals[method][1:])
        after = statistics.median(steps[method][1:]) / plain
        print(f"| {method} | {stall * 1000:.0f} ms | {stall / own:.1f}x | {after:.2f} of usual | {total:.2f} s |")


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
