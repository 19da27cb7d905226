"""Variables of launchers that fit together, and stale ones."""

import re

import pytest

from pretrain.errors import UserError
from pretrain.rank_variables import check_rank_variables, is_first_rank

ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **ADDRESS},
        {"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2", **ADDRESS},
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_variables_of_launchers_and_their_absence_are_accepted(environment: dict[str, str]) -> None:
    check_rank_variables(environment)


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"RANK": "1"}, "RANK=1: is set but WORLD_SIZE is not; unset RANK to train alone, or start the run with"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: is set but WORLD_SIZE is not; unset LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: is set but RANK is not; unset WORLD_SIZE"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK=: must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", **ADDRESS}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "WORLD_SIZE=2: MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "WORLD_SIZE=2: MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, "MASTER_PORT=0: must be between"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2: several processes were started, but RANK is not set"),
    ],
)
def test_variables_that_do_not_fit_are_explained(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(problem)}"):
        check_rank_variables(environment)


def test_a_process_without_a_rank_is_the_first() -> None:
    assert [is_first_rank(environment) for environment in ({}, {"RANK": "0"}, {"RANK": "1"})] == [True, True, False]
