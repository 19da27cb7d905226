"""What is said of the ranks' beats, and what is not."""

from dataclasses import replace
from typing import Any

from pretrain.heartbeat.beats import Beat
from pretrain.heartbeat.diagnosis import Diagnosis

IN_COLLECTIVE = '  File "site-packages/torch/distributed/distributed_c10d.py", line 1, in all_reduce\n'


def beat(rank: int, **changes: Any) -> Beat:
    values = {"pid": 1, "host": "h", "beats": 1, "turns": 5, "step": 3, "phase": "forward", "since": 0.1, "work": 1.0}
    return Beat(**{"rank": rank, **values, "seconds": {}, "stack": "  here\n", **changes})


def look(diagnosis: Diagnosis, beats: list[Beat], now: int) -> list[str]:
    """Look at ranks that all have just beaten."""
    return diagnosis.look([replace(each, beats=now) for each in beats], float(now))


def seconds_long(diagnosis: Diagnosis, beats: list[Beat], first: int, last: int) -> list[str]:
    """Return what is said while nothing changes for some seconds."""
    return [sentence for now in range(first, last) for sentence in look(diagnosis, beats, now)]


def test_each_thing_is_said_once_and_again_after_it_was_gone() -> None:
    diagnosis = Diagnosis()
    lagging, fine = [beat(0), beat(1, work=2.5)], [beat(0), beat(1, work=1.5)]
    assert diagnosis.look(lagging, 0.0) == [
        "rank 1 (process 1 on h) lags: 2.500 s a step for its data and forward, the others 1.000 s\n  here"
    ]
    assert diagnosis.look(lagging, 1.0) == []
    assert diagnosis.look(fine, 2.0) == []
    assert len(diagnosis.look(lagging, 3.0)) == 1
    assert not diagnosis.is_stuck(40.0, 10.0)  # lagging is no reason to end a run


def test_some_milliseconds_are_no_lag() -> None:
    assert not Diagnosis().look([beat(0, work=0.004), beat(1, work=0.02)], 0.0)
    assert Diagnosis().look([beat(0, work=0.004), beat(1, work=0.025)], 0.0)


def test_all_ranks_in_the_same_long_phase_is_no_hang() -> None:
    """The first step of a compiled model, or a long evaluation."""
    diagnosis = Diagnosis()
    assert not seconds_long(diagnosis, [beat(rank, since=500.0) for rank in range(4)], 0, 9)
    behind = [beat(0, since=1.0, turns=6), beat(1, since=508.0)]
    assert not seconds_long(diagnosis, behind, 9, 15)  # the others have only just left
    [sentence] = seconds_long(diagnosis, behind, 15, 17)
    assert "hangs: 508 s in forward of step 3" in sentence
    assert diagnosis.is_stuck(26.0, 10.0)


def test_a_rank_that_comes_late_again_and_again_gets_on() -> None:
    """In a long evaluation one rank may wait for the other whenever somebody looks."""
    diagnosis = Diagnosis()
    for now in range(60):
        late = [beat(0, turns=now // 3, stack=IN_COLLECTIVE), beat(1, turns=now // 3)]
        assert not [sentence for sentence in diagnosis.look(late, float(now)) if "hangs" in sentence]


def test_ranks_that_all_stand_still_are_given_longer() -> None:
    for ranks_there in (1, 3):
        diagnosis = Diagnosis()
        diagnosis.look([beat(rank, turns=7) for rank in range(ranks_there)], 0.0)
        diagnosis.look([beat(rank, turns=8) for rank in range(ranks_there)], 5.0)
        for now in range(6, 50):
            look(diagnosis, [beat(rank, turns=8, beats=now) for rank in range(ranks_there)], now)
            assert diagnosis.is_stuck(float(now), 10.0) == (now - 5 > 40)


def test_a_slow_disk_is_named_and_ends_nothing_soon() -> None:
    diagnosis = Diagnosis()
    beats = [beat(0, phase="save"), beat(1, phase="save", stack=IN_COLLECTIVE)]
    [sentence] = seconds_long(diagnosis, beats, 0, 30)
    assert sentence.startswith("rank 0 (process 1 on h) saves: ")
    assert not diagnosis.is_stuck(39.0, 10.0)
    assert diagnosis.is_stuck(41.0, 10.0)


def test_a_rank_whose_run_has_ended_badly_is_named() -> None:
    diagnosis = Diagnosis()
    beats = [beat(0), beat(1, phase="end", outcome="failed")]
    [sentence] = diagnosis.look(beats, 0.0)
    assert sentence == "rank 1 (process 1 on h) has ended in step 3 (failed), the others wait"
    assert diagnosis.is_stuck(11.0, 10.0)


def test_who_is_not_in_the_collective_is_who_hangs() -> None:
    beats = [beat(0, stack=IN_COLLECTIVE), beat(1), beat(2, stack=IN_COLLECTIVE)]
    assert [sentence.split(" (")[0] for sentence in seconds_long(Diagnosis(), beats, 0, 8)] == ["rank 1"]
    above_one = IN_COLLECTIVE + '  File "signals.py", line 1, in handler\n'
    beats = [beat(0, stack=IN_COLLECTIVE), beat(1, stack=above_one)]
    assert [sentence.split(" (")[0] for sentence in seconds_long(Diagnosis(), beats, 0, 8)] == ["rank 1"]
    ahead = [beat(0, stack=IN_COLLECTIVE), beat(1, turns=6)]  # it has left what the other still waits in
    assert [sentence.split(" (")[0] for sentence in seconds_long(Diagnosis(), ahead, 0, 8)] == ["rank 1"]
    early = [beat(0, stack=IN_COLLECTIVE, work=None), beat(1, work=None)]
    assert not seconds_long(Diagnosis(), early, 0, 100)  # the other may be compiling still
    long_steps = [beat(0, stack=IN_COLLECTIVE, work=30.0), beat(1, work=30.0)]
    assert not seconds_long(Diagnosis(), long_steps, 0, 29)


def test_a_rank_that_was_stopped_has_not_hung_when_it_wakes() -> None:
    """Its first beat may come before its main thread has got on."""
    diagnosis = Diagnosis()
    waits, stopped = beat(0, stack=IN_COLLECTIVE), beat(1, beats=1)
    told = [diagnosis.look([replace(waits, beats=now), stopped], float(now)) for now in range(9)]
    assert [sentences for sentences in told if sentences] == [told[6]]
    assert "has been silent for 6 s" in told[6][0]
    awake = replace(stopped, since=9.0)
    assert not seconds_long(diagnosis, [waits, awake], 9, 15)
    assert "hangs: 9 s" in seconds_long(diagnosis, [waits, awake], 15, 17)[0]  # if it then gets on no further


def test_a_rank_that_is_through_is_not_missed() -> None:
    diagnosis = Diagnosis()
    beats = [beat(0, phase="end"), beat(1, phase="end")]
    assert not [diagnosis.look(beats, float(now)) for now in range(20)][-1]
