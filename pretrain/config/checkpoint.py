"""The `checkpoint` section."""

from pydantic import Field

from pretrain.config.section import Count, CountOrZero, Section


class CheckpointConfig(Section):
    """Frequency and retention of checkpoints. The last step is always saved."""

    every_steps: Count = Field(1000, description="Steps between checkpoints; a crash loses at most that many.")
    keep_last: Count = Field(2, description="Number of newest checkpoints to keep; older ones are deleted.")
    keep_every: CountOrZero = Field(
        0, description="Interval in steps of checkpoints that are kept for good; 0 keeps only the newest ones."
    )
