"""The `schedule` section: length of the run, learning rate and image sizes over its steps."""

import math
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
    total_steps: CountOrZero = Field(0, description="Number of optimizer steps of the run; or set epochs.")
    epochs: NonNegative = Field(
        0.0, description="Number of passes over the training data, in place of total_steps; fractions are allowed."
    )
    warmup_steps: CountOrZero = Field(0, description="Steps over which the learning rate rises to its peak.")
    warmup_epochs: NonNegative = Field(0.0, description="Length of the warm-up in place of warmup_steps, with epochs.")
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

    def in_steps(self, samples_per_epoch: int, global_batch_size: int) -> "ScheduleConfig":
        """Return the schedule with its epochs converted to steps; the last step of an epoch is rounded up.

        Args:
            samples_per_epoch: Number of training samples in one pass over the data.
            global_batch_size: Number of samples per step.

        Raises:
            ValidationError: If the warm-up and the cool-down use up all steps.
        """
        if not self.epochs:
            return self
        steps_per_epoch = samples_per_epoch / global_batch_size
        steps = {
            "total_steps": math.ceil(self.epochs * steps_per_epoch),
            "warmup_steps": self.warmup_steps or round(self.warmup_epochs * steps_per_epoch),
        }
        return ScheduleConfig.model_validate({**self.model_dump(), **steps, "epochs": 0.0, "warmup_epochs": 0.0})

    def problems(self) -> Iterator[Problem]:
        yield from self._length_problems()
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

    def _length_problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the lengths of the run, its warm-up and its cool-down."""
        if not self.total_steps and not self.epochs:
            yield Problem(("total_steps", "epochs"), "required but missing; set it, or set epochs")
        elif self.total_steps and self.epochs:
            yield Problem(("epochs", "total_steps"), "conflicts with total_steps; remove one of the two")
        elif self.total_steps and self.warmup_steps + self.cooldown_steps >= self.total_steps:
            cooldown = f" and {self.cooldown_steps} of cool-down" if self.cooldown_steps else ""
            yield Problem(
                ("warmup_steps", "total_steps"),
                f"{self.warmup_steps} steps of warm-up{cooldown} use up all of total_steps={self.total_steps}; "
                "shorten them or increase total_steps",
            )
        if self.warmup_epochs and self.warmup_steps:
            yield Problem(("warmup_epochs", "warmup_steps"), "conflicts with warmup_steps; remove one of the two")
        elif self.warmup_epochs and self.total_steps:
            yield Problem(("warmup_epochs", "total_steps"), "requires epochs, not total_steps; set warmup_steps")
        elif self.warmup_epochs and self.warmup_epochs >= self.epochs:
            sentence = f"must be less than epochs={self.epochs:g}, got {self.warmup_epochs:g}; shorten the warm-up"
            yield Problem(("warmup_epochs", "epochs"), sentence)
