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
from collections import defaultdict
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
from pretrain.engine.deepspeed import build_engine, start_distributed
from pretrain.engine.protocol import torch_optimizer
from pretrain.model.vit import ViT
from pretrain.state import TrainState

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
        moments = torch_optimizer(engine).state[tensor]
        state |= {f"{kind} {i}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
    return state


def build(hidden_size: int) -> Any:
    """Build an engine over a ViT that fits any disk."""
    model = ModelConfig(
        hidden_size=hidden_size, num_hidden_layers=12, num_attention_heads=hidden_size // 64, image_size=64
    )
    config = EngineConfig(zero_stage=1, precision="fp32", global_batch_size=2, micro_batch_size=2)
    return build_engine(Objective(model), config, OptimizerConfig())


def methods_over(engine: Any, work: Path) -> dict[str, Callable[[int], Callable[[], object]]]:
    """Return the ways to save: each begins a save under a number and returns what waits for its end."""
    saver = Saver(work / "ours", keep_last=1)
    gloo = dist.new_group(backend="gloo")

    def ours(number: int) -> Callable[[], object]:
        saver.begin(engine, Manifest(TrainState(number), 1, {"training": ""}, [], {}, None))
        return saver.finish

    def deepspeed(number: int) -> Callable[[], object]:
        engine.save_checkpoint(str(work / "deepspeed"), tag=f"step-{number}")
        return lambda: shutil.rmtree(work / "deepspeed")

    def torch_async(number: int) -> Callable[[], object]:
        future = dcp.async_save(state_of(engine), checkpoint_id=work / "dcp" / str(number), process_group=gloo)

        def finish() -> None:
            future.result()  # type: ignore[union-attr]
            shutil.rmtree(work / "dcp")

        return finish

    return {"ours": ours, "engine.save_checkpoint": deepspeed, "torch dcp.async_save": torch_async}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start_distributed()
    engine = build(arguments.hidden_size)
    images = torch.randn(2, 3, 64, 64, device=engine.device)

    def steps() -> float:
        started = time.perf_counter()
        for _ in range(STEPS_BETWEEN):
            engine.backward(engine(images))
            engine.step()
        return time.perf_counter() - started

    steps()
    num_bytes = sum(tensor.numel() * 4 for tensor in state_of(engine).values())
    plain: list[float] = []
    seen: dict[str, list[tuple[float, float, float]]] = defaultdict(list)  # stall, steps, whole
    with tempfile.TemporaryDirectory() as name:
        methods = methods_over(engine, Path(name))
        for number in range(arguments.rounds + 1):
            plain.append(steps())
            for method, save in methods.items():
                os.sync()
                started = time.perf_counter()
                finish = save(number)
                stall = time.perf_counter() - started
                after = steps()
                finish()
                seen[method].append((stall, after, time.perf_counter() - started))
    print(f"{num_bytes / 1e6:.0f} MB, {arguments.rounds} rounds after one that is not counted\n")
    print("| | training stands still | of ours | the next steps take | written after |\n|---|---|---|---|---|")
    medians = {
        name: [statistics.median(column) for column in zip(*rows[1:], strict=True)] for name, rows in seen.items()
    }
    usual = statistics.median(plain[1:])
    for method, (stall, after, whole) in medians.items():
        ratio = stall / medians["ours"][0]
        print(f"| {method} | {stall * 1000:.0f} ms | {ratio:.1f}x | {after / usual:.2f} of usual | {whole:.2f} s |")


if __name__ == "__main__":
    main()
