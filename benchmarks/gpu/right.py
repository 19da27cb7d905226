"""Compare a tiny fp32 model on the GPU with the CPU, and check what must be exact on any device.

- The losses of eight steps, at each ZeRO stage and with each optimizer and objective, equal those of the CPU.
- A batch whose loss is NaN moves neither a weight nor a moment of the optimizer.
- A run that resumes from a checkpoint, at the same stage or at another one, continues with the same losses.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import losses, runs
from benchmarks.gpu.checks import Check, Task, judge
from benchmarks.gpu.group import Place, run_group
from pretrain import distributed
from pretrain.engine.deepspeed import start_distributed
from pretrain.engine.partitions import local_fragments
from pretrain.journal import read_rows
from pretrain.run import Run
from pretrain.train import take_step

# Relative. Kernels add up in another order, which is like rounding the weights in another way: on a CPU, random changes
# of the weights by 2e-7 move the losses of eight steps by at most 2e-7. TF32 would round by 5e-4.
CPU_TOLERANCE = 1e-5
# Relative. On a GPU the backward pass of attention adds up in an order that varies; on a CPU nothing varies.
RESUME_TOLERANCE = 1e-5
POISONED, STEPS, MIDDLE = 3, 8, 4  # steps; the poisoned one is counted from 0
OFFLOAD = ["engine.zero_stage=2", "engine.offload_optimizer=true"]
# Name -> setting of losses.py on the CPU, overrides on the GPU
COMPARED: dict[str, tuple[str, list[str]]] = {
    **{f"stage {stage}": ("supervised", [f"engine.zero_stage={stage}"]) for stage in range(4)},
    "offload": ("supervised", OFFLOAD),
    "lamb": ("lamb", []),
    "muon": ("muon", []),
    "muon, stage 3": ("muon", ["engine.zero_stage=3"]),
    "mae": ("mae", []),
    "self_distillation": ("self_distillation", []),
}
STAGES = {**{f"stage {stage}": [f"engine.zero_stage={stage}"] for stage in range(4)}, "offload": OFFLOAD}
REHEARSED = {"stage 1", "stage 3", "offload", "muon"}  # enough to execute every line


class Reference:
    """The losses on the CPU, which a process of its own computes meanwhile.

    Args:
        place: Where the group runs.
        recipe: Recipe of the tiny model.
        settings: Settings of losses.py to train.
    """

    def __init__(self, place: Place, recipe: Path, settings: Sequence[str]) -> None:
        self.out = place.work / "cpu.json"
        self._process: subprocess.Popen[bytes] | None = None
        if distributed.is_main():
            ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            variables = {name: value for name, value in os.environ.items() if name not in ranks}
            variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
            command = [sys.executable, "-m", "benchmarks.gpu.losses", "--recipe", str(recipe), "--out", str(self.out)]
            self._process = subprocess.Popen([*command, "--only", *settings], env=variables)

    def losses(self, setting: str) -> list[float]:
        """Return the losses of a setting, after waiting for all of them (collective)."""
        if self._process is not None and self._process.wait():
            raise RuntimeError(f"training on the CPU ended with exit code {self._process.returncode}")
        distributed.barrier()
        found: list[float] = json.loads(self.out.read_text(encoding="utf-8"))[setting]
        return found


def tasks(place: Place) -> dict[str, Task]:
    """Return all checks of the group by name."""
    start_distributed()
    recipe = runs.make_recipe(place.work)
    compared = {name: each for name, each in COMPARED.items() if place.on_gpu or name in REHEARSED}
    stages = {name: each for name, each in STAGES.items() if place.on_gpu or name in REHEARSED}
    reference = Reference(place, recipe, sorted({setting for setting, _ in compared.values()}))
    found = {
        f"NaN batch, {name}": Task(partial(skip_poisoned, place, recipe, overrides), 3)
        for name, overrides in stages.items()
    }
    found["resume"] = Task(partial(resume, place, recipe, stages), 10)
    found["resume, deterministic"] = Task(partial(resume_exactly, place, recipe), 6)
    found |= {
        f"losses, {name}": Task(partial(compare, place, recipe, reference, name), 3) for name in compared
    }  # last, because they wait for the CPU
    return found


def compare(place: Place, recipe: Path, reference: Reference, name: str) -> Check:
    """Compare the losses on this device with those on the CPU."""
    setting, overrides = COMPARED[name]
    run_dir = place.work / f"losses-{name.replace(', ', '-').replace(' ', '-')}"
    own = losses.train(recipe, run_dir, [*losses.SETTINGS[setting], *overrides])
    return judge_equal(own, reference.losses(setting), CPU_TOLERANCE)


def judge_equal(own: list[float], expected: list[float], tolerance: float) -> Check:
    """Judge the largest relative difference of two lists of losses."""
    if len(own) != len(expected) or not own:
        return judge(False, f"{len(own)} losses", f"{len(expected)} losses")
    largest = max(abs(a - b) / abs(b) for a, b in zip(own, expected, strict=True))
    return judge(largest <= tolerance, f"differ by {largest:.1e}", f"at most {tolerance:.0e}")


def skip_poisoned(place: Place, recipe: Path, overrides: list[str]) -> Check:
    """Train with one batch whose loss is NaN; check that its step moves nothing, and that the next one does."""
    name = "-".join(each.split(".")[1].replace("=", "-") for each in overrides)
    config = runs.load(recipe, place.work / f"nan-{name}", *losses.SETTINGS["supervised"], *overrides)
    states: dict[int, list[Tensor]] = {}

    def take(run: Run, *arguments: Any) -> Any:
        states[run.state.step] = copy_state(run)
        if run.state.step != POISONED:
            return take_step(run, *arguments)
        forward = type(run.objective).forward

        def poisoned(objective: Any, *inputs: Any, **options: Any) -> dict[str, Tensor]:
            found: dict[str, Tensor] = forward(objective, *inputs, **options)
            return {**found, "loss": found["loss"] * torch.nan}

        with mock.patch.object(type(run.objective), "forward", poisoned):
            return take_step(run, *arguments)

    with runs.around_steps(take):
        runs.train(config)
    moved = num_different(states[POISONED], states[POISONED + 1])
    goes_on = num_different(states[POISONED + 1], states[POISONED + 2]) > 0
    skipped = [row["step"] for row in read_rows(config.run_dir / "skipped.jsonl")]
    reason = "" if goes_on else "the step after it moved no weight either"
    holds = not moved and goes_on and skipped == [POISONED]
    return judge(holds, f"{moved} tensors moved, skipped {skipped}", f"0 moved, skipped [{POISONED}]", reason)


def copy_state(run: Run) -> list[Tensor]:
    """Return copies of all weights and moments that this rank holds, after waiting for the device."""
    fragments = local_fragments(run.engine)
    return [fragment.view(kind).clone() for fragment in fragments for kind in fragment.kinds]


def num_different(before: list[Tensor], after: list[Tensor]) -> int:
    """Return how many tensors differ in any bit."""
    return sum(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def resume(place: Place, recipe: Path, stages: dict[str, list[str]]) -> list[Check]:
    """Train at stage 2, and continue from the middle at each stage; compare the losses of the second half."""
    whole = train_with_checkpoint(place, recipe, "whole", ["engine.zero_stage=2"])
    results = []
    for name, overrides in {"the same stage": ["engine.zero_stage=2"], **stages}.items():
        own = continue_run(place, recipe, "whole", f"to {name}", overrides)
        result = judge_equal(own, whole[MIDDLE:], RESUME_TOLERANCE)
        results.append(Check(result.verdict, result.figure, result.limit, check=f", stage 2 to {name}"))
    return results


def resume_exactly(place: Place, recipe: Path) -> Check:
    """Resume with deterministic algorithms; the losses must be equal bit for bit."""
    deterministic = ["engine.zero_stage=1", "engine.deterministic=true"]
    try:
        whole = train_with_checkpoint(place, recipe, "deterministic", deterministic)
        own = continue_run(place, recipe, "deterministic", "deterministic again", deterministic)
    finally:
        torch.use_deterministic_algorithms(False)  # the config option switches it on for the whole process
    return judge_equal(own, whole[MIDDLE:], 0.0)


def train_with_checkpoint(place: Place, recipe: Path, name: str, overrides: list[str]) -> list[float]:
    """Train to the end with a checkpoint in the middle; return the losses."""
    settings = [*losses.SETTINGS["supervised"], *overrides, f"checkpoint.every_steps={MIDDLE}"]
    return losses.train(recipe, place.work / name, settings)


def continue_run(place: Place, recipe: Path, source: str, name: str, overrides: list[str]) -> list[float]:
    """Continue a run from its checkpoint in the middle, in another folder; return the losses from there on."""
    run_dir = place.work / name.replace(" ", "-")
    checkpoint = f"checkpoints/step-{MIDDLE:08d}"
    if distributed.is_main():
        shutil.copytree(place.work / source / checkpoint, run_dir / checkpoint)
    distributed.barrier()
    return losses.train(recipe, run_dir, [*losses.SETTINGS["supervised"], *overrides])


if __name__ == "__main__":
    run_group(__doc__, tasks)
