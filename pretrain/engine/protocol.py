"""What the rest of the project uses of DeepSpeed's engine, typed, without an import of DeepSpeed."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class TrainingEngine(Protocol):
    """A model with its optimizer under ZeRO. `deepspeed.DeepSpeedEngine`, which has no types, fits this protocol.

    Attributes:
        enable_backward_allreduce: Whether DeepSpeed reduces the gradients in the last backward pass of a step.
    """

    enable_backward_allreduce: bool

    @property
    def module(self) -> nn.Module:
        """The objective that is trained."""

    @property
    def device(self) -> torch.device:
        """The device of this rank."""

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer, or the torch optimizer itself at stage 0 in fp32; see `torch_optimizer`."""

    def __call__(self, batch: Mapping[str, object], output: str = "losses") -> dict[str, Tensor]:
        """Return the objective's output for one micro-batch (collective at ZeRO stage 3)."""

    def backward(self, loss: Tensor) -> object:
        """Add the gradients of a micro-batch; the last one of a step also reduces them over the ranks (collective)."""

    def step(self) -> object:
        """Update the weights if the last micro-batch of a step is done (collective)."""

    def train(self, mode: bool = True) -> object:
        """Switch the module to training mode, or to evaluation mode with `mode=False`."""

    def eval(self) -> object:
        """Switch the module to evaluation mode."""


def torch_optimizer(engine: TrainingEngine) -> Optimizer:
    """Return the torch optimizer that updates the weights, without the ZeRO optimizer around it."""
    optimizer: Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer
