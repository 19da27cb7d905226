"""A checkpoint of one topology continues on another: other ranks, other ZeRO stage, other precision."""

import pytest

from tests.support.training import CONTINUED, SETTINGS, WORLD_SIZES, Trained

SAVED = [name for name, setting in SETTINGS.items() if setting.continued_with is not None]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("saved", SAVED)
def test_a_checkpoint_continues_on_another_topology(trained: Trained, world_size: int, saved: str) -> None:
    before, after = trained(3 - world_size, saved), trained(world_size, CONTINUED + saved)
    whole = {row["step"]: row for row in before["rows"] if "train/loss" in row}
    continued = [row for row in after["rows"] if "train/loss" in row]
    assert [row["step"] for row in continued] == [5, 6, 7, 8]
    is_exact = not SETTINGS[saved].is_bf16 and saved != "dropout"  # each rank draws other dropout masks
    for row in continued:
        tolerance = {"rel": 1e-5} if is_exact else {"abs": 0.02}
        assert row["train/loss"] == pytest.approx(whole[row["step"]]["train/loss"], **tolerance)
        assert row["data/samples"] == whole[row["step"]]["data/samples"]
    if is_exact:
        for name, average in before["averages"].items():
            assert after["averages"][name] == pytest.approx(average, abs=2e-4), name


@pytest.mark.parametrize("saved", ["zero0", "zero2", "zero3", "offload"])
def test_no_rank_reads_more_of_the_optimizer_than_it_holds(trained: Trained, saved: str) -> None:
    shares = trained(2, CONTINUED + saved)["shares"]
    assert shares.keys() == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert all(0.4 < share < 0.52 for share in shares.values())  # stage 3 pads each parameter
