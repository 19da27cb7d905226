"""The time account of a supervised run."""

import pytest

from launch.supervisor.goodput import Attempt, Goodput
from pretrain.outcome import Outcome


def test_shares_add_up_to_the_total_time() -> None:
    of_first = {"start": 6.0, "data": 10.0, "forward": 30.0, "backward": 40.0, "save": 2.0}
    of_second = {"start": 4.0, "data": 5.0, "forward": 20.0, "step": 25.0, "evaluate": 1.0}
    first = Attempt(Outcome.FAILED, -9, 100.0, of_first, 0, 50, 40)
    second = Attempt(Outcome.DONE, 0, 60.0, of_second, 40, 100, 100)
    goodput = Goodput([first, second], pause_seconds=4.0)
    shares = goodput.shares()
    assert sum(shares.values()) == pytest.approx(164.0)
    assert shares["lost work"] == pytest.approx(70.0 * 10 / 50)
    assert shares["compute"] == pytest.approx(115.0 - 14.0)
    assert (shares["data wait"], shares["save stall"], shares["evaluation"]) == (15.0, 2.0, 1.0)
    assert shares["first start"] == 18.0
    assert shares["restart"] == pytest.approx(4.0 + 9.0)
    assert goodput.report().startswith("goodput 61.6% of 164 s, 1 restart: compute 101 s, data wait 15 s, ")


def test_report_counts_one_restart_in_the_singular() -> None:
    attempts = [
        Attempt(Outcome.FAILED, 1, 10.0, {"forward": 8.0}, 0, 4, 4),
        Attempt(Outcome.DONE, 0, 10.0, {}, 4, 4, 4),
    ]
    assert Goodput(attempts).report().startswith("goodput 40.0% of 20 s, 1 restart: compute 8 s, ")
