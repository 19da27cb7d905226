"""Pure functions of the step."""

import math
from collections.abc import Iterator, Sequence


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
    """Return the learning rate of optimizer step `step`, counted from 0.

    Linear warm-up that reaches `peak` at step `warmup_steps`; then a way down that would reach `final` at step
    `total_steps`, one past the last.

    Args:
        step: of the optimizer.
        peak: the highest rate.
        final: the last one.
        warmup_steps: before the peak.
        total_steps: of the run.
        name: cosine, half of one (arXiv 1608.03983); linear; or wsd, which holds the peak until the last
            `cooldown_steps` and there falls as 1 - sqrt (arXiv 2405.18392).
        cooldown_steps: of wsd.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    start = total_steps - cooldown_steps if name == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    left = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "wsd": 1 - math.sqrt(progress)}
    return final + (peak - final) * left[name]


def stretches_by_size(
    start: int, stop: int, until: Sequence[tuple[int, int]], image_size: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, pixels) of the positions from `start` to before `stop`, cut where the images' size changes.

    Args:
        start: first position.
        stop: one past the last.
        until: (position, pixels), ascending: before that position images have that size.
        image_size: of all that come after.
    """
    for end, pixels in [*until, (stop, image_size)]:
        if start < min(end, stop):
            yield start, min(end, stop), pixels
            start = min(end, stop)
