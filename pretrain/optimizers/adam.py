"""AdamW (arXiv 1711.05101) by torch's fused operation, for optimizers that scale its update or replace a part of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class StepFlags(NamedTuple):
    """Scalars on the device that tell an optimizer how to take a step, so that the host need not know them.

    They are set as attributes of the optimizer before a step, as for torch's fused AdamW.

    Attributes:
        found_inf: 1 to change nothing in this step, else 0, in fp32; None applies the step.
        grad_scale: Number by which gradients are divided, in fp32; None leaves them as they are.
    """

    found_inf: Tensor | None
    grad_scale: Tensor | None

    @classmethod
    def of(cls, optimizer: Optimizer) -> "StepFlags":
        """Return the flags that are set on an optimizer."""
        return cls(getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None))

    def scaled(self, learning_rate: float) -> float | Tensor:
        """Return the learning rate, or 0 if the step is to change nothing; a scalar on the device with `found_inf`."""
        return learning_rate if self.found_inf is None else learning_rate * (1 - self.found_inf)


class AdamInputs(NamedTuple):
    """What Adam's update direction depends on, one entry of each list per tensor or per part of a tensor.

    Attributes:
        gradients: Gradients; divided by `StepFlags.grad_scale` in place.
        first: First moments.
        second: Second moments.
        steps: Number of steps taken, with the current one, as fp32 scalars.
    """

    gradients: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]


def begin_adam_step(optimizer: Optimizer, tensors: list[Tensor], flags: StepFlags) -> AdamInputs:
    """Count a step in Adam's state of tensors with gradients, which is created if it does not exist."""
    states = [optimizer.state[tensor] for tensor in tensors]
    for tensor, state in zip(tensors, states, strict=True):
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=tensor.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1.0)
    if flags.found_inf is not None:
        torch._foreach_sub_(steps, [flags.found_inf] * len(steps))
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    return AdamInputs(gradients, first, second, steps)


def adamw(
    weights: list[Tensor],
    inputs: AdamInputs,
    flags: StepFlags,
    group: dict[str, Any],
    *,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Update Adam's moments, and weights by AdamW, in one operation.

    Args:
        weights: Tensors in the shapes and memory layouts of the inputs.
        inputs: Gradients, moments and steps from `begin_adam_step`, or parts of them.
        flags: Flags of the step.
        group: Parameter group, with `betas` and `eps`.
        learning_rate: Learning rate; with -1 and without weight decay, Adam's direction is added to the weights.
        weight_decay: Weight decay, which is multiplied by the learning rate.
    """
    first, second = group["betas"]
    torch._fused_adamw_(
        weights,
        inputs.gradients,
        inputs.first,
        inputs.second,
        max_exp_avg_sqs=[],
        state_steps=inputs.steps,
        lr=learning_rate,
        beta1=first,
        beta2=second,
        weight_decay=weight_decay,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=flags.grad_scale,
        found_inf=flags.found_inf,
    )
