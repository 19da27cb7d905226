"""Find the ranks that hang, lag or are silent by comparing the heartbeats of all ranks over time."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from pretrain.heartbeat.beats import Beat
from pretrain.heartbeat.stacks import Wait

SILENT_SECONDS = 5.0  # without a heartbeat
BEHIND_SECONDS = 6.0  # in a phase that other ranks wait for or have left
FIRST_STEPS_SECONDS = 120.0  # the same limit for a rank that may still be compiling
STANDSTILL_FACTOR = 4.0  # all ranks may be doing something long, so a standstill gets more time than a single rank
FATAL_KINDS = ("silent", "hangs")  # kinds of findings that end a run if they last
LAG_FACTOR, LAG_SECONDS = 2.0, 0.02  # a lagging rank takes this many times, and this much, longer per step


@dataclass
class Diagnosis:
    """Compares the heartbeats of all ranks over time and returns each finding once.

    A finding belongs to one rank and has a kind: "silent", "hangs", "saves" (slow storage, which is reported but does
    not end a run) or "lags".
    """

    _last_beats: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank -> its num_beats, and since when
    _behind: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank behind -> its num_phases, and since when
    _findings: dict[tuple[int, str], float] = field(default_factory=dict)  # (rank, kind) -> time of its first report
    _progress: tuple[list[int], float] = ([], 0.0)  # num_phases of all ranks, and since when

    def new_findings(self, beats: list[Beat], now: float) -> list[str]:
        """Return a sentence for each finding that was not there at the previous call.

        Args:
            beats: Last heartbeat of each rank.
            now: Seconds during which this process itself was awake.
        """
        sentences = {(beat.rank, kind): sentence for beat, kind, sentence in self._examine(beats, now)}
        self._findings = {key: since for key, since in self._findings.items() if key in sentences}
        fresh = [sentence for key, sentence in sentences.items() if key not in self._findings]
        for key in sentences:
            self._findings.setdefault(key, now)
        return fresh

    def is_stuck(self, now: float, seconds: float) -> bool:
        """Return whether the run should be ended.

        This is so if a rank hangs or is silent for more than `seconds`, or if no rank makes progress for four times as
        long.

        Args:
            now: Seconds during which this process itself was awake.
            seconds: Tolerated time.
        """
        is_standstill = bool(self._progress[0]) and now - self._progress[1] > STANDSTILL_FACTOR * seconds
        fatal = (since for (_, kind), since in self._findings.items() if kind in FATAL_KINDS)
        return is_standstill or any(now - since > seconds for since in fatal)

    def silent_seconds(self, beat: Beat, now: float) -> float:
        """Return for how many seconds a rank has not written a new heartbeat.

        Args:
            beat: Last heartbeat of the rank.
            now: Seconds during which this process itself was awake.
        """
        num_beats, since = self._last_beats.get(beat.rank, (-1, now))
        if beat.num_beats != num_beats:
            self._last_beats[beat.rank] = (beat.num_beats, now)
            return 0.0
        return now - since

    def _examine(self, beats: list[Beat], now: float) -> Iterator[tuple[Beat, str, str]]:
        """Yield (heartbeat, kind, sentence) for everything that is wrong now."""
        running = [beat for beat in beats if not beat.has_ended]
        num_phases = [beat.num_phases for beat in running]
        if num_phases != self._progress[0]:
            self._progress = num_phases, now
        silent = {
            beat.rank: seconds for beat in running if (seconds := self.silent_seconds(beat, now)) > SILENT_SECONDS
        }
        for beat in running:
            if beat.rank in silent:
                sentence = (
                    f"{beat} is silent: no heartbeat for {silent[beat.rank]:.0f} s; "
                    f"it was in phase {beat.phase} of step {beat.step}"
                )
                yield beat, "silent", _with_stack(sentence, beat)
        yield from self._hanging(running, silent, now)
        yield from _lagging(running, silent)

    def _hanging(self, running: list[Beat], silent: dict[int, float], now: float) -> Iterator[tuple[Beat, str, str]]:
        """Yield the ranks that the others have waited for too long."""
        behind = find_behind(running)
        for beat in running:
            is_behind = beat.rank in behind
            if beat.rank in silent or not is_behind:  # a stopped process has not hung when it wakes up
                self._behind.pop(beat.rank, None)
                continue
            limit = FIRST_STEPS_SECONDS if beat.work_seconds is None else max(BEHIND_SECONDS, beat.work_seconds)
            if self._seconds_behind(beat, now) >= limit:
                kind, verb = ("saves", "saves slowly") if beat.phase == "save" else ("hangs", "hangs")
                sentence = (
                    f"{beat} {verb}: {beat.seconds_in_phase:.0f} s in phase {beat.phase} of step {beat.step} "
                    "while other ranks wait"
                )
                yield beat, kind, _with_stack(sentence, beat)

    def _seconds_behind(self, beat: Beat, now: float) -> float:
        """Return for how many seconds a rank that is behind has not entered a new phase."""
        num_phases, since = self._behind.get(beat.rank, (-1, now))
        if num_phases != beat.num_phases:
            num_phases, since = beat.num_phases, now
        self._behind[beat.rank] = num_phases, since
        return now - since


def find_behind(running: list[Beat]) -> set[int]:
    """Return the ranks that all others wait for; none if all ranks are equally far.

    A rank that certainly waits is not behind, however far it is, unless all ranks wait. Among the others, those that
    have entered the fewest phases are behind. This also finds the right rank if a rank waits in an operation that its
    device does not accept yet: it was able to enter further phases, because its device runs behind its host.

    Args:
        running: Heartbeats of the ranks that have not ended.
    """
    active = [beat for beat in running if beat.wait is not Wait.CERTAIN] or running
    if len(active) == len(running) and len({_progress_of(beat) for beat in running}) < 2:
        return set()
    least = min(map(_progress_of, active))
    return {beat.rank for beat in active if _progress_of(beat) == least}


def _progress_of(beat: Beat) -> tuple[int, Wait]:
    return beat.num_phases, beat.wait


def _lagging(running: list[Beat], silent: dict[int, float]) -> Iterator[tuple[Beat, str, str]]:
    """Yield the ranks whose own work takes much longer than that of the others."""
    timed = {beat.rank: beat.work_seconds for beat in running if beat.work_seconds is not None}
    for beat in running:
        others = [seconds for rank, seconds in timed.items() if rank != beat.rank]
        if beat.rank not in silent and beat.rank in timed and others:
            typical = statistics.median(others)
            if timed[beat.rank] > max(LAG_FACTOR * typical, typical + LAG_SECONDS):
                sentence = (
                    f"{beat} lags: {timed[beat.rank]:.3f} s per step for data and forward pass, "
                    f"other ranks {typical:.3f} s"
                )
                yield beat, "lags", _with_stack(sentence, beat)


def _with_stack(sentence: str, beat: Beat) -> str:
    return f"{sentence}\n{beat.stack}".rstrip()
