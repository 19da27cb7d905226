"""Record what training steps cost: time, memory, energy, kernels and host waits.

A loop calls `end_step` of a `StepActions` after each step, as the project's own loop does with its progress line.
"""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from benchmarks.counting import HostWaits
from pretrain.tracking.progress import ProgressLine

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def wait() -> None:
    """Wait until the device has done everything that was queued."""
    if ON_GPU:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Measurement:
    """Result of one contender in one round.

    Attributes:
        images_per_second: Training speed.
        peak_memory_gb: Peak memory in GB: allocated on the GPU, or resident on a CPU.
        step_milliseconds: Wall-clock time of a step.
        cpu_milliseconds_per_image: User time of all threads of the process.
        host_waits: Operation and place in the code of each wait of the host for the device in one step.
        operations: Operations that one step starts, where a foreach or fused one counts once. Under it, torch.compile
            runs its modules eagerly, so that they count as if they were not compiled.
        kernels: Kernels that one step starts on the GPU; None on a CPU.
        joules_per_image: Energy of the GPU; None if it does not tell.
    """

    images_per_second: float
    peak_memory_gb: float
    step_milliseconds: float
    cpu_milliseconds_per_image: float
    host_waits: list[str]
    operations: int
    kernels: int | None
    joules_per_image: float | None


class StepActions(ProgressLine):
    """A silent progress line that does something after certain steps.

    Args:
        total_steps: Number of steps of the loop.
        actions: What to do after a step, by the number of steps taken.
    """

    def __init__(self, total_steps: int, actions: Mapping[int, Callable[[], None]]) -> None:
        super().__init__(total_steps, 0, enabled=False)
        self.actions = actions
        self.num_steps = 0

    def end_step(self) -> None:
        """Count a step and do what is due after it."""
        self.num_steps += 1
        if action := self.actions.get(self.num_steps):
            action()


@dataclass(frozen=True)
class Reading:
    """Clocks and counters at one moment.

    Attributes:
        seconds: Wall-clock time.
        user_seconds: User time of all threads of the process.
        joules: Energy that the GPU has used; None if it does not tell.
    """

    seconds: float
    user_seconds: float
    joules: float | None


class Recorder(StepActions):
    """Records `steps` steps after `warmup` others, and counts the operations of two later ones.

    The host waits for the device after the first and the last recorded step only. The loop takes one step more, so that
    what happens at its end is not recorded.

    Args:
        images: Number of images per step.
        steps: Number of recorded steps.
        warmup: Number of steps before them, at least 1: the first step writes a row of metrics.
    """

    def __init__(self, images: int, steps: int, warmup: int) -> None:
        end = warmup + steps
        actions = {warmup: self._start, end: self._stop, end + 1: self._count_kernels, end + 2: self._stop_counting}
        super().__init__(end + 3, actions)
        self.images = images * steps
        self.steps = steps
        self.readings: list[Reading] = []
        self.peak_memory = 0.0
        self.operations = HostWaits()
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA]) if ON_GPU else None

    def measurement(self) -> Measurement:
        """Return what was recorded, once the loop has ended."""
        first, last = self.readings
        seconds, joules = last.seconds - first.seconds, None
        if first.joules is not None and last.joules is not None:
            joules = (last.joules - first.joules) / self.images
        return Measurement(
            images_per_second=self.images / seconds,
            peak_memory_gb=self.peak_memory / 1e9,
            step_milliseconds=1e3 * seconds / self.steps,
            cpu_milliseconds_per_image=1e3 * (last.user_seconds - first.user_seconds) / self.images,
            host_waits=self.operations.waits,
            operations=self.operations.num_operations,
            kernels=None if self.profiler is None else sum(map(is_kernel, self.profiler.events() or [])),
            joules_per_image=joules,
        )

    def _start(self) -> None:
        self.readings.append(read())

    def _stop(self) -> None:
        self.readings.append(read())
        self.peak_memory = peak_memory()
        self.operations.__enter__()

    def _count_kernels(self) -> None:
        self.operations.__exit__(None, None, None)
        if self.profiler is not None:
            wait()
            self.profiler.start()

    def _stop_counting(self) -> None:
        if self.profiler is not None:
            wait()
            self.profiler.stop()


def read() -> Reading:
    """Wait for the device and read all clocks."""
    wait()
    return Reading(time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime, joules_used())


def joules_used() -> float | None:
    """Return the energy in joules that the GPU has used since its driver was loaded; None if it does not tell."""
    if not ON_GPU:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid))) / 1e3
    except Exception:  # without the package, its library or the right to ask there is no such column
        return None


def peak_memory() -> float:
    """Return the highest use of memory so far in bytes: allocated on the GPU, or resident on a CPU."""
    if ON_GPU:
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def is_kernel(event: FunctionEvent) -> bool:
    """Return whether an event of the profiler is a kernel on the GPU, rather than a copy or a fill."""
    return event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
