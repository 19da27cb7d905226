"""Count the kernels of an optimizer step and measure the host's time for it, with the 198 tensors of a narrow ViT-B/16.

The weights are so small that the arithmetic takes little of the time. They are either whole parameters, or joined in
one flat tensor per parameter group as ZeRO joins them. The time is that of the thread, without the waits for other
processes on a busy machine; set OMP_NUM_THREADS=1 so that it is all of the time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.counting import HostWaits
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.engine.ema import Ema
from pretrain.model.vit import ViT
from pretrain.optimizers import build_optimizer
from pretrain.optimizers.layer_decay import apply_layer_decay
from pretrain.optimizers.placement import Placement, Range

WARMUP_STEPS = 3


def build_step(
    name: str, layer_decay: float, decay: float, *, is_flat: bool, device: str = "cpu"
) -> Callable[[], None]:
    """Return a function that takes one optimizer step and updates the moving average.

    Args:
        name: Name of the optimizer.
        layer_decay: Layer-wise decay of the learning rate; 1 disables it.
        decay: Decay of the moving average; 0 disables it.
        is_flat: Whether to join the weights of each parameter group in one tensor.
        device: Device of the weights.
    """
    torch.manual_seed(0)
    model = ViT(ModelConfig(hidden_size=32, num_hidden_layers=12, num_attention_heads=4, patch_size=8, image_size=16))
    model.to(device)
    optimizer = build_optimizer(model, OptimizerConfig.model_validate({"name": name, "weight_decay": 0.05}))
    placement = join_groups(optimizer, model) if is_flat else Placement.unpartitioned(model.named_parameters())
    if name != "adamw":
        optimizer.bind(placement)  # type: ignore[attr-defined]
    if layer_decay < 1:
        apply_layer_decay(optimizer, placement, layer_decay)
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.randn_like(tensor)
    applied = torch.zeros((), device=device)
    optimizer.found_inf = applied  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.ones((), device=device)  # type: ignore[attr-defined]
    engine: Any = SimpleNamespace(optimizer=optimizer)
    ema = Ema(engine, decay)

    def step() -> None:
        optimizer.step()
        ema.update(10_000, applied)

    return step


def join_groups(optimizer: Optimizer, model: nn.Module) -> Placement:
    """Replace the weights of each parameter group by one flat tensor, and return where each of them is in it."""
    names = {parameter: (index, name) for index, (name, parameter) in enumerate(model.named_parameters())}
    ranges: dict[Tensor, list[Range]] = {}
    for group in optimizer.param_groups:
        flat = torch.cat([parameter.detach().flatten() for parameter in group["params"]])
        start, ranges[flat] = 0, []
        for parameter in group["params"]:
            ranges[flat].append(Range(names[parameter][0], 0, start, parameter.numel()))
            start += parameter.numel()
        group["params"] = [flat]
    return Placement([name for _, name in names.values()], [list(parameter.shape) for parameter in names], ranges)


def main() -> None:
    """Print one line per optimizer and layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="Steps to time; the median is printed.")
    steps = parser.parse_args().steps
    print(f"{'optimizer':<34}{'tensors':<9}{'kernels':>8}{'waits':>7}{'host ms':>9}")
    for is_flat in (False, True):
        for name in ("adamw", "lamb", "muon"):
            for layer_decay, decay, label in (
                (1.0, 0.0, ""),
                (0.65, 0.0, " + layer decay"),
                (1.0, 0.999, " + average"),
            ):
                step = build_step(name, layer_decay, decay, is_flat=is_flat)
                for _ in range(WARMUP_STEPS):
                    step()
                with HostWaits() as counted:
                    step()
                seconds = statistics.median(_time(step) for _ in range(steps))
                kind, waits = "flat" if is_flat else "whole", len(counted.waits)
                print(
                    f"{name + label:<34}{kind:<9}{counted.num_operations:>8}{waits:>7}{1000 * seconds:>9.2f}",
                    flush=True,
                )


def _time(step: Callable[[], None]) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start


if __name__ == "__main__":
    main()
