"""Errors lead to outcomes, and outcomes to exit codes."""

import pickle

import pytest

from pretrain.errors import (
    BadSampleError,
    CheckpointError,
    DataError,
    DivergedError,
    MachineError,
    UserError,
    VersionError,
)
from pretrain.outcome import Outcome, outcome_of


class MachineDataError(MachineError, DataError):
    """Data that cannot be read because of the machine."""


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UserError("x"), Outcome.USER_ERROR),
        (DataError("x"), Outcome.USER_ERROR),
        (CheckpointError("x"), Outcome.USER_ERROR),
        (VersionError("x"), Outcome.USER_ERROR),
        (MachineError("x"), Outcome.FAILED),
        (MachineDataError("x"), Outcome.FAILED),
        (DivergedError("x"), Outcome.DIVERGED),
        (RuntimeError("x"), Outcome.FAILED),
        (KeyboardInterrupt(), Outcome.FAILED),
    ],
)
def test_outcome_of_an_error(error: BaseException, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


@pytest.mark.parametrize(("outcome", "code"), [*zip(Outcome, (0, 75, 2, 1, 1), strict=True)])
def test_exit_code_of_an_outcome(outcome: Outcome, code: int) -> None:
    assert outcome.exit_code == code


def test_summary_is_without_the_traceback_of_a_data_worker() -> None:
    error = DataError("Caught DataError in DataLoader worker process 0.\nTraceback ...\nDataError: cat.tar: is empty")
    assert error.summary == "cat.tar: is empty"
    assert DataError("cat.tar: is empty").summary == "cat.tar: is empty"


def test_a_bad_sample_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadSampleError("cat.tar", "0001", "truncated")))
    assert (error.shard, error.key, error.reason) == ("cat.tar", "0001", "truncated")
    assert str(error) == "cat.tar: sample 0001: truncated"
