"""LAMB (arXiv 1904.00962), an optimizer for large batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optimizers.adam import adam_direction, update_factor
from pretrain.optimizers.placement import Placement


class LAMB(Optimizer):
    """Adam whose update is scaled, per parameter, by the ratio of the norms of weight and update (Algorithm 2).

    Norms are those of whole parameters. If ZeRO has partitioned them, call `bind` before the first step.

    As in torch's fused AdamW, a step with `found_inf` of 1 changes nothing and is not counted. The flag is read on the
    device, so the host does not wait for it.

    Args:
        params: Parameters or groups. Groups without weight decay take Adam's update unscaled.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Term added to the root of the second moment.
        weight_decay: Weight decay of groups that have none of their own.
    """

    found_inf: Tensor | None = None  # set by `health.py` before a step that may be skipped, as in torch's fused ones
    _placement: Placement | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def bind(self, placement: Placement) -> None:
        """Set which parameters the optimizer's tensors hold; without it, each tensor is a whole parameter."""
        self._placement = placement

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        pairs = [(tensor, group) for group in self.param_groups for tensor in group["params"]]
        if self._placement is None:
            self._placement = Placement.unpartitioned((str(i), tensor) for i, (tensor, _) in enumerate(pairs))
        updated = [(tensor, group) for tensor, group in pairs if tensor.grad is not None]
        if not updated:
            return
        ranges = self._placement.ranges
        directions = [adam_direction(tensor, self.state[tensor], group, self.found_inf) for tensor, group in updated]
        squares = torch.zeros(2, len(self._placement.names), device=updated[0][0].device)
        for (tensor, _), direction in zip(updated, directions, strict=True):
            for index, _, start, numel in ranges[tensor]:
                for row, values in enumerate((tensor, direction)):
                    squares[row, index] += values.view(-1)[start : start + numel].square().sum()
        weight_norm, update_norm = self._placement.sum_over_ranks(squares).sqrt()
        trust_ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        for (tensor, group), direction in zip(updated, directions, strict=True):
            for index, _, start, numel in ranges[tensor]:
                scale = trust_ratio[index] if group["weight_decay"] else 1.0
                factor = group["lr"] * update_factor(self.found_inf, tensor) * scale
                tensor.view(-1)[start : start + numel] -= factor * direction.view(-1)[start : start + numel]
