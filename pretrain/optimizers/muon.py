"""Muon, which orthogonalizes the momentum of a matrix before the update (Jordan et al. 2024, arXiv 2502.16982)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.averaging import move_averages
from pretrain.distributed import gather
from pretrain.optimizers.adam import StepFlags, adamw, begin_adam_step
from pretrain.optimizers.placement import Placement, Range, piece_sizes, split_spans

MATRICES = "matrices"  # marks the parameter group to orthogonalize
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial that moves all singular values toward 1
NEWTON_SCHULZ_STEPS = 5
EPSILON = 1e-7
ADAMW_RMS = 0.2  # typical root mean square of AdamW's update, so that its learning rates and weight decays carry over
BUCKET_SIZE = 2**25  # elements of matrices that are orthogonalized at a time; the 48 square ones of ViT-B fit


class Muon(Optimizer):
    """Muon for the groups marked with `matrices`, AdamW for all others.

    A matrix is orthogonalized as a whole, together with others of its shape. If ZeRO has partitioned the parameters,
    call `bind` before the first step: then the ranks that share a matrix sum its parts, each rank orthogonalizes some
    of the matrices, and every rank applies its own parts of the result.

    As in torch's fused AdamW, a step with `found_inf` of 1 changes nothing, and gradients are divided by `grad_scale`.
    Both are read on the device, so the host does not wait for them.

    Args:
        params: Parameter groups.
        lr: Learning rate.
        momentum: Nesterov momentum of matrices.
        betas: Decay rates of AdamW's moments.
        eps: AdamW's term added to the root of the second moment.
    """

    found_inf: Tensor | None = None  # both are set by the training loop before a step, see `StepFlags`
    grad_scale: Tensor | None = None
    _placement: Placement | None = None

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0, MATRICES: False}
        super().__init__(params, defaults)
        self._buckets: dict[tuple[int, ...], list[_Bucket]] = {}

    def bind(self, placement: Placement) -> None:
        """Set which parameters the optimizer's tensors hold; without it, each tensor is a whole parameter."""
        self._placement = placement
        self._buckets.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient (collective if they are partitioned)."""
        if self._placement is None:
            everything = (tensor for group in self.param_groups for tensor in group["params"])
            self._placement = Placement.unpartitioned((str(i), tensor) for i, tensor in enumerate(everything))
        flags = StepFlags.of(self)
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors and group[MATRICES]:
                self._update_matrices(self._placement, tensors, flags, group)
            elif tensors:
                inputs = begin_adam_step(self, tensors, flags)
                decay = group["weight_decay"]
                adamw(tensors, inputs, flags, group, learning_rate=group["lr"], weight_decay=decay)

    def _update_matrices(
        self, placement: Placement, tensors: list[Tensor], flags: StepFlags, group: dict[str, Any]
    ) -> None:
        momenta = [self._momentum(tensor) for tensor in tensors]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        parts = _Parts(*(placement.parts(tensors, values) for values in (tensors, gradients, momenta)))
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._buckets:
            self._buckets[key] = [*_buckets(placement, tensors)]
        rate = flags.scaled(group["lr"])
        for bucket in self._buckets[key]:
            weights, gradients, momenta = ([values[i] for i in bucket.positions] for values in parts)
            matrices, updates = bucket.zeros(tensors[0].device, weights)
            if updates:
                _write_updates(matrices, updates, gradients, momenta, flags, group["momentum"])
            _orthogonalize_on_ranks(placement, matrices)
            if updates:
                torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
                matrices.mul_(rate)
                torch._foreach_sub_(weights, updates)

    def _momentum(self, tensor: Tensor) -> Tensor:
        state = self.state[tensor]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(tensor)
        momentum: Tensor = state["momentum"]
        return momentum


class _Parts(NamedTuple):
    """This rank's ranges of weights, gradients and momenta, in the order of `Placement.ranges_in`."""

    weights: list[Tensor]
    gradients: list[Tensor]
    momenta: list[Tensor]


@dataclass(frozen=True)
class _Bucket:
    """Matrices of one shape that are orthogonalized together.

    Attributes:
        shape: Number of matrices, of rows and of columns.
        positions: Positions of this rank's ranges of the matrices in `Placement.ranges_in`.
        sizes: Sizes for `split_spans`, which returns these ranges of the flattened matrices.
    """

    shape: tuple[int, int, int]
    positions: list[int]
    sizes: list[int]

    def zeros(self, device: torch.device, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return matrices of zeros [K, m, n] and views of this rank's ranges, in the shapes of the weights."""
        matrices = torch.zeros(self.shape, device=device)
        spans = split_spans(matrices.view(-1), self.sizes)
        return matrices, [span.view(weight.shape) for span, weight in zip(spans, weights, strict=True)]


def _buckets(placement: Placement, tensors: list[Tensor]) -> Iterator[_Bucket]:
    """Yield buckets of the matrices that any rank updates, the same on every rank (collective if partitioned)."""
    ranges = placement.ranges_in(tensors)
    own = {each.parameter for each in ranges}
    everyone = set().union(*gather(own)) if placement.world_size > 1 else own
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(everyone):
        by_shape.setdefault(tuple(placement.shapes[index]), []).append(index)
    for (height, width), indices in by_shape.items():
        count = max(1, BUCKET_SIZE // (height * width))
        for first in range(0, len(indices), count):
            yield _bucket(ranges, indices[first : first + count], height, width)


def _bucket(ranges: list[Range], indices: list[int], height: int, width: int) -> _Bucket:
    numel = height * width
    first = {index: i * numel for i, index in enumerate(indices)}
    spans = {
        position: (first[each.parameter] + each.parameter_start, each.numel)
        for position, each in enumerate(ranges)
        if each.parameter in first
    }
    positions = sorted(spans, key=lambda position: spans[position])
    sizes = piece_sizes((spans[position] for position in positions), len(indices) * numel)
    return _Bucket((len(indices), height, width), positions, sizes)


def _write_updates(
    matrices: Tensor,
    updates: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    flags: StepFlags,
    momentum: float,
) -> None:
    """Update momenta, and write Nesterov's combination of gradients and momenta into the updates.

    Args:
        matrices: Memory of the updates.
        updates: Views of the matrices for this rank's ranges.
        gradients: Gradients of the ranges.
        momenta: Momenta of the ranges.
        flags: Flags of the step; one that changes nothing takes gradients of zero, because 0 times NaN is NaN.
        momentum: Share of the old momentum in the new one.
    """
    torch._foreach_copy_(updates, gradients)
    if flags.grad_scale is not None:
        matrices.div_(flags.grad_scale)
    if flags.found_inf is not None:
        matrices.masked_fill_(flags.found_inf > 0, 0.0)
    move_averages(momenta, updates, 1 - momentum, flags.found_inf)
    torch._foreach_lerp_(updates, momenta, momentum)


def _orthogonalize_on_ranks(placement: Placement, matrices: Tensor) -> None:
    """Orthogonalize matrices [K, m, n] in place (collective if the parameters are partitioned).

    Args:
        placement: Placement of the parameters; its ranks divide the work.
        matrices: Parts of the matrices that this rank holds, and zeros elsewhere.
    """
    is_shared = placement.world_size > 1
    if is_shared:
        matrices.copy_(placement.sum_over_ranks(matrices))
    own = matrices[placement.rank :: placement.world_size]
    orthogonal = orthogonalize(own, torch.bfloat16 if own.is_cuda else own.dtype)
    if is_shared:
        matrices.zero_()
    own.copy_(orthogonal)
    if is_shared:
        matrices.copy_(placement.sum_over_ranks(matrices))


def orthogonalize(matrices: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return approximately U V^T for each matrix U S V^T, scaled to the typical size of AdamW's updates.

    Five Newton-Schulz iterations leave singular values between about 0.7 and 1.2 before scaling.

    Args:
        matrices: Matrices [K, m, n].
        precision: Data type of the iterations. The authors use bf16, with which they take a GPU a small part of a step.

    Returns:
        Matrices [K, m, n] of the same data type as the input.
    """
    height, width = matrices.shape[1:]
    x = matrices.mT if height > width else matrices
    x = (x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + EPSILON)).to(precision)
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if height > width else x
    return x.to(matrices.dtype) * (ADAMW_RMS * math.sqrt(max(height, width)))
