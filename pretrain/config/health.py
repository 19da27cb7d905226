"""The `health` section: bad steps and hanging ranks."""

from pydantic import Field

from pretrain.config.section import Count, CountOrZero, NonNegative, Section


class HealthConfig(Section):
    """Limits for skipped steps, rollbacks and ranks that hang."""

    spike_threshold: NonNegative = Field(
        20.0,
        description="Distance above the recent median, in standard deviations (estimated from the median absolute "
        "deviation), beyond which a loss or gradient norm is a spike and its step is skipped; 0 skips only values that "
        "are not finite.",
    )
    max_consecutive_skips: Count = Field(
        5, description="Number of skipped steps in a row at which the run rolls back to its last checkpoint."
    )
    max_rollbacks: CountOrZero = Field(
        3, description="Number of rollbacks; the run ends as diverged when it would need another."
    )
    hang_seconds: NonNegative = Field(
        300.0,
        description="Seconds without progress before a hanging rank ends the run (four times as long if all ranks are "
        "stuck); 0 disables the check.",
    )
