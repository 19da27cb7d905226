"""The `ema` section: the moving average of the weights."""

from pydantic import Field

from pretrain.config.section import Rate, Section


class EmaConfig(Section):
    """Exponential moving average of the weights. If enabled, the average is what is validated and exported."""

    decay: Rate = Field(
        0.0, description="Decay per step; 0.9999 averages over roughly 10,000 steps. 0 disables the average."
    )
