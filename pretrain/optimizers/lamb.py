"""LAMB (arXiv 1904.00962), for large batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optimizers.adam import adam_direction, taken
from pretrain.optimizers.placement import Placement


class LAMB(Optimizer):
    """Adam's step of each decayed parameter, as long as the parameter itself times the rate.

    A parameter's length is that of all of it, wherever its pieces lie: `placement` says where, once ZeRO has cut them.
    As with the fused AdamW, a step with `found_inf` of 1 moves nothing and is not counted, without the host knowing.

    Args:
        params: parameters or groups; those without weight decay take Adam's step as it is.
        lr: learning rate.
        betas: of the moments.
        eps: added to the second moment's root.
        weight_decay: of groups that have none of their own.
    """

    found_inf: Tensor | None = None
    placement: Placement | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        pairs = [(tensor, group) for group in self.param_groups for tensor in group["params"]]
        if self.placement is None:
            self.placement = Placement.of_whole((str(i), tensor) for i, (tensor, _) in enumerate(pairs))
        moved = [(tensor, group) for tensor, group in pairs if tensor.grad is not None]
        if not moved:
            return
        ranges = self.placement.ranges
        directions = [adam_direction(tensor, self.state[tensor], group, self.found_inf) for tensor, group in moved]
        squares = torch.zeros(2, len(self.placement.names), device=moved[0][0].device)
        for (tensor, _), direction in zip(moved, directions, strict=True):
            for number, _, start, numel in ranges[tensor]:
                for row, values in enumerate((tensor, direction)):
                    squares[row, number] += values.view(-1)[start : start + numel].square().sum()
        length, own = self.placement.total(squares).sqrt()
        trust = torch.where((length > 0) & (own > 0), length / own, 1.0)
        for (tensor, group), direction in zip(moved, directions, strict=True):
            for number, _, start, numel in ranges[tensor]:
                factor = group["lr"] * taken(self.found_inf, tensor) * (trust[number] if group["weight_decay"] else 1.0)
                tensor.view(-1)[start : start + numel] -= factor * direction.view(-1)[start : start + numel]
