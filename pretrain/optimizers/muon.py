"""Muon, which orthogonalizes the momentum of a matrix before the update (Jordan et al. 2024, arXiv 2502.16982)."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.distributed import gather
from pretrain.optimizers.adam import adam_direction, update_factor
from pretrain.optimizers.placement import Placement

MATRICES = "matrices"  # marks the parameter group to orthogonalize
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial that moves all singular values toward 1
NEWTON_SCHULZ_STEPS = 5
EPSILON = 1e-7
ADAMW_RMS = 0.2  # typical root mean square of AdamW's update, so that its learning rates and weight decays carry over
BUCKET_SIZE = 25_000_000  # number of elements of whole matrices that are reduced at a time


class Muon(Optimizer):
    """Muon for the groups marked with `matrices`, AdamW for all others.

    A matrix is orthogonalized as a whole. If ZeRO has partitioned the parameters, call `bind` before the first step:
    then the ranks that share a matrix sum its parts, each rank orthogonalizes some of the matrices, and every rank
    applies its own parts of the result. A step with `found_inf` of 1 changes nothing.

    Args:
        params: Parameter groups.
        lr: Learning rate.
        momentum: Nesterov momentum of matrices.
        betas: Decay rates of AdamW's moments.
        eps: AdamW's term added to the root of the second moment.
    """

    found_inf: Tensor | None = None  # set by `health.py` before a step that may be skipped, as in torch's fused ones
    _placement: Placement | None = None

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0, MATRICES: False}
        super().__init__(params, defaults)
        self._updated_matrices: dict[tuple[int, ...], list[int]] = {}

    def bind(self, placement: Placement) -> None:
        """Set which parameters the optimizer's tensors hold; without it, each tensor is a whole parameter."""
        self._placement = placement

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient (collective if they are partitioned)."""
        if self._placement is None:
            everything = (tensor for group in self.param_groups for tensor in group["params"])
            self._placement = Placement.unpartitioned((str(i), tensor) for i, tensor in enumerate(everything))
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if group[MATRICES] and tensors:
                self._update_matrices(self._placement, tensors, group)
                continue
            for tensor in tensors:
                direction = adam_direction(tensor, self.state[tensor], group, self.found_inf)
                tensor.sub_(group["lr"] * update_factor(self.found_inf, tensor) * direction)

    def _update_matrices(self, placement: Placement, tensors: list[Tensor], group: dict[str, Any]) -> None:
        updates = {tensor: self._update_momentum(tensor, group) for tensor in tensors}
        for bucket in self._buckets(placement, tensors):
            sizes = {index: math.prod(placement.shapes[index]) for index in bucket}
            flat = torch.zeros(sum(sizes.values()), device=tensors[0].device)
            matrices = dict(zip(bucket, torch.split(flat, [*sizes.values()]), strict=True))
            for part, _, update in _local_parts(placement, updates, matrices):
                part.copy_(update)
            flat.copy_(placement.sum_over_ranks(flat))
            for i, (index, matrix) in enumerate(matrices.items()):
                if i % placement.world_size == placement.rank:
                    whole = matrix.view(placement.shapes[index])
                    matrix.copy_(orthogonalize(whole, torch.bfloat16 if whole.is_cuda else whole.dtype).reshape(-1))
                else:
                    matrix.zero_()
            flat.copy_(placement.sum_over_ranks(flat))
            for part, weights, _ in _local_parts(placement, updates, matrices):
                direction = part + group["weight_decay"] * weights
                weights.sub_(group["lr"] * update_factor(self.found_inf, weights) * direction)

    def _update_momentum(self, tensor: Tensor, group: dict[str, Any]) -> Tensor:
        """Update a tensor's momentum and return Nesterov's combination of gradient and momentum."""
        state, factor = self.state[tensor], update_factor(self.found_inf, tensor)
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(tensor)
        gradient = torch.where(factor > 0, tensor.grad, 0.0)  # type: ignore[arg-type]
        state["momentum"].lerp_(gradient, (1 - group["momentum"]) * factor)
        return gradient.lerp(state["momentum"], group["momentum"])

    def _buckets(self, placement: Placement, tensors: list[Tensor]) -> Iterator[list[int]]:
        """Yield the indices of the matrices that any rank updates, in buckets that are the same on every rank."""
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._updated_matrices:
            own = {index for tensor in tensors for index, *_ in placement.ranges[tensor]}
            everyone = set().union(*gather(own)) if placement.world_size > 1 else own
            self._updated_matrices[key] = sorted(everyone)
        bucket: list[int] = []
        for index in self._updated_matrices[key]:
            if bucket and sum(math.prod(placement.shapes[i]) for i in [*bucket, index]) > BUCKET_SIZE:
                yield bucket
                bucket = []
            bucket.append(index)
        if bucket:
            yield bucket


def _local_parts(
    placement: Placement, updates: dict[Tensor, Tensor], matrices: dict[int, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield flat views of this rank's part of each whole matrix, and of the same part of its weights and its update."""
    for tensor, update in updates.items():
        for index, matrix_start, start, numel in placement.ranges[tensor]:
            if index in matrices:
                span = slice(start, start + numel)
                part = matrices[index][matrix_start : matrix_start + numel]
                yield part, tensor.view(-1)[span], update.view(-1)[span]


def orthogonalize(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return approximately U V^T for a matrix U S V^T, scaled to the typical size of AdamW's updates.

    Five Newton-Schulz iterations leave singular values between about 0.7 and 1.2 before scaling.

    Args:
        matrix: Matrix [m, n].
        precision: Data type of the iterations. The authors use bf16, with which they take a GPU a small part of a step.

    Returns:
        A matrix [m, n] of the same data type as the input.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + EPSILON)).to(precision)
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = (x.T if tall else x).to(matrix.dtype) * (ADAMW_RMS * math.sqrt(max(matrix.shape)))
    return orthogonal
