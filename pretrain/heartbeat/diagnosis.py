"""Who hangs, lags or is silent, by comparing what the ranks say of themselves from second to second."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from pretrain.heartbeat.beats import Beat
from pretrain.outcome import Outcome

SILENT_SECONDS = 5.0  # without a beat
BEHIND_SECONDS = 6.0  # in a phase that others have left
FIRST_STEPS_SECONDS = 120.0  # the same for a rank that may still be compiling
STANDSTILL = 4.0  # times as patient as with one that hangs, when none gets on: they may all be at something long
FATAL = ("silent", "hangs", "ended")  # what ends a run, if it lasts
LAG, LEAST_LAG = 2.0, 0.02  # times the others' own work, and seconds a step beyond it: less is not worth a word


@dataclass
class Diagnosis:
    """Compares the ranks' beats from second to second, and says each thing once."""

    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank -> beats, when they last grew
    _behind: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank -> turns, since when others wait for it
    _told: dict[tuple[int, str], float] = field(default_factory=dict)  # since when something has been so
    _moved: tuple[list[int], float] = ([], 0.0)  # everyone's turns, when they last grew

    def look(self, beats: list[Beat], now: float) -> list[str]:
        """Return what is new to say.

        Args:
            beats: the last one of each rank.
            now: seconds for which this process itself has been awake.
        """
        found = {(beat.rank, what): sentence for beat, what, sentence in self._findings(beats, now)}
        self._told = {key: since for key, since in self._told.items() if key in found}
        fresh = [sentence for key, sentence in found.items() if key not in self._told]
        for key in found:
            self._told.setdefault(key, now)
        return fresh

    def is_stuck(self, now: float, seconds: float) -> bool:
        """Say whether some rank has hung or been silent for that long, or all have stood still for much longer."""
        stands_still = bool(self._moved[0]) and now - self._moved[1] > STANDSTILL * seconds
        return stands_still or any(now - since > seconds for (_, what), since in self._told.items() if what in FATAL)

    def silence(self, beat: Beat, now: float) -> float:
        """Return for how many seconds a rank has not written a new beat."""
        count, since = self._seen.get(beat.rank, (-1, now))
        if beat.beats != count:
            self._seen[beat.rank] = (beat.beats, now)
            return 0.0
        return now - since

    def _findings(self, beats: list[Beat], now: float) -> Iterator[tuple[Beat, str, str]]:
        ended, beats = [b for b in beats if b.is_over], [b for b in beats if not b.is_over]
        for beat in ended if beats else []:
            if beat.outcome not in (None, Outcome.DONE, Outcome.STOPPED):
                yield beat, "ended", f"{beat} has ended in step {beat.step} ({beat.outcome}), the others wait"
        turns = [beat.turns for beat in beats]
        if turns != self._moved[0]:
            self._moved = turns, now
        silent = set()
        for beat in beats:
            if (seconds := self.silence(beat, now)) > SILENT_SECONDS:
                silent.add(beat.rank)
                sentence = f"{beat} has been silent for {seconds:.0f} s; it was in {beat.phase} of step {beat.step}"
                yield beat, "silent", _with_stack(sentence, beat)
        farthest = max((beat.turns for beat in beats), default=0)
        some_wait = len({beat.waits for beat in beats}) == 2  # for those that do not, however far they have come
        for beat in beats:
            behind = not beat.waits if some_wait else beat.turns < farthest
            if beat.rank in silent or not behind:  # whoever was stopped has not hung when it wakes
                self._behind.pop(beat.rank, None)
                continue
            patience = FIRST_STEPS_SECONDS if beat.work is None else max(BEHIND_SECONDS, beat.work)
            if self._waited_for(beat, now) >= patience:
                what = "saves" if beat.phase == "save" else "hangs"  # a disk may take its time
                sentence = f"{beat} {what}: {beat.since:.0f} s in {beat.phase} of step {beat.step}, the others wait"
                yield beat, what, _with_stack(sentence, beat)
        timed = {beat.rank: beat.work for beat in beats if beat.work is not None}
        for beat in beats:
            others = [work for rank, work in timed.items() if rank != beat.rank]
            if beat.rank not in silent and beat.rank in timed and others:
                usual = statistics.median(others)
                if timed[beat.rank] > max(LAG * usual, usual + LEAST_LAG):
                    times = f"{timed[beat.rank]:.3f} s a step for its data and forward, the others {usual:.3f} s"
                    yield beat, "lags", _with_stack(f"{beat} lags: {times}", beat)

    def _waited_for(self, beat: Beat, now: float) -> float:
        """Return for how long a rank that is behind has not got on."""
        turns, since = self._behind.get(beat.rank, (-1, now))
        if turns != beat.turns:
            turns, since = beat.turns, now
        self._behind[beat.rank] = turns, since
        return now - since


def _with_stack(sentence: str, beat: Beat) -> str:
    return f"{sentence}\n{beat.stack}".rstrip()
