"""Measure a training step beside other work, with OpenMP threads that spin while they wait and with threads that sleep.

Each attempt is a process of its own, because OpenMP reads `OMP_WAIT_POLICY` when torch is imported.
"""

import argparse
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

STEP = """
import sys, time
import torch
from pretrain.config import ModelConfig
from pretrain.model.vit import ViT
steps = int(sys.argv[1])
model = ViT(ModelConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=4, patch_size=4, image_size=32))
optimizer = torch.optim.AdamW(model.parameters())
images = torch.randn(32, 3, 32, 32)
for step in range(steps + 2):
    if step == 2:
        started = time.monotonic()
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()
print((time.monotonic() - started) / steps)
"""
POLICIES = ("active", "passive")


def measure(policy: str, num_loops: int, steps: int) -> float:
    """Return the mean seconds of a training step beside busy loops."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    with ExitStack() as stack:
        for _ in range(num_loops):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        command = [sys.executable, "-c", STEP, str(steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Print the median and the range of all attempts, for each policy, without and with other work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attempts", type=int, default=8, help="processes per row of the table")
    parser.add_argument("--steps", type=int, default=10, help="training steps per process")
    parser.add_argument("--loops", type=int, default=2, help="busy loops that run beside it")
    arguments = parser.parse_args()
    print("| threads | busy loops | seconds per step: median | lowest | highest |\n|---|---|---|---|---|")
    for num_loops in (0, arguments.loops):
        for policy in POLICIES:
            seconds = [measure(policy, num_loops, arguments.steps) for _ in range(arguments.attempts)]
            median = statistics.median(seconds)
            print(f"| {policy} | {num_loops} | {median:.2f} | {min(seconds):.2f} | {max(seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
