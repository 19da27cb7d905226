"""Detect steps whose loss or gradient norm is not finite or spikes, and skip their updates.

The decision is made on the device from one small all-reduce per step, so the host does not wait for it: it learns the
result of a step while the next one is running.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.config import HealthConfig
from pretrain.device_copies import HostCopy, to_device
from pretrain.journal import Journal

SKIPPED_FILE = "skipped.jsonl"
WINDOW_STEPS = 128  # applied steps that a new step is compared with
MIN_STEPS = 32  # applied steps before anything is called a spike
MIN_RELATIVE_SPREAD = 0.05  # of the median; a loss that hardly varies may still vary by this much
MAD_TO_STD = 1.4826  # a normal distribution's standard deviation divided by its median absolute deviation


class StepResult(NamedTuple):
    """Result of one optimizer step, the same on all ranks.

    Attributes:
        step: Number of the step, counted from 0.
        position: Position of the step's first sample in the run.
        is_skipped: Whether the update was skipped.
        loss: Mean loss over the global batch.
        grad_norm: Norm of the gradient before clipping.
        loss_limit: Loss from which on the step counts as a spike; infinite during the first steps.
        grad_norm_limit: Gradient norm from which on the step counts as a spike.
        stop_requested: Whether any rank was asked to stop.
        save_failed: Whether the checkpoint being written has failed on any rank.
    """

    step: int
    position: int
    is_skipped: bool
    loss: float
    grad_norm: float
    loss_limit: float
    grad_norm_limit: float
    stop_requested: bool
    save_failed: bool

    @property
    def reason(self) -> str:
        """Why the step was skipped, such as "the loss is nan"; empty if it was not."""
        for name, value, limit in (
            ("loss", self.loss, self.loss_limit),
            ("gradient norm", self.grad_norm, self.grad_norm_limit),
        ):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            if value >= limit:
                return f"the {name} of {value:.4g} is above the limit of {limit:.4g}"
        return ""


class _PendingResult(NamedTuple):
    """Values of a step that are being copied from the device to the host."""

    step: int
    position: int
    values: HostCopy


class Health:
    """Decide for each step whether its update may be applied.

    The decision is made on the device and is identical on all ranks, so every rank must call the same methods in the
    same order: `judge` after the last backward pass and before the update, and `end_step` after it.

    Args:
        config: Threshold for spikes.
        device: Training device.
        spike_window: Recent losses and gradient norms from a checkpoint, or None for a new run.

    Attributes:
        skipped: 1 if the update of the latest step is skipped, else 0: an fp32 scalar on the device.
        grad_norm: Norm of the latest step's gradient over all ranks, before clipping: an fp32 scalar on the device.
    """

    def __init__(
        self, config: HealthConfig, device: torch.device, spike_window: list[list[float]] | None = None
    ) -> None:
        self.threshold = config.spike_threshold
        self.device = device
        self.skipped = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.reset(spike_window)

    def reset(self, spike_window: list[list[float]] | None = None) -> None:
        """Forget all steps, and compare the next ones with the losses and gradient norms of `spike_window`."""
        self._window = torch.full((2, WINDOW_STEPS), torch.nan, dtype=torch.float64, device=self.device)
        self._num_applied = torch.zeros((), dtype=torch.int64, device=self.device)
        if spike_window and spike_window[0]:
            known = torch.tensor(spike_window, dtype=torch.float64, device=self.device)
            self._window[:, : known.shape[1]] = known
            self._num_applied += known.shape[1]
        self._judged: HostCopy | None = None
        self._pending: _PendingResult | None = None

    def judge(
        self, loss: Tensor, squared_norm: Tensor, position: int, *, stop_requested: bool, save_failed: bool = False
    ) -> None:
        """All-reduce the loss, the gradient norm and the flags of a step, and decide whether to skip it (collective).

        It sets `skipped` and `grad_norm`. A value is a spike if it exceeds the median of the window by more than
        `spike_threshold` standard deviations, which are estimated from the median absolute deviation.

        Args:
            loss: This rank's mean loss over the step, a scalar on the device.
            squared_norm: This rank's share of the gradient's squared norm, a scalar on the device; the shares add up.
            position: Position of the step's first sample in the run.
            stop_requested: Whether this rank was asked to stop.
            save_failed: Whether this rank's part of the checkpoint being written has failed.
        """
        flags = to_device([float(stop_requested), float(save_failed), float(position)], self.device)
        own = torch.cat([torch.stack([loss.detach().double(), squared_norm.double()]), flags])
        total = distributed.sum_over_ranks(own)
        means = total / distributed.world_size()
        grad_norm = total[1].sqrt()
        seen = torch.stack([means[0], grad_norm])
        limit = self._limits()
        is_bad = ~(seen < limit).all()  # a comparison with NaN is false
        self._add_to_window(seen, is_bad)
        self.skipped, self.grad_norm = is_bad.float(), grad_norm.float()
        self._judged = HostCopy(torch.cat([self.skipped[None].double(), seen, limit, means[2:]]))

    def _limits(self) -> Tensor:
        """Return the loss and the gradient norm from which on a step is a spike, [2]."""
        median = _nanmedian(self._window)
        spread = MAD_TO_STD * _nanmedian((self._window - median[:, None]).abs())
        limit = median + self.threshold * torch.maximum(spread, MIN_RELATIVE_SPREAD * median.abs())
        return torch.where((self._num_applied >= MIN_STEPS) & (self.threshold > 0), limit, torch.inf)

    def _add_to_window(self, seen: Tensor, is_bad: Tensor) -> None:
        """Add the loss and the gradient norm of a step, [2], to the window, unless the step is skipped."""
        # As an index in brackets, a number on the device would be copied to the host, which would wait for it.
        column = (self._num_applied % WINDOW_STEPS)[None]
        kept = torch.where(is_bad, self._window.index_select(1, column), seen[:, None])
        self._window.index_copy_(1, column, kept)
        self._num_applied += ~is_bad

    def end_step(self, step: int, position: int) -> StepResult | None:
        """Count a step that was judged; return the result of the step before, if there was one.

        Args:
            step: Number of the step, counted from 0.
            position: Position of the step's first sample in the run.
        """
        assert self._judged is not None
        previous = self.flush()
        self._pending, self._judged = _PendingResult(step, position, self._judged), None
        return previous

    def flush(self) -> StepResult | None:
        """Return the result of the last step if it was not returned yet.

        Raises:
            RuntimeError: If the ranks are not at the same position.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        skipped, loss, norm, loss_limit, norm_limit, stop, save_failed, mean_position = pending.values.read().tolist()
        if mean_position != pending.position:
            raise RuntimeError(f"step {pending.step}: the ranks are not at the same position of the run")
        return StepResult(
            pending.step,
            pending.position,
            bool(skipped),
            loss,
            norm,
            loss_limit,
            norm_limit,
            stop_requested=stop > 0,
            save_failed=save_failed > 0,
        )

    def spike_window(self) -> list[list[float]]:
        """Return the recent losses and gradient norms of applied steps, oldest first, to be saved in a checkpoint."""
        count = int(self._num_applied)
        shift = -(count % WINDOW_STEPS)
        oldest_first = torch.roll(self._window, shift, dims=1) if count > WINDOW_STEPS else self._window
        window: list[list[float]] = oldest_first[:, :count].tolist()
        return window


def _nanmedian(values: Tensor) -> Tensor:
    """Return the median of each row, [rows], without NaN. `torch.nanmedian` has no deterministic variant on GPUs."""
    ordered = values.sort(dim=1).values  # NaN comes last
    count = (~values.isnan()).sum(dim=1, keepdim=True)
    return ordered.gather(1, ((count - 1) // 2).clamp(min=0))[:, 0]


class SkippedSteps:
    """The skipped steps of a run, and the file that lists them with their samples.

    Args:
        path: File to write, one JSON object per line.
        resume_step: Number of steps that the resumed checkpoint has; later rows are removed from the file.
        writes: Whether this rank writes the file.

    Attributes:
        total: Number of skipped steps.
        consecutive: Results of the latest steps if they were all skipped; empty after an applied step.
    """

    def __init__(self, path: Path, resume_step: int, *, writes: bool) -> None:
        self.path = path
        self.journal = Journal(path, lambda row: row["step"] < resume_step, writes=writes)
        self.total = len(self.journal.kept)
        self.consecutive: list[StepResult] = []

    def record(self, result: StepResult, samples: Iterable[tuple[str, str]]) -> None:
        """Record the result of a step.

        Args:
            result: Result of the step.
            samples: Shard and key of each sample of the step; consumed only if the step was skipped.
        """
        if not result.is_skipped:
            self.consecutive.clear()
            return
        self.consecutive.append(result)
        self.total += 1
        if self.journal.writes:
            row = {"step": result.step, "reason": result.reason, "position": result.position}
            self.journal.add([row | {"loss": result.loss, "grad_norm": result.grad_norm, "samples": list(samples)}])

    def forget_consecutive(self) -> None:
        """Start counting consecutive steps again, after a rollback."""
        self.consecutive.clear()
