"""Which findings the heartbeats of a run lead to, and which they do not."""

from dataclasses import replace
from typing import Any

import pytest

from pretrain.heartbeat.beats import Beat
from pretrain.heartbeat.diagnosis import Diagnosis
from tests.support.frames import frames

IN_COLLECTIVE = '  File "site-packages/torch/distributed/distributed_c10d.py", line 1, in all_reduce\n'


def beat(rank: int, **changes: Any) -> Beat:
    values = {
        "pid": 1,
        "host": "h",
        "num_beats": 1,
        "num_phases": 5,
        "step": 3,
        "phase": "forward",
        "seconds_in_phase": 0.1,
        "work_seconds": 1.0,
        "phase_seconds": {},
        "stack": "  here\n",
    }
    return Beat(**{"rank": rank, **values, **changes})


def findings_at(diagnosis: Diagnosis, beats: list[Beat], now: int) -> list[str]:
    """Return the new findings about ranks that all have just written a heartbeat."""
    return diagnosis.new_findings([replace(each, num_beats=now) for each in beats], float(now))


def findings_between(diagnosis: Diagnosis, beats: list[Beat], first: int, last: int) -> list[str]:
    """Return the new findings while nothing but the heartbeats changes for some seconds."""
    return [sentence for now in range(first, last) for sentence in findings_at(diagnosis, beats, now)]


def test_finding_is_reported_once_and_again_after_it_was_gone() -> None:
    diagnosis = Diagnosis()
    lagging, fine = [beat(0), beat(1, work_seconds=2.5)], [beat(0), beat(1, work_seconds=1.5)]
    assert diagnosis.new_findings(lagging, 0.0) == [
        "rank 1 (process 1 on h) lags: 2.500 s per step for data and forward pass, other ranks 1.000 s\n  here"
    ]
    assert diagnosis.new_findings(lagging, 1.0) == []
    assert diagnosis.new_findings(fine, 2.0) == []
    assert len(diagnosis.new_findings(lagging, 3.0)) == 1
    assert not diagnosis.is_stuck(40.0, 10.0)  # a lagging rank does not end a run


def test_rank_lags_only_from_20_ms_per_step_on() -> None:
    assert not Diagnosis().new_findings([beat(0, work_seconds=0.004), beat(1, work_seconds=0.02)], 0.0)
    assert Diagnosis().new_findings([beat(0, work_seconds=0.004), beat(1, work_seconds=0.025)], 0.0)


def test_same_long_phase_of_all_ranks_is_not_a_hang() -> None:
    """For example, the first step of a compiled model, or a long evaluation."""
    diagnosis = Diagnosis()
    assert not findings_between(diagnosis, [beat(rank, seconds_in_phase=500.0) for rank in range(4)], 0, 9)
    behind = [beat(0, seconds_in_phase=1.0, num_phases=6), beat(1, seconds_in_phase=508.0)]
    assert not findings_between(diagnosis, behind, 9, 15)  # the other rank has only just left the phase
    [sentence] = findings_between(diagnosis, behind, 15, 17)
    assert "hangs: 508 s in phase forward of step 3 while other ranks wait" in sentence
    assert diagnosis.is_stuck(26.0, 10.0)


def test_rank_that_is_often_late_but_progresses_does_not_hang() -> None:
    """In a long evaluation, one rank may be waiting for the other at every check."""
    diagnosis = Diagnosis()
    for now in range(60):
        late = [beat(0, num_phases=now // 3, stack=IN_COLLECTIVE), beat(1, num_phases=now // 3)]
        assert not [sentence for sentence in diagnosis.new_findings(late, float(now)) if "hangs" in sentence]


def test_standstill_of_all_ranks_ends_the_run_after_four_times_the_limit() -> None:
    for num_ranks in (1, 3):
        diagnosis = Diagnosis()
        diagnosis.new_findings([beat(rank, num_phases=7) for rank in range(num_ranks)], 0.0)
        diagnosis.new_findings([beat(rank, num_phases=8) for rank in range(num_ranks)], 5.0)
        for now in range(6, 50):
            findings_at(diagnosis, [beat(rank, num_phases=8, num_beats=now) for rank in range(num_ranks)], now)
            assert diagnosis.is_stuck(float(now), 10.0) == (now - 5 > 40)


def test_slow_save_is_reported_but_does_not_end_the_run_early() -> None:
    diagnosis = Diagnosis()
    beats = [beat(0, phase="save"), beat(1, phase="save", stack=IN_COLLECTIVE)]
    [sentence] = findings_between(diagnosis, beats, 0, 30)
    assert sentence.startswith("rank 0 (process 1 on h) saves slowly: ")
    assert not diagnosis.is_stuck(39.0, 10.0)
    assert diagnosis.is_stuck(41.0, 10.0)


def test_rank_outside_the_collective_is_the_one_that_hangs() -> None:
    beats = [beat(0, stack=IN_COLLECTIVE), beat(1), beat(2, stack=IN_COLLECTIVE)]
    assert [sentence.split(" (")[0] for sentence in findings_between(Diagnosis(), beats, 0, 8)] == ["rank 1"]
    above_one = IN_COLLECTIVE + '  File "signals.py", line 1, in handler\n'
    beats = [beat(0, stack=IN_COLLECTIVE), beat(1, stack=above_one)]
    assert [sentence.split(" (")[0] for sentence in findings_between(Diagnosis(), beats, 0, 8)] == ["rank 1"]
    ahead = [
        beat(0, stack=IN_COLLECTIVE),
        beat(1, num_phases=6),
    ]  # it has left the collective in which the other still waits
    assert [sentence.split(" (")[0] for sentence in findings_between(Diagnosis(), ahead, 0, 8)] == ["rank 1"]
    early = [beat(0, stack=IN_COLLECTIVE, work_seconds=None), beat(1, work_seconds=None)]
    assert not findings_between(Diagnosis(), early, 0, 100)  # the other rank may still be compiling
    long_steps = [beat(0, stack=IN_COLLECTIVE, work_seconds=30.0), beat(1, work_seconds=30.0)]
    assert not findings_between(Diagnosis(), long_steps, 0, 29)


# Where the host of a rank is while its device waits for another rank, and how many phases further than that rank.
WAITING_ON_GPU = {
    "for the step before": (4, frames("pretrain/health.py:flush", "torch/cuda/streams.py:synchronize")),
    "for a row of metrics": (5, frames("pretrain/train.py:log_interval", "pretrain/interval.py:reduce:.tolist()")),
    "in an operation of the next forward": (4, frames("pretrain/model/vit.py:forward:norm_before")),
    "in an operation of the backward": (2, frames("torch/autograd/graph.py:_engine_run_backward")),
    "in an operation of the optimizer": (3, frames("torch/optim/adam.py:_fused_adam:torch._fused_adamw_")),
}
# Where the main thread of a rank hangs, which the devices of all others wait for.
HANGING = {
    "data": frames("pretrain/steps.py:next_step", "torch/utils/data/dataloader.py:_try_get_data"),
    "forward": frames("torch/nn/modules/linear.py:forward"),
    "hook of backward": frames("torch/autograd/graph.py:_engine_run_backward", "pretrain/model/vit.py:forward"),
    "C++ of backward": frames("torch/autograd/graph.py:_engine_run_backward"),
    "step": frames("deepspeed/runtime/zero/stage_1_and_2.py:step", "torch/optim/optimizer.py:wrapper"),
    "signal handler": frames("torch/cuda/streams.py:synchronize", "pretrain/stop_signal.py:_handle"),
}


@pytest.mark.parametrize("place", HANGING)
def test_only_the_hanging_rank_is_named_on_gpus(place: str) -> None:
    """The hosts of the others run ahead until they need a value, or until their device accepts no more operations."""
    waiting = [
        beat(rank, num_phases=5 + ahead, stack=stack) for rank, (ahead, stack) in enumerate(WAITING_ON_GPU.values())
    ]
    hanging = beat(len(waiting), stack=HANGING[place])
    for healthy in (*([each] for each in waiting), waiting):  # next to each of the others alone, and next to all
        found = findings_between(Diagnosis(), [*healthy, hanging], 0, 8)
        assert [sentence.split(" (")[0] for sentence in found] == [f"rank {hanging.rank}"]
        assert " hangs: " in found[0]


def test_rank_that_hangs_in_the_same_phase_is_named() -> None:
    """In fine-tuning there are no phases: the others wait for gradients in C++, or for the number of ranks to stop."""
    for stack in (frames("torch/autograd/graph.py:_engine_run_backward"), IN_COLLECTIVE):
        for place in ("data", "forward", "hook of backward", "step", "signal handler"):
            found = findings_between(Diagnosis(), [beat(0, stack=stack), beat(1, stack=HANGING[place])], 0, 8)
            assert [sentence.split(" (")[0] for sentence in found] == ["rank 1"]


def test_stopped_rank_does_not_hang_when_it_wakes_up() -> None:
    """Its first heartbeat may precede the first progress of its main thread."""
    diagnosis = Diagnosis()
    waits, stopped = beat(0, stack=IN_COLLECTIVE), beat(1, num_beats=1)
    reported = [diagnosis.new_findings([replace(waits, num_beats=now), stopped], float(now)) for now in range(9)]
    assert [sentences for sentences in reported if sentences] == [reported[6]]
    assert "is silent: no heartbeat for 6 s" in reported[6][0]
    awake = replace(stopped, seconds_in_phase=9.0)
    assert not findings_between(diagnosis, [waits, awake], 9, 15)
    assert "hangs: 9 s" in findings_between(diagnosis, [waits, awake], 15, 17)[0]  # if it then makes no progress


def test_ended_ranks_are_not_reported() -> None:
    diagnosis = Diagnosis()
    beats = [beat(0, phase="end"), beat(1, phase="end")]
    assert not [diagnosis.new_findings(beats, float(now)) for now in range(20)][-1]
