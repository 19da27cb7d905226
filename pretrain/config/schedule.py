"""The `schedule` section: length of the run, learning rate and image sizes over its steps."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pretrain.config.section import Count, CountOrZero, Fraction, NonNegative, Problem, Section


class ScheduleConfig(Section):
    """Linear warm-up followed by a decay. One step is one optimizer step on a global batch."""

    name: Literal["cosine", "linear", "wsd"] = Field(
        "cosine",
        description='Decay after the warm-up: "cosine", "linear", or "wsd", which holds the peak until the cool-down '
        "(arXiv 2405.18392) and can be extended before that.",
    )
    total_steps: Count = Field(description="Number of optimizer steps of the run.")
    warmup_steps: CountOrZero = Field(0, description="Steps over which the learning rate rises to its peak.")
    cooldown_steps: CountOrZero = Field(
        0,
        description="Steps at the end over which wsd lowers the learning rate as 1 - sqrt(progress); must "
        "be 0 for other schedules.",
    )
    final_learning_rate: NonNegative = Field(0.0, description="Learning rate at the end of the run.")
    image_sizes: list[tuple[Fraction, Count]] = Field(
        [],
        description="Smaller images early in the run: [[0.6, 128], [0.9, 192]] trains at 128 pixels for the first 60 % "
        "of the steps, at 192 until 90 %, then at model.image_size.",
    )

    def size_changes(self, global_batch_size: int) -> list[tuple[int, int]]:
        """Return (position, pixels) pairs, ascending: images before that position in the data have that size."""
        return [(round(share * self.total_steps) * global_batch_size, pixels) for share, pixels in self.image_sizes]

    def problems(self) -> Iterator[Problem]:
        if self.warmup_steps + self.cooldown_steps >= self.total_steps:
            cooldown = f" and {self.cooldown_steps} of cool-down" if self.cooldown_steps else ""
            yield Problem(
                ("warmup_steps", "total_steps"),
                f"{self.warmup_steps} steps of warm-up{cooldown} use up all of total_steps={self.total_steps}; "
                "shorten them or increase total_steps",
            )
        shares = [share for share, _ in self.image_sizes]
        if shares != sorted(shares):
            sentence = f"fractions of the run must be in ascending order, got {shares}; sort them"
            yield Problem(("image_sizes",), sentence)
        if self.name == "wsd" and not self.cooldown_steps:
            sentence = "must be greater than 0 with name=wsd; set it or choose another schedule"
            yield Problem(("cooldown_steps", "name"), sentence)
        if self.name != "wsd" and self.cooldown_steps:
            sentence = f"must be 0 with name={self.name}; remove it or use name=wsd"
            yield Problem(("cooldown_steps", "name"), sentence)
