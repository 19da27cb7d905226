"""The `logging` section."""

from pydantic import Field

from pretrain.config.section import Count, Section


class LoggingConfig(Section):
    """Frequency of metrics. Writing a row is the only point where the training loop waits for the device."""

    every_steps: Count = Field(
        20, description="Steps between rows of metrics; fewer rows cost less time. The first step always has a row."
    )

    def is_due(self, step: int) -> bool:
        """Return whether a row of metrics ends with a step, counted from 1."""
        return step == 1 or step % self.every_steps == 0
