"""Collectives of one process and of two gloo ranks."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp

from pretrain import distributed
from pretrain.errors import DataError, MachineError, StartupError, UserError
from pretrain.startup import join_process_group
from tests.support.launching import free_port

ROWS = (torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[7.0, 8.0]]))  # of ranks 0 and 1


def raising(error: Exception | None) -> Callable[[], str]:
    def work() -> str:
        if error:
            raise error
        return "result"

    return work


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("wrong"), UserError),
        (DataError("wrong"), UserError),
        (FileNotFoundError(2, "No such file", "x"), UserError),
        (PermissionError(13, "Permission denied", "x"), UserError),
        (MachineError("broken"), MachineError),
        (OSError(28, "No space left on device"), MachineError),
    ],
)
def test_a_failure_is_the_users_or_the_machines(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        distributed.on_all_ranks(raising(error))
    assert type(caught.value) is kind
    assert str(caught.value) == str(error)


def test_other_errors_are_raised_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        distributed.on_all_ranks(raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("error", "rank", "printed"),
    [
        (UserError("no such folder"), "0", "no such folder\n"),
        (UserError("no such folder"), "1", ""),
        (MachineError("disk full"), "1", ""),
        (StartupError("rank 1: no GPU"), "1", "rank 1: no GPU\n"),
        (DataError("Caught DataError in worker 0.\n  File x\nDataError: a.tar: damaged"), "1", "a.tar: damaged\n"),
    ],
)
def test_only_errors_of_a_single_rank_are_printed_by_other_ranks(
    error: Exception, rank: str, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    distributed.print_error(error)
    assert capsys.readouterr() == ("", printed)


def test_collectives_of_one_process_return_their_input() -> None:
    assert distributed.on_all_ranks(raising(None)) == "result"
    assert distributed.gather("value") == ["value"]
    assert [distributed.any_over_ranks(value) for value in (True, False)] == [True, False]
    rows = distributed.gather_rows(ROWS[0], len(ROWS[0]))
    assert torch.equal(rows, ROWS[0])
    distributed.barrier()
    distributed.broadcast_from_main([rows])
    distributed.leave_process_group()
    assert distributed.leave_after_error(2) == 2


def run_rank(rank: int, folder: str, port: str) -> None:
    """Check all collectives on one of two ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    assert join_process_group()
    own = torch.tensor([1.0 + rank])
    assert distributed.sum_over_ranks(own).tolist() == [3.0]
    assert own.tolist() == [1.0 + rank]  # unchanged
    assert distributed.any_over_ranks(rank == 1)
    assert not distributed.any_over_ranks(False)
    assert distributed.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    check_gathered_rows(rank)
    tensor = torch.full((2,), float(rank))
    distributed.broadcast_from_main([tensor])
    assert tensor.tolist() == [0.0, 0.0]
    for errors, kind, message in (
        ((None, UserError("x.tar: missing")), UserError, "x.tar: missing"),
        ((UserError("x.tar: missing"), UserError("x.tar: missing")), UserError, "x.tar: missing"),
        ((UserError("x.tar: missing"), UserError("y.tar: missing")), UserError, "x.tar: missing\ny.tar: missing"),
        ((UserError("x.tar: missing"), MachineError("disk full")), MachineError, "x.tar: missing\ndisk full"),
    ):
        with pytest.raises(kind) as caught:
            distributed.on_all_ranks(raising(errors[rank]))
        assert str(caught.value) == message
    assert distributed.on_all_ranks(raising(None)) == "result"
    check_waiting(rank)
    with mock.patch("os._exit") as end:
        distributed.leave_after_error(2)
    end.assert_called_once_with(2)
    Path(folder, f"rank{rank}").touch()
    distributed.leave_process_group()


def check_waiting(rank: int) -> None:
    """Each rank works for a while, by turns and together; all ranks see every report of progress and every error."""
    for reports in ([3, None], [None, 2], [1, 4], [None, None]):
        seen: list[int] = []

        def work(report: Callable[[], None], count: int | None = reports[rank]) -> None:
            for _ in range(count or 0):
                report()

        distributed.while_others_wait(work if reports[rank] else None, lambda seen=seen: seen.append(1))
        assert len(seen) == max(count or 0 for count in reports)

    def fail(report: Callable[[], None]) -> None:
        report()
        raise DataError("a.tar: damaged")

    with pytest.raises(UserError, match=r"^a\.tar: damaged$"):
        distributed.while_others_wait(fail if rank == 1 else None)


def check_gathered_rows(rank: int) -> None:
    """Compare the loss and the gradients of gathered rows with those of one process that has all rows."""
    rows = ROWS[rank].clone().requires_grad_()
    gathered = distributed.gather_rows(rows, 3)
    everyone = torch.cat([*ROWS, torch.zeros(2, 2)]).requires_grad_()  # the second rank has two rows fewer
    assert torch.equal(gathered, everyone)
    (gathered @ gathered.T).tril().sum().mul(rank + 1).backward()  # each rank has another loss of all rows
    (everyone @ everyone.T).tril().sum().mul(1 + 2).backward()
    assert rows.grad is not None
    assert everyone.grad is not None
    torch.testing.assert_close(rows.grad, everyone.grad[3 * rank :][: len(rows)])


@pytest.mark.processes
def test_collectives_of_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, args=(folder, free_port()), nprocs=2)  # type: ignore[no-untyped-call]
        assert len(list(Path(folder).glob("rank*"))) == 2
