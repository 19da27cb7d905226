"""AdamW's direction of any tensor, for the optimizers that do something else with it; arXiv 1711.05101."""

from typing import Any

import torch
from torch import Tensor


def taken(found_inf: Tensor | None, tensor: Tensor) -> Tensor:
    """Return 1 where a step is to be taken, 0 where it is bad: a scalar beside `tensor`."""
    ones = torch.ones((), device=tensor.device)
    return ones if found_inf is None else ones - found_inf.to(ones)


def adam_direction(tensor: Tensor, state: dict[str, Any], group: dict[str, Any], found_inf: Tensor | None) -> Tensor:
    """Update the moments, and return AdamW's direction with the decay in it; a bad step moves nothing."""
    first, second = group["betas"]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), device=tensor.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    gradient, share = tensor.grad, taken(found_inf, tensor)
    assert gradient is not None
    if found_inf is not None:
        gradient = torch.where(share > 0, gradient, 0.0)
    state["step"] += share
    state["exp_avg"].lerp_(gradient, (1 - first) * share)
    state["exp_avg_sq"].lerp_(gradient.square(), (1 - second) * share)
    steps = state["step"].clamp_min(1.0)
    corrected = state["exp_avg"] / (1 - first**steps)
    root = (state["exp_avg_sq"] / (1 - second**steps)).sqrt()
    direction: Tensor = corrected / (root + group["eps"]) + group["weight_decay"] * tensor
    return direction
