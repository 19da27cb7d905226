"""The state of a training run besides its tensors. A checkpoint saves it; everything else follows from the config."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """How far a run is. Training replaces the state after every step, and a rollback returns to a saved one.

    Attributes:
        step: Number of optimizer steps so far, including the skipped ones.
        position: Position of the next sample in the run's order of samples.
        images_seen: Number of training images in the steps whose update was applied. It is smaller than `position` once
            steps were skipped or data was left out after a rollback.
        skipped_ranges: Ranges [start, stop) of positions that the run leaves out since it rolled back.
        next_tar: Number of the first tar that a resumed stream reads (`data.stream`); 0 for indexed data.
        spike_window: Two lists of equal length, the recent losses and gradient norms, oldest first. Spikes are
            detected by comparison with them.
    """

    step: int = 0
    position: int = 0
    images_seen: int = 0
    skipped_ranges: tuple[tuple[int, int], ...] = ()
    next_tar: int = 0
    spike_window: list[list[float]] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TrainState":
        """Build the state from its JSON form, in which tuples are lists."""
        ranges = tuple((start, stop) for start, stop in content["skipped_ranges"])
        return cls(**{**content, "skipped_ranges": ranges})

    def advance(self, global_batch_size: int) -> "TrainState":
        """Return the state after one more optimizer step on `global_batch_size` samples."""
        position = _first_allowed(self.position + global_batch_size, self.skipped_ranges)
        return replace(self, step=self.step + 1, position=position)

    def count_images(self, num_images: int) -> "TrainState":
        """Return the state after the updates of steps with `num_images` images in all were applied."""
        return replace(self, images_seen=self.images_seen + num_images)

    def skip_range(self, start: int, stop: int) -> "TrainState":
        """Return the state of a run that also leaves out the positions from `start` to before `stop`."""
        ranges = (*self.skipped_ranges, (start, stop))
        return replace(self, skipped_ranges=ranges, position=_first_allowed(self.position, ranges))

    def upcoming_ranges(self, num_samples: int) -> Iterator[tuple[int, int]]:
        """Yield ranges [start, stop) that together hold the next `num_samples` positions of the run."""
        start = self.position
        while num_samples:
            start = _first_allowed(start, self.skipped_ranges)
            stop = min([start + num_samples, *(first for first, _ in self.skipped_ranges if first > start)])
            yield start, stop
            num_samples -= stop - start
            start = stop


def _first_allowed(position: int, skipped_ranges: tuple[tuple[int, int], ...]) -> int:
    """Return the first position at or after `position` outside the skipped ranges."""
    for start, stop in sorted(skipped_ranges):
        if start <= position < stop:
            position = stop
    return position
