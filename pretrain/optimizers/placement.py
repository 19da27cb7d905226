"""Where an optimizer's tensors hold the parameters, which ZeRO lays end to end and cuts; Adam's step on any of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Range(NamedTuple):
    """A range of one flat parameter, from `first` on, in a flat tensor that an optimizer moves, from `start` on."""

    parameter: int
    first: int
    start: int
    numel: int


@dataclass(frozen=True)
class Placement:
    """Which parameters the tensors hold.

    Attributes:
        names: of all parameters, over all ranks.
        shapes: of the same.
        ranges: of each tensor that this rank moves.
        total: adds up what each rank has of its own ranges.
        rank: of this process, among those that have parts of a parameter.
        world_size: how many these are.
    """

    names: list[str]
    shapes: list[list[int]]
    ranges: dict[Tensor, list[Range]]
    total: Callable[[Tensor], Tensor] = lambda values: values
    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_whole(cls, named: Iterable[tuple[str, Tensor]]) -> "Placement":
        """Return that of tensors which are the parameters themselves, each with its name."""
        names, tensors = zip(*named, strict=True)
        ranges = {tensor: [Range(i, 0, 0, tensor.numel())] for i, tensor in enumerate(tensors)}
        return cls([*names], [list(tensor.shape) for tensor in tensors], ranges)


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
