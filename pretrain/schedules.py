"""Schedules as pure functions of the step or of the position in the data."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def learning_rate_at(
    step: int,
    *,
    peak: float,
    final: float,
    warmup_steps: int,
    total_steps: int,
    name: str = "cosine",
    cooldown_steps: int = 0,
) -> float:
    """Return the learning rate of an optimizer step.

    A linear warm-up reaches `peak` at step `warmup_steps`. The decay after it would reach `final` at step
    `total_steps`, which is one past the last.

    Args:
        step: Optimizer step, counted from 0.
        peak: Highest learning rate.
        final: Learning rate at the end of the decay.
        warmup_steps: Steps before the peak.
        total_steps: Steps of the whole run.
        name: Decay: "cosine" (arXiv 1608.03983), "linear", or "wsd", which holds the peak and falls as 1 - sqrt over
            the last `cooldown_steps` (arXiv 2405.18392).
        cooldown_steps: Length of the decay of wsd.

    Returns:
        Learning rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    start = total_steps - cooldown_steps if name == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    left = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "wsd": 1 - math.sqrt(progress)}
    return final + (peak - final) * left[name]


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Set the learning rate of an optimizer's parameter groups."""
    for group in groups:
        group["lr"] = learning_rate


def split_by_image_size(
    start: int, stop: int, changes: Sequence[tuple[int, int]], image_size: int
) -> Iterator[tuple[int, int, int]]:
    """Split a range of positions in the data where the size of training images changes.

    Args:
        start: First position.
        stop: Position after the last one.
        changes: Pairs (position, pixels), ascending: images before that position have that size.
        image_size: Side in pixels of all images after the last change.

    Yields:
        Tuples (start, stop, pixels) that cover the range in order.
    """
    for end, pixels in [*changes, (stop, image_size)]:
        if start < min(end, stop):
            yield start, min(end, stop), pixels
            start = min(end, stop)
