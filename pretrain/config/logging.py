"""The `logging` section."""

from pydantic import Field

from pretrain.config.section import Count, Section


class LoggingConfig(Section):
    """Frequency of metrics. Writing a row is the only point where the training loop waits for the device."""

    every_steps: Count = Field(20, description="Steps between rows of metrics; fewer rows cost less time.")
