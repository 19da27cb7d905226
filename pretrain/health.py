"""Is a step fit to be taken? One small reduction a step asks all ranks, and a bad step moves no weight.

All is judged on the device, so that the host need not wait: it hears of a step while the next one is under way.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.config import HealthConfig
from pretrain.journal import Journal

SKIPPED_FILE = "skipped.jsonl"
WINDOW = 128  # steps that say what is usual
FEWEST_STEPS = 32  # nothing is called a spike before that
LEAST_SPREAD = 0.05  # of the median: what hardly varies may still vary that much


class Verdict(NamedTuple):
    """What all ranks together know of a step."""

    step: int  # counted from 0
    first_sample: int
    skipped: bool
    loss: float
    grad_norm: float
    loss_limit: float
    grad_norm_limit: float
    stop: bool  # some rank was asked to
    save_failed: bool  # on some rank

    @property
    def reason(self) -> str:
        """Say why the step was skipped."""
        for name, value, limit in (
            ("loss", self.loss, self.loss_limit),
            ("gradient's norm", self.grad_norm, self.grad_norm_limit),
        ):
            if not value < float("inf"):
                return f"the {name} is {value}"
            if value > limit:
                return f"the {name} is {value:.4g}, usual is at most {limit:.4g}"
        return "nothing"


@dataclass
class _Record:
    """A step's numbers on their way to the host."""

    step: int
    first_sample: int
    values: Tensor
    copied: "torch.cuda.Event | None"


class Health:
    """Judges every step. All ranks call the same methods in the same order and come to the same verdict.

    Args:
        config: from when on a value is a spike.
        device: that trains.
        usual: what `state` returned when the run was saved.
    """

    def __init__(self, config: HealthConfig, device: torch.device, usual: list[list[float]] | None = None) -> None:
        self.threshold = config.spike_threshold
        self.device = device
        self._usual = torch.full((2, WINDOW), torch.nan, dtype=torch.float64, device=device)  # losses and norms
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        if usual and usual[0]:
            known = torch.tensor(usual, dtype=torch.float64, device=device)
            self._usual[:, : known.shape[1]] = known
            self._count += known.shape[1]
        self._met = torch.zeros(4, dtype=torch.float64, device=device)  # what `meet` has summed up
        self._bad: Tensor | None = None
        self._values = torch.zeros(8, dtype=torch.float64, device=device)
        self._waiting: _Record | None = None

    def meet(self, loss: Tensor, samples: int, *, stop: bool, save_failed: bool = False) -> None:
        """Meet all ranks, after the last backward of a step and before anything moves.

        Args:
            loss: this rank's mean over the step, a scalar.
            samples: where in the run the step began.
            stop: whether this rank was asked to stop.
            save_failed: whether this rank's part of the save under way has failed.
        """
        flags = [float(stop), float(save_failed), float(samples)]
        own = torch.tensor(flags, dtype=torch.float64, device=self.device)
        total = distributed.sum_over_ranks(torch.cat([loss.detach().double()[None], own]))
        self._met = total / distributed.world_size()
        self._bad = None

    def judge(self, grad_norm: Tensor) -> Tensor:
        """Return 1 where this step must move nothing, else 0: a scalar on the device."""
        if self._bad is None:
            seen = torch.stack([self._met[0], grad_norm.to(self.device).double()])
            median = self._usual.nanmedian(dim=1).values
            spread = 1.4826 * (self._usual - median[:, None]).abs().nanmedian(dim=1).values
            limit = median + self.threshold * torch.maximum(spread, LEAST_SPREAD * median.abs())
            limit = torch.where((self._count >= FEWEST_STEPS) & (self.threshold > 0), limit, torch.inf)
            bad = ~(seen < limit).all()  # a comparison with NaN is false
            place = self._count % WINDOW
            self._usual[:, place] = torch.where(bad, self._usual[:, place], seen)
            self._count += ~bad
            self._bad = bad.float()
            self._values = torch.cat([self._bad[None].double(), seen, limit, self._met[1:]])
        return self._bad

    @property
    def bad(self) -> Tensor:
        """The verdict on the step that has just ended: 1 where it was skipped, a scalar on the device."""
        assert self._bad is not None
        return self._bad

    def close(self, grad_norm: Tensor, step: int, samples: int) -> Verdict | None:
        """End a step; return the verdict on the one before it, if there was one."""
        self.judge(grad_norm)
        before = self.flush()
        copied = None
        values = self._values
        if self.device.type == "cuda":
            values = torch.empty(len(values), dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._waiting = _Record(step, samples, values, copied)
        return before

    def flush(self) -> Verdict | None:
        """Return the verdict that is still on its way."""
        record, self._waiting = self._waiting, None
        if record is None:
            return None
        if record.copied is not None:
            record.copied.synchronize()
        bad, loss, norm, loss_limit, norm_limit, stop, save_failed, cursor = record.values.tolist()
        if cursor != record.first_sample:
            raise RuntimeError(f"step {record.step}: the ranks are not at the same samples of the run")
        return Verdict(
            record.step,
            record.first_sample,
            bool(bad),
            loss,
            norm,
            loss_limit,
            norm_limit,
            stop=stop > 0,
            save_failed=save_failed > 0,
        )

    def state(self) -> list[list[float]]:
        """Return what is usual by now: losses and norms, oldest first."""
        count = int(self._count)
        oldest_first = torch.roll(self._usual, -(count % WINDOW), dims=1) if count > WINDOW else self._usual
        usual: list[list[float]] = oldest_first[:, :count].tolist()
        return usual


class Ledger:
    """The steps that were skipped, for a person to look at.

    Args:
        path: of the ledger, one JSON object a line.
        resume_step: steps from here on belong to a past that did not last; they are taken out.
        writes: whether this rank writes the file.
    """

    def __init__(self, path: Path, resume_step: int, *, writes: bool) -> None:
        self.path = path
        self.journal = Journal(path, lambda row: row["step"] < resume_step, writes=writes)
        self.total = len(self.journal.kept)
        self.in_a_row: list[Verdict] = []

    def note(self, verdict: Verdict, keys: Iterable[tuple[str, str]]) -> None:
        """Note a step; `keys` are the samples it was made of, by shard, and are asked for only if it was skipped."""
        if not verdict.skipped:
            self.in_a_row.clear()
            return
        self.in_a_row.append(verdict)
        self.total += 1
        if self.journal.writes:
            row = {"step": verdict.step, "reason": verdict.reason, "first_sample": verdict.first_sample}
            self.journal.add([row | {"loss": verdict.loss, "grad_norm": verdict.grad_norm, "samples": list(keys)}])
