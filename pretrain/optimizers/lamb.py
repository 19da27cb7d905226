"""LAMB (arXiv 1904.00962), an optimizer for large batches."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.device_copies import to_device
from pretrain.optimizers.adam import AdamInputs, StepFlags, adamw, begin_adam_step
from pretrain.optimizers.placement import Placement, piece_sizes, split_spans

ROW_SIZE = 1024  # elements per row of `_Directions`; on average, half a row per parameter is padding


class LAMB(Optimizer):
    """Adam whose update is scaled, per parameter, by the ratio of the norms of weight and update (Algorithm 2).

    Norms are those of whole parameters. If ZeRO has partitioned them, call `bind` before the first step.

    As in torch's fused AdamW, a step with `found_inf` of 1 changes nothing and is not counted, and gradients are
    divided by `grad_scale`. Both are read on the device, so the host does not wait for them.

    Args:
        params: Parameters or groups. Groups without weight decay take Adam's update unscaled.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Term added to the root of the second moment.
        weight_decay: Weight decay of groups that have none of their own.
    """

    found_inf: Tensor | None = None  # both are set by the training loop before a step, see `StepFlags`
    grad_scale: Tensor | None = None
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
        self._directions: dict[tuple[int, ...], _Directions] = {}

    def bind(self, placement: Placement) -> None:
        """Set which parameters the optimizer's tensors hold; without it, each tensor is a whole parameter."""
        self._placement = placement
        self._directions.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient (collective if they are partitioned)."""
        if self._placement is None:
            everything = (tensor for group in self.param_groups for tensor in group["params"])
            self._placement = Placement.unpartitioned((str(i), tensor) for i, tensor in enumerate(everything))
        flags = StepFlags.of(self)
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if not tensors:
                continue
            inputs = begin_adam_step(self, tensors, flags)
            if group["weight_decay"]:
                self._update_scaled(self._placement, tensors, inputs, flags, group)
            else:
                adamw(tensors, inputs, flags, group, learning_rate=group["lr"], weight_decay=0.0)

    def _update_scaled(
        self, placement: Placement, tensors: list[Tensor], inputs: AdamInputs, flags: StepFlags, group: dict[str, Any]
    ) -> None:
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._directions:
            self._directions[key] = _Directions(placement, tensors)
        layout = self._directions[key]
        weights = placement.parts(tensors, tensors)
        rows, directions = layout.zeros(weights)
        if weights:
            adamw(directions, _parts(placement, tensors, inputs), flags, group, learning_rate=-1.0, weight_decay=0.0)
            torch._foreach_add_(directions, weights, alpha=group["weight_decay"])
        squares = placement.sum_over_ranks(layout.squared_norms(weights, directions))
        if weights:
            rate = _trust_ratio(squares) * flags.scaled(group["lr"])
            rows.mul_(rate.index_select(0, layout.parameter_of_row)[:, None])
            torch._foreach_sub_(weights, directions)


class _Directions:
    """Memory for the update directions of some optimizer tensors, as a matrix with a row or more per range.

    One multiplication of the matrix by a column then scales every range by the trust ratio of its parameter. The ratios
    are on the device, and `torch._foreach_mul_` by a list of such scalars launches one kernel per tensor on a GPU.

    Args:
        placement: Placement of the parameters.
        tensors: Optimizer tensors.
    """

    def __init__(self, placement: Placement, tensors: list[Tensor]) -> None:
        ranges, self._device = placement.ranges_in(tensors), tensors[0].device
        self._num_parameters = len(placement.names)
        num_rows = [-(-each.numel // ROW_SIZE) for each in ranges]
        starts = [0, *itertools.accumulate(num_rows)]
        spans = ((row * ROW_SIZE, each.numel) for row, each in zip(starts, ranges, strict=False))
        self._sizes = piece_sizes(spans, starts[-1] * ROW_SIZE)
        parameters = [each.parameter for each in ranges]
        of_rows = [each.parameter for each, count in zip(ranges, num_rows, strict=True) for _ in range(count)]
        self._parameter_of_range = to_device(parameters, self._device).long()
        self.parameter_of_row = to_device(of_rows, self._device).long()

    def zeros(self, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return a matrix of zeros [rows, ROW_SIZE] and views of it for the ranges, in the shapes of the weights."""
        rows = torch.zeros(len(self.parameter_of_row), ROW_SIZE, device=self._device)
        spans = split_spans(rows.view(-1), self._sizes)
        return rows, [span.view(weight.shape) for span, weight in zip(spans, weights, strict=True)]

    def squared_norms(self, weights: list[Tensor], directions: list[Tensor]) -> Tensor:
        """Return the squared norms [2, parameters] of this rank's ranges of all weights and directions."""
        squares = torch.zeros(2, self._num_parameters, device=self._device)
        if weights:
            norms = torch.stack(torch._foreach_norm([*weights, *directions]))
            squares.index_add_(1, self._parameter_of_range, norms.square().view(2, -1))
        return squares


def _parts(placement: Placement, tensors: list[Tensor], inputs: AdamInputs) -> AdamInputs:
    """Return the parts of Adam's inputs for each range in some optimizer tensors."""
    gradients, first, second = (placement.parts(tensors, values) for values in inputs[:3])
    pairs = zip(tensors, inputs.steps, strict=True)
    return AdamInputs(gradients, first, second, [step for each, step in pairs for _ in placement.ranges_in([each])])


def _trust_ratio(squares: Tensor) -> Tensor:
    """Return the trust ratio of each parameter from the squared norms [2, parameters] of weights and updates."""
    weight_norm, update_norm = squares.sqrt()
    return torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
