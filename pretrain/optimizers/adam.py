"""AdamW's update direction (arXiv 1711.05101), for optimizers that scale or replace it."""

from typing import Any

import torch
from torch import Tensor


def update_factor(found_inf: Tensor | None, tensor: Tensor) -> Tensor:
    """Return 1 if the step is to be applied and 0 if it is to be skipped.

    Args:
        found_inf: 1 to skip the step, else 0, a scalar tensor; None applies it.
        tensor: Tensor whose device the result has.
    """
    ones = torch.ones((), device=tensor.device)
    return ones if found_inf is None else ones - found_inf.to(ones)


def adam_direction(tensor: Tensor, state: dict[str, Any], group: dict[str, Any], found_inf: Tensor | None) -> Tensor:
    """Update Adam's moments and return the direction that AdamW multiplies by the learning rate and subtracts.

    Args:
        tensor: Weights, of any shape, with a gradient.
        state: Optimizer state of the tensor; the moments are created in it if it is empty.
        group: Parameter group, with `betas`, `eps` and `weight_decay`.
        found_inf: 1 to keep the moments as they are, else 0, a scalar tensor; None updates them.

    Returns:
        The bias-corrected direction with decoupled weight decay, in the tensor's shape.
    """
    first, second = group["betas"]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), device=tensor.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    gradient, factor = tensor.grad, update_factor(found_inf, tensor)
    assert gradient is not None
    if found_inf is not None:
        gradient = torch.where(factor > 0, gradient, 0.0)
    state["step"] += factor
    state["exp_avg"].lerp_(gradient, (1 - first) * factor)
    state["exp_avg_sq"].lerp_(gradient.square(), (1 - second) * factor)
    steps = state["step"].clamp_min(1.0)
    corrected = state["exp_avg"] / (1 - first**steps)
    root = (state["exp_avg_sq"] / (1 - second**steps)).sqrt()
    direction: Tensor = corrected / (root + group["eps"]) + group["weight_decay"] * tensor
    return direction
