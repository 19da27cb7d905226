"""The `engine` section: batches, precision and DeepSpeed."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pretrain.config.augment import AugmentConfig
from pretrain.config.section import Count, NonNegative, Problem, Section


class BatchConfig(Section):
    """Batch sizes and gradient clipping. Gradient accumulation follows from the batch sizes and the number of ranks."""

    global_batch_size: Count = Field(
        256, description="Images per optimizer step over all ranks; ranks share it unevenly if it is not divisible."
    )
    micro_batch_size: Count = Field(
        64, description="Largest number of images in one forward pass on a rank; lower it when memory runs out."
    )
    gradient_clipping: NonNegative = Field(1.0, description="Largest norm of the gradient; 0 disables clipping.")

    def accumulation_steps(self, world_size: int) -> int:
        """Return the number of micro-batches per step: as many as the rank with the most images needs."""
        return -(-self.global_batch_size // (self.micro_batch_size * world_size))

    def mixing_problems(self, augment: AugmentConfig) -> Iterator[Problem]:
        """Yield what prevents mixup and CutMix from pairing neighbors; keys are relative to the whole config."""
        for name in ("micro_batch_size", "global_batch_size"):
            if augment.mixes and getattr(self, name) % 2:
                sentence = f"must be even for mixup and cutmix, got {getattr(self, name)}; change it by one"
                yield Problem((f"engine.{name}",), sentence)


class EngineConfig(BatchConfig):
    """Batch sizes, precision and DeepSpeed's memory savings."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="ZeRO stage: 0 partitions nothing, 1 optimizer states, 2 also gradients, 3 also weights; "
        "higher stages save memory and communicate more.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Precision of weights and activations in training; bf16 keeps fp32 master weights."
    )
    offload_optimizer: bool = Field(
        False, description="Whether to keep optimizer states in CPU memory; saves GPU memory and is slower."
    )
    activation_checkpointing: bool = Field(
        False, description="Whether to recompute activations in the backward pass; saves memory and is slower."
    )
    deterministic: bool = Field(
        False,
        description="Whether to use only deterministic algorithms; slower, but a run repeats exactly on the same GPUs. "
        "On a CPU, runs repeat exactly without it.",
    )
    compile: bool = Field(
        False,
        description="Whether to compile model, loss and augmentation of a training step with torch.compile; faster on "
        "a GPU after a minute of compiling. Evaluation is not compiled.",
    )

    def problems(self) -> Iterator[Problem]:
        if self.offload_optimizer and self.zero_stage == 0:
            sentence = "requires zero_stage 1, 2 or 3; raise zero_stage or turn offloading off"
            yield Problem(("offload_optimizer", "zero_stage"), sentence)
