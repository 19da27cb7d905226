"""Measure how long training stalls for a checkpoint, compared with DeepSpeed's and torch's asynchronous checkpoints.

    python benchmarks/save_stall.py                     # a ViT with 22 M parameters, one rank, about two minutes

All methods save the same engine: fp32 weights and both moments. The benchmark times the call that saves, the
next training steps (during which asynchronous methods write), and the whole save. Methods alternate, and the median of
the rounds is reported.
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

STEPS_PER_SAVE = 3


class Objective(nn.Module):
    """Minimal objective: the mean square of the CLS features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = ViT(config)

    def forward(self, images: Tensor) -> Tensor:
        loss: Tensor = self.encoder(images)[:, 0].square().mean()
        return loss


def state_of(engine: Any) -> dict[str, Tensor]:
    """Return the weights and moments that all methods save, by name."""
    flat = engine.optimizer.single_partition_of_fp32_groups
    state = {f"weight {i}": tensor.detach() for i, tensor in enumerate(flat)}
    for i, tensor in enumerate(flat):
        moments = torch_optimizer(engine).state[tensor]
        state |= {f"{kind} {i}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
    return state


def build(hidden_size: int) -> Any:
    """Build an engine for a ViT with 12 layers and 64 channels per attention head."""
    model = ModelConfig(
        hidden_size=hidden_size, num_hidden_layers=12, num_attention_heads=hidden_size // 64, image_size=64
    )
    config = EngineConfig(zero_stage=1, precision="fp32", global_batch_size=2, micro_batch_size=2)
    return build_engine(Objective(model), config, OptimizerConfig())


def build_methods(engine: Any, work: Path) -> dict[str, Callable[[int], Callable[[], object]]]:
    """Return a function per method, which starts the save of a step and returns a function that waits for its end.

    Args:
        engine: Engine to save.
        work: Folder for the checkpoints.
    """
    saver = Saver(work / "ours", keep_last=1)
    gloo = dist.new_group(backend="gloo")

    def ours(step: int) -> Callable[[], object]:
        saver.begin(engine, Manifest(TrainState(step), 1, {"training": ""}, [], {}, None))
        return saver.finish

    def deepspeed(step: int) -> Callable[[], object]:
        engine.save_checkpoint(str(work / "deepspeed"), tag=f"step-{step}")
        return lambda: shutil.rmtree(work / "deepspeed")

    def torch_async(step: int) -> Callable[[], object]:
        future = dcp.async_save(state_of(engine), checkpoint_id=work / "dcp" / str(step), process_group=gloo)

        def finish() -> None:
            future.result()  # type: ignore[union-attr]
            shutil.rmtree(work / "dcp")

        return finish

    return {"ours": ours, "engine.save_checkpoint": deepspeed, "torch dcp.async_save": torch_async}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=384, help="hidden size of the ViT, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per method, after one that is not counted")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start_distributed()
    engine = build(arguments.hidden_size)
    images = torch.randn(2, 3, 64, 64, device=engine.device)

    def train() -> float:
        started = time.perf_counter()
        for _ in range(STEPS_PER_SAVE):
            engine.backward(engine(images))
            engine.step()
        return time.perf_counter() - started

    train()
    num_bytes = sum(tensor.numel() * 4 for tensor in state_of(engine).values())
    normal_seconds: list[float] = []
    measured: dict[str, list[tuple[float, float, float]]] = defaultdict(list)  # stall, next steps, all: in seconds
    with tempfile.TemporaryDirectory() as name:
        methods = build_methods(engine, Path(name))
        for step in range(arguments.rounds + 1):
            normal_seconds.append(train())
            for method, save in methods.items():
                os.sync()
                started = time.perf_counter()
                finish = save(step)
                stall = time.perf_counter() - started
                after = train()
                finish()
                measured[method].append((stall, after, time.perf_counter() - started))
    print(f"{num_bytes / 1e6:.0f} MB, {arguments.rounds} rounds after one that is not counted\n")
    print("| | training stalls for | relative to ours | duration of the next steps | written after |")
    print("|---|---|---|---|---|")
    medians = {
        name: [statistics.median(column) for column in zip(*rows[1:], strict=True)] for name, rows in measured.items()
    }
    normal = statistics.median(normal_seconds[1:])
    for method, (stall, after, total) in medians.items():
        ratio = stall / medians["ours"][0]
        print(f"| {method} | {stall * 1000:.0f} ms | {ratio:.1f}x | {after / normal:.2f} of normal | {total:.2f} s |")


if __name__ == "__main__":
    main()
