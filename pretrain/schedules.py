"""Pure functions of the step."""

import math


def learning_rate_at(step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Linear warm-up that reaches `peak` at step `warmup_steps`, then half a cosine (arXiv 1608.03983) that would reach
    `final` at step `total_steps`, one past the last.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
