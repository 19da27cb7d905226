"""Ranks and collectives. In a process without a process group, the collectives return their input.

Ranks come from the environment variables that the deepspeed launcher, torchrun and accelerate all set. Every rank must
call the functions marked as collective, in the same order; otherwise the others wait forever.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import DataError, MachineError, RankError, UserError

Result = TypeVar("Result")

# Errors of the operating system that a wrong path or missing permission causes, so that the user can fix them.
PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def rank() -> int:
    """Return the number of this process among all processes, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Return whether a launcher has started this process as a rank, perhaps as the only one."""
    return "RANK" in os.environ


def ranks_on_this_machine() -> int:
    """Return the number of ranks on this machine, as far as the launcher tells it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_main() -> bool:
    """Return whether this is rank 0, which writes the run's files and prints its messages."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this rank: its GPU, or the CPU if there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on every rank (collective).

    Args:
        values: Tensor of the same shape on all ranks; it is not changed.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_over_ranks(value: bool) -> bool:
    """Return, on every rank, whether the value is true on at least one of them (collective)."""
    return bool(sum_over_ranks(torch.tensor(float(value), device=device())) > 0)


def gather(value: Result) -> list[Result]:
    """Return the values of all ranks, in the order of the ranks, on every rank (collective).

    Args:
        value: Value that can be pickled.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        values: list[Result] = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values
    return [value]


class _GatheredRows(torch.autograd.Function):
    """Gather rows from all ranks; the backward pass sums the gradients that the ranks have for the rows of each."""

    @staticmethod
    def forward(context: Any, rows: Tensor, largest: int) -> Tensor:
        context.own = slice(rank() * largest, rank() * largest + len(rows))
        everyone = rows.new_zeros(world_size() * largest, *rows.shape[1:])
        everyone[context.own] = rows
        dist.all_reduce(everyone)
        return everyone

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(gradient)[context.own], None


def gather_rows(rows: Tensor, largest: int) -> Tensor:
    """Concatenate the rows of all ranks (collective). Gradients flow back to the rank that each row comes from.

    The host does not wait for the device, because the caller knows the largest B. A rank with fewer rows adds zeros.

    Args:
        rows: Rows of this rank, [B, ...]; B may differ between ranks.
        largest: Largest B of all ranks, the same on every rank.

    Returns:
        The rows of all ranks, [ranks * largest, ...]. Those of rank r start at r * largest.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    everyone: Tensor = _GatheredRows.apply(rows, largest)  # type: ignore[no-untyped-call]
    return everyone


def on_all_ranks(work: Callable[[], Result]) -> Result:
    """Run a function on every rank, and raise an error on all ranks if it fails on any (collective).

    Without this, a rank that fails alone would leave the others waiting in their next collective.

    Args:
        work: Function to run. It must not use collectives.

    Returns:
        This rank's result.

    Raises:
        UserError: If all failures are the user's mistakes. The message has one line for each different failure.
        MachineError: If some failure is not.
    """
    failure: tuple[str, bool] | None = None
    try:
        result = work()
    except (UserError, MachineError, OSError) as error:
        is_mistake = isinstance(error, (UserError, *PATH_ERRORS)) and not isinstance(error, MachineError)
        failure = str(error), is_mistake
    if failures := {each: None for each in gather(failure) if each is not None}:
        kind = UserError if all(is_mistake for _, is_mistake in failures) else MachineError
        raise kind("\n".join(message for message, _ in failures))
    return result


def print_error(error: Exception) -> None:
    """Print the message of an error that ended the run.

    Every rank on which a DataError or a RankError occurred prints it, because it may come from a data worker of a
    single rank, or from a rank that the main rank cannot hear of. All other errors are raised on all ranks, and only
    the main rank prints them.
    """
    if isinstance(error, DataError):
        print(error.summary, file=sys.stderr, flush=True)
    elif is_main() or isinstance(error, RankError):
        print(error, file=sys.stderr, flush=True)


def while_others_wait(
    work: Callable[[Callable[[], None]], None] | None, on_progress: Callable[[], None] = lambda: None
) -> None:
    """Run long work on some ranks while the others wait, and raise its errors on all ranks (collective).

    A rank that waits in a collective fails after the timeout of the process group, by default ten minutes. Working
    ranks therefore report their progress, and every report is a short collective.

    Args:
        work: Function to run on this rank, or None if this rank only waits. It is given a function that it must call
            every few minutes, and it must not use collectives.
        on_progress: Function called on every rank after each report of progress.
    """

    def report_progress() -> None:
        any_over_ranks(True)
        on_progress()

    def work_then_wait() -> None:
        try:
            if work is not None:
                work(report_progress)
        finally:
            while any_over_ranks(False):
                on_progress()

    on_all_ranks(work_then_wait)


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors on every rank with those of rank 0 (collective).

    Args:
        tensors: Tensors of the same shapes, in the same order, on all ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait until every rank has called this function (collective)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def leave_process_group() -> None:
    """Destroy the process group once every rank is here: gloo may abort a process whose peers have exited (collective).

    Does nothing in a process without a process group.
    """
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def leave_after_error(exit_code: int) -> int:
    """End this process at once if it is one of several ranks; otherwise return the exit code.

    After an error, a rank cannot wait for the others to leave the process group together. In a process that ends with
    its group, the destructors of gloo abort about one rank in eight, whose exit code would then be that of a crash.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code
