"""The `optimizer` section."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pretrain.config.section import NonNegative, Positive, Problem, Rate, Section

REFERENCE_BATCH_SIZE = 256  # global batch at which the learning rate applies as given


class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101), LAMB (arXiv 1904.00962) or Muon (arXiv 2502.16982).

    Weight decay applies to matrices. Biases, norms, CLS, positions and mask tokens are not decayed.
    """

    name: Literal["adamw", "lamb", "muon"] = Field(
        "adamw",
        description='Optimizer: "adamw", "lamb", or "muon" for the matrices of the blocks with AdamW for the rest.',
    )
    learning_rate: Positive = Field(
        1e-4, description="Peak learning rate; the default suits a global batch of 256. See scaling for other batches."
    )
    scaling: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description='Scaling of the learning rate with the batch: "linear" multiplies it by global_batch_size / 256 '
        '(arXiv 1706.02677), "sqrt" by the root of that, "none" leaves it.',
    )
    weight_decay: NonNegative = Field(0.05, description="Weight decay of matrices; multiplied by the learning rate.")
    betas: tuple[Rate, Rate] = Field((0.9, 0.999), description="Decay rates of Adam's first and second moment.")
    epsilon: Positive = Field(1e-8, description="Term added to the root of Adam's second moment.")
    momentum: Rate = Field(0.95, description="Momentum of muon; the other optimizers ignore it.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Learning rate factor from each block to the one below it (arXiv 2003.10555); 1 disables it.",
    )

    def problems(self) -> Iterator[Problem]:
        if self.name == "lamb" and not self.weight_decay:
            yield Problem(("weight_decay", "name"), "LAMB needs a value above 0; increase it or use name=adamw")

    def peak_learning_rate(self, global_batch_size: int) -> float:
        """Return the peak learning rate, scaled to the global batch by `scaling`."""
        times = global_batch_size / REFERENCE_BATCH_SIZE
        return self.learning_rate * {"none": 1.0, "linear": times, "sqrt": math.sqrt(times)}[self.scaling]

    def describe_learning_rate(self, global_batch_size: int) -> str:
        """Describe the peak learning rate and its scaling in a few words, for the log."""
        ratio = f"{global_batch_size} / {REFERENCE_BATCH_SIZE}"
        factor = {"none": "", "linear": f" ({self.learning_rate:g} x {ratio})"}
        factor["sqrt"] = f" ({self.learning_rate:g} x sqrt({ratio}))"
        return f"learning rate {self.peak_learning_rate(global_batch_size):.3g}{factor[self.scaling]}"
