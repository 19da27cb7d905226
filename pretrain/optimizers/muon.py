"""Muon: the momentum of a matrix, made orthogonal, is its step (Jordan et al. 2024, arXiv 2502.16982)."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.distributed import gather
from pretrain.optimizers.adam import adam_direction, taken
from pretrain.optimizers.placement import Placement

MATRICES = "matrices"  # marks the group whose parameters are orthogonalized
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pushes all singular values toward 1
ROUNDS = 5
EPSILON = 1e-7
ADAMS_SIZE = 0.2  # the usual root mean square of AdamW's step, so that its learning rates and decays fit
BUCKET_SIZE = 25_000_000  # elements of whole matrices that are brought together at a time


class Muon(Optimizer):
    """Muon on the groups marked `matrices`, AdamW on the others.

    A matrix is orthogonalized whole: the ranks that hold its pieces bring them together, each does some of the
    matrices, and all take their own pieces of the answer. With `found_inf` of 1 a step moves nothing.

    Args:
        params: groups.
        lr: learning rate.
        momentum: of matrices; Nesterov's.
        betas: of AdamW's moments.
        eps: of AdamW.
    """

    found_inf: Tensor | None = None
    placement: Placement | None = None

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0, MATRICES: False}
        super().__init__(params, defaults)
        self._known: dict[tuple[int, ...], list[int]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        if self.placement is None:
            everything = (tensor for group in self.param_groups for tensor in group["params"])
            self.placement = Placement.of_whole((str(i), tensor) for i, tensor in enumerate(everything))
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if group[MATRICES] and tensors:
                self._move_matrices(self.placement, tensors, group)
                continue
            for tensor in tensors:
                direction = adam_direction(tensor, self.state[tensor], group, self.found_inf)
                tensor.sub_(group["lr"] * taken(self.found_inf, tensor) * direction)

    def _move_matrices(self, placement: Placement, tensors: list[Tensor], group: dict[str, Any]) -> None:
        updates = {tensor: self._momentum(tensor, group) for tensor in tensors}
        for bucket in self._buckets(placement, tensors):
            sizes = {number: math.prod(placement.shapes[number]) for number in bucket}
            flat = torch.zeros(sum(sizes.values()), device=tensors[0].device)
            matrices = dict(zip(bucket, torch.split(flat, [*sizes.values()]), strict=True))
            for part, _, update in _pieces(placement, updates, matrices):
                part.copy_(update)
            flat.copy_(placement.total(flat))
            for i, (number, matrix) in enumerate(matrices.items()):
                if i % placement.world_size == placement.rank:
                    whole = matrix.view(placement.shapes[number])
                    matrix.copy_(orthogonalize(whole, torch.bfloat16 if whole.is_cuda else whole.dtype).reshape(-1))
                else:
                    matrix.zero_()
            flat.copy_(placement.total(flat))
            for part, weights, _ in _pieces(placement, updates, matrices):
                direction = part + group["weight_decay"] * weights
                weights.sub_(group["lr"] * taken(self.found_inf, weights) * direction)

    def _momentum(self, tensor: Tensor, group: dict[str, Any]) -> Tensor:
        """Update a tensor's momentum, and return Nesterov's look ahead."""
        state, share = self.state[tensor], taken(self.found_inf, tensor)
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(tensor)
        gradient = torch.where(share > 0, tensor.grad, 0.0)  # type: ignore[arg-type]
        state["momentum"].lerp_(gradient, (1 - group["momentum"]) * share)
        return gradient.lerp(state["momentum"], group["momentum"])

    def _buckets(self, placement: Placement, tensors: list[Tensor]) -> Iterator[list[int]]:
        """Yield the matrices of which any rank moves a part, some at a time, the same on every rank."""
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._known:
            own = {number for tensor in tensors for number, *_ in placement.ranges[tensor]}
            self._known[key] = sorted(set().union(*gather(own)) if placement.world_size > 1 else own)
        bucket: list[int] = []
        for number in self._known[key]:
            if bucket and sum(math.prod(placement.shapes[i]) for i in [*bucket, number]) > BUCKET_SIZE:
                yield bucket
                bucket = []
            bucket.append(number)
        if bucket:
            yield bucket


def _pieces(
    placement: Placement, updates: dict[Tensor, Tensor], matrices: dict[int, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's pieces of whole matrices, with the weights and the updates that stand there, as flat views."""
    for tensor, update in updates.items():
        for number, first, start, numel in placement.ranges[tensor]:
            if number in matrices:
                here = slice(start, start + numel)
                yield matrices[number][first : first + numel], tensor.view(-1)[here], update.view(-1)[here]


def orthogonalize(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return nearly U V^T of a matrix U S V^T [m, n], scaled to the size of AdamW's steps.

    Newton and Schulz's rounds leave singular values between about 0.7 and 1.2. Taken in bf16, as by the authors, they
    cost a GPU a small part of a step.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + EPSILON)).to(precision)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = (x.T if tall else x).to(matrix.dtype) * (ADAMS_SIZE * math.sqrt(max(matrix.shape)))
    return orthogonal
