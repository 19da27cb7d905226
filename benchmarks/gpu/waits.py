"""Train each objective with each optimizer while a wait of the host for the GPU is an error.

In steps 5 to 15 of the real loop, `torch.cuda.set_sync_debug_mode("error")` is set and `torch.cuda.synchronize` raises.
Waiting for an event is allowed, which the loop does for the result of the step before. In a rehearsal on a CPU the
waits are counted by `HostWaits`.
"""

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast
from unittest import mock

import torch

from benchmarks.counting import HostWaits
from benchmarks.gpu import runs
from benchmarks.gpu.checks import Check, Task, judge
from benchmarks.gpu.group import Place, run_group
from pretrain.engine.deepspeed import start_distributed
from pretrain.run import Run
from pretrain.steps import Batches
from pretrain.train import take_step

FIRST, LAST = 5, 15  # steps without waits, counted from 1
ROOT = str(Path(__file__).resolve().parents[2])
RESULT_OF_LAST_STEP = "copy to the host in pretrain/health.py:flush"
# At stage 3, DeepSpeed also reads a number that is on the host anyway.
NUMBER_ON_HOST = "aten._local_scalar_dense.default in pretrain/train.py:take_step"
RICH = [  # what has waited or scattered before: random augmentation and paths
    "objective={label_smoothing: 0.1, augment: {crop_scale: [0.5, 1.0], mixup: 0.8, cutmix: 1.0, "
    "rand_augment_ops: 2, erasing: 0.25}}",
    "model.drop_path=0.3",
]
PATHS = ["model.drop_path=0.3"]
OBJECTIVES = {
    "supervised": RICH,
    "mae": [*runs.OBJECTIVES["mae"], *PATHS],
    "self_distillation": [*runs.OBJECTIVES["self_distillation"], *PATHS],
}
BF16 = "engine.precision=bf16"


def tasks(place: Place) -> dict[str, Task]:
    """Return a check for each objective, optimizer, stage and precision."""
    start_distributed()
    recipe = runs.make_recipe(place.work)
    settings = {
        f"{objective}, {optimizer}, bf16": [*OBJECTIVES[objective], *runs.OPTIMIZERS[optimizer], BF16]
        for i, objective in enumerate(OBJECTIVES)
        for j, optimizer in enumerate(runs.OPTIMIZERS)
        if place.on_gpu or i == j  # each of them once is enough for a rehearsal
    }
    if place.on_gpu:
        settings |= {
            "supervised, stage 2, bf16": [*RICH, BF16, "engine.zero_stage=2"],
            "supervised, stage 0, fp32": [*RICH, "engine.zero_stage=0"],
            "mae, stage 1, fp32": OBJECTIVES["mae"],
            "supervised, compiled, bf16": [*RICH, BF16, "engine.compile=true"],
        }
    checks = {name: Task(partial(find_waits, place, recipe, name, each), 3) for name, each in settings.items()}
    checks["supervised, stage 3, bf16"] = Task(partial(list_waits_at_stage_3, place, recipe), 3)
    return checks


def find_waits(place: Place, recipe: Path, name: str, overrides: list[str]) -> Check:
    """Train, and check that the host waits for nothing but the result of the step before."""
    if place.on_gpu:
        train_watched(place, recipe, name, overrides, waits_are_errors())
        return judge(True, "0 waits", "0 waits")
    return judge_counted(count_waits(place, recipe, name, overrides), {RESULT_OF_LAST_STEP})


def judge_counted(waits: list[str], allowed: set[str]) -> Check:
    others = [wait for wait in waits if wait not in allowed]
    num_expected = len(allowed) * (LAST - FIRST + 1)
    is_counting = len(waits) - len(others) == num_expected  # otherwise the counter was blind, which must not pass
    reason = others[0] if others else "" if is_counting else f"{len(waits)} waits counted, {num_expected} expected"
    return judge(not others and is_counting, f"{len(others)} waits", "0 waits", reason)


def list_waits_at_stage_3(place: Place, recipe: Path) -> Check:
    """Train at stage 3, where DeepSpeed waits by itself; check that none of the waits is ours."""
    name, overrides = "stage 3", [*RICH, BF16, "engine.zero_stage=3"]
    if not place.on_gpu:
        return judge_counted(count_waits(place, recipe, name, overrides), {RESULT_OF_LAST_STEP, NUMBER_ON_HOST})
    places: list[str] = []
    train_watched(place, recipe, name, overrides, noting_waits(places))
    ours = [each for each in places if "deepspeed" not in each]
    rest = sorted({*places} - {*ours})
    figure = f"{len(ours)} of ours, {len(places) / (LAST - FIRST + 1):.1f} per step in all"
    return judge(not ours, figure, "0 of ours", f"ours: {ours[0]}" if ours else "; ".join(rest)[:300])


def train(place: Place, recipe: Path, name: str, overrides: list[str], take: Callable[..., Any]) -> None:
    """Train in the real loop some steps longer than the waits are watched, with `take` in place of `take_step`."""
    run_dir = place.work / name.replace(", ", "-").replace(" ", "-")
    steps = [f"schedule.total_steps={LAST + 2}", "logging.every_steps=1000"]
    with runs.around_steps(take):
        runs.train(runs.load(recipe, run_dir, *overrides, *steps))


def train_watched(
    place: Place, recipe: Path, name: str, overrides: list[str], watched: contextlib.AbstractContextManager[object]
) -> None:
    """Train; from the beginning of step 5 to the end of step 15, and between them, `watched` is entered."""
    with contextlib.ExitStack() as stack:

        def take(run: Run, *arguments: Any) -> Any:
            if run.state.step == FIRST - 1:
                stack.enter_context(watched)
            if run.state.step == LAST:
                stack.close()
            return take_step(run, *arguments)

        train(place, recipe, name, overrides, take)


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """Raise an error where the host waits for the GPU."""
    with mock.patch("torch.cuda.synchronize", refuse):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def refuse(*_: object) -> NoReturn:
    raise RuntimeError("torch.cuda.synchronize was called in a training step")


@contextlib.contextmanager
def noting_waits(places: list[str]) -> Iterator[None]:
    """Note for each wait the innermost line of the project or of DeepSpeed."""

    def note(*_: object, **__: object) -> None:
        frames = traceback.extract_stack()[:-1]
        known = [frame for frame in frames if frame.filename.startswith(ROOT) or "deepspeed" in frame.filename]
        where = known[-1] if known else frames[-1]
        places.append(f"{where.filename.removeprefix(f'{ROOT}/').split('site-packages/')[-1]}:{where.lineno}")

    with warnings.catch_warnings(), mock.patch("torch.cuda.synchronize", note):
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def count_waits(place: Place, recipe: Path, name: str, overrides: list[str]) -> list[str]:
    """Train on a CPU; return the waits in steps 5 to 15, without those of loading, which has no device to wait for."""
    counter = HostWaits()

    def take(run: Run, batches: Batches, *arguments: Any) -> Any:
        if not FIRST - 1 <= run.state.step < LAST:
            return take_step(run, batches, *arguments)
        micro_batches = [*batches.next_step(run.state.step)]
        loaded = SimpleNamespace(next_step=lambda step: micro_batches)
        with counter:
            return take_step(run, cast(Batches, loaded), *arguments)

    train(place, recipe, name, overrides, take)
    return counter.waits


if __name__ == "__main__":
    run_group(__doc__, tasks)
