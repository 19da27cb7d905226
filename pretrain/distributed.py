"""Rank, world and reductions; the same calls do nothing when alone.

Ranks come from the environment, which the deepspeed launcher, torchrun and accelerate all set.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import MachineError, UserError

Result = TypeVar("Result")

WRONG_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def rank() -> int:
    """Return this process's number among all."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Say whether this process writes the run's files."""
    return rank() == 0


def device() -> torch.device:
    """Return the device this process trains on."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of every rank's `values`, on every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def is_true_anywhere(value: bool) -> bool:
    """Say, on every rank, whether any rank's `value` is true."""
    return bool(sum_over_ranks(torch.tensor(float(value), device=device())) > 0)


def gather(value: Result) -> list[Result]:
    """Return every rank's value, on every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values: list[Result] = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values
    return [value]


class _GatheredRows(torch.autograd.Function):
    """Every rank's rows one after the other; what another rank makes of mine comes back as gradient."""

    @staticmethod
    def forward(context: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        context.first, context.own = sum(sizes[: rank()]), len(rows)
        everyone = rows.new_zeros(sum(sizes), *rows.shape[1:])
        everyone[context.first : context.first + context.own] = rows
        return sum_over_ranks(everyone)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(gradient)[context.first : context.first + context.own], None


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Return every rank's rows, one after the other, and where this rank's own begin; gradients flow to all ranks.

    Args:
        rows: [B, ...]; each rank may have another B.
    """
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    sizes[rank()] = len(rows)
    counts = sum_over_ranks(sizes).tolist()
    everyone: Tensor = _GatheredRows.apply(rows, counts)  # type: ignore[no-untyped-call]
    return everyone, sum(counts[: rank()])


def on_all_ranks(work: Callable[[], Result]) -> Result:
    """Do the work on every rank, which must not meet in it; when something stops any of them, raise that on all.

    Raises:
        UserError: a mistake; every rank's sentence, each once.
        MachineError: the same, where it was no mistake.
    """
    trouble: tuple[str, bool] | None = None
    try:
        result = work()
    except (UserError, MachineError, OSError) as error:
        is_mistake = isinstance(error, (UserError, *WRONG_PATHS)) and not isinstance(error, MachineError)
        trouble = str(error), is_mistake
    if found := {each: None for each in gather(trouble) if each is not None}:
        kind = UserError if all(is_mistake for _, is_mistake in found) else MachineError
        raise kind("\n".join(sentence for sentence, _ in found))
    return result


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite every rank's tensors by the main rank's."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def wait_for_all() -> None:
    """Return once every rank is here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Leave the process group after a barrier: gloo's threads may abort a process whose peers are gone."""
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()
