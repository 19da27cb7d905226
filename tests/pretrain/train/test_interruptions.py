"""Stops, full disks and ranks that die: what is on disk afterwards, and how the run continues."""

import pytest

from pretrain.checkpoint.history import list_checkpoints
from tests.support.training import (
    FULL_DISK,
    KILLED_IN_SAVE,
    OWED,
    OWED_EVALUATIONS,
    REFUSED,
    STOPPED,
    WORLD_SIZES,
    Trained,
    column,
)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_save_that_fails_on_one_rank_costs_only_that_checkpoint(trained: Trained, world_size: int) -> None:
    full = trained(world_size, FULL_DISK)
    assert full["outcome"] == "DONE"
    assert full["steps"] == list(range(1, 9))
    assert full["checkpoints"] == ["step-00000008"]
    assert (full["newest"], full["faults"]) == ("step-00000008", [])
    assert full["seen"]["5"] == ["step-00000004.partial"]
    assert full["seen"]["6"] == []  # removed as soon as all ranks know of the failure, not at the next save


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_run_whose_last_save_fails_ends_with_an_error(trained: Trained, world_size: int) -> None:
    error = trained(world_size, FULL_DISK)["error_of_the_last_save"]
    assert error.endswith("unsaved: the last checkpoint could not be written; free disk space and start the run again")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", OWED_EVALUATIONS)
def test_a_run_killed_before_its_last_evaluation_makes_up_for_it(trained: Trained, world_size: int, name: str) -> None:
    [late] = trained(world_size, OWED + name)["rows"]
    rows = trained(world_size, name)["rows"]
    [expected] = [row for row in rows if row["step"] == 8 and "validation/loss" in row]
    assert late == expected


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_stop_does_not_wait_for_the_end_of_an_evaluation(trained: Trained, world_size: int) -> None:
    stopped = trained(world_size, STOPPED)
    assert (stopped["outcome"], stopped["evaluated"]) == ("STOPPED", 3)  # the ranks agree on it one batch later
    assert [row["step"] for row in stopped["rows"] if "train/loss" in row] == [1, 2, 3, 4, 5]
    assert not column(stopped, "validation/loss")
    checkpoints = list_checkpoints(stopped["folder"] / "run")
    assert [path.name for path in checkpoints] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before(trained: Trained, world_size: int) -> None:
    run_dir = trained(world_size, KILLED_IN_SAVE)["folder"] / "run"
    assert (run_dir / "checkpoints" / "step-00000008.partial").exists()
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000004"]


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ("no checkpoint", "cannot resume because the run has no checkpoint; start it without --resume"),
        ("another seed", "seed was 3, is 4"),
        ("no weights", "nowhere: no checkpoint here; expected a run folder or one of its checkpoints/step-*"),
        (
            "other classes",
            "other/train: validation classes differ from training classes: "
            "only in training: 0, 1, 2; only in validation: 4, 5",
        ),
    ],
)
def test_a_start_that_cannot_succeed_is_refused_with_a_sentence(trained: Trained, start: str, sentence: str) -> None:
    code, printed = trained(1, REFUSED)[start]
    assert code == 2
    assert sentence in printed
    assert "Traceback" not in printed
