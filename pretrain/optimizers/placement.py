"""Which parameters an optimizer's tensors hold.

ZeRO flattens the parameters, joins them and cuts the result into partitions, so one optimizer tensor may hold ranges of
several parameters, and one parameter may be spread over several ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Range(NamedTuple):
    """A range of a flattened parameter inside a flattened optimizer tensor.

    Attributes:
        parameter: Index of the parameter in `Placement.names`.
        parameter_start: First element of the range in the flattened parameter.
        tensor_start: First element of the range in the flattened optimizer tensor.
        numel: Number of elements in the range.
    """

    parameter: int
    parameter_start: int
    tensor_start: int
    numel: int


@dataclass(frozen=True)
class Placement:
    """Which parameters the optimizer tensors of this rank hold.

    Attributes:
        names: Names of all parameters, on all ranks.
        shapes: Shapes of all parameters before partitioning, in the order of `names`.
        ranges: Ranges in each optimizer tensor of this rank, in the order of `Range.tensor_start`.
        sum_over_ranks: Function that sums a tensor over the ranks that share the parameters.
        rank: Number of this rank among those that share the parameters.
        world_size: Number of ranks that share the parameters; 1 if they are not partitioned.
    """

    names: list[str]
    shapes: list[list[int]]
    ranges: dict[Tensor, list[Range]]
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values
    rank: int = 0
    world_size: int = 1

    @classmethod
    def unpartitioned(cls, named: Iterable[tuple[str, Tensor]]) -> "Placement":
        """Return the placement for optimizer tensors that are whole parameters.

        Args:
            named: Name and tensor of each parameter.
        """
        names, tensors = zip(*named, strict=True)
        ranges = {tensor: [Range(i, 0, 0, tensor.numel())] for i, tensor in enumerate(tensors)}
        return cls([*names], [list(tensor.shape) for tensor in tensors], ranges)

    def ranges_in(self, tensors: Iterable[Tensor]) -> list[Range]:
        """Return the ranges in some optimizer tensors, in the order of `parts`."""
        return [each for tensor in tensors for each in self.ranges.get(tensor, ())]

    def parts(self, tensors: Iterable[Tensor], values: Iterable[Tensor]) -> list[Tensor]:
        """Return views of the ranges in some optimizer tensors.

        Args:
            tensors: Optimizer tensors.
            values: Values for each of the tensors in its shape, such as its gradient, or the tensor itself.

        Returns:
            A view of the values for each of `ranges_in(tensors)`: in the shape of the tensor if the range is the whole
            tensor, else [numel].
        """
        found: list[Tensor] = []
        for tensor, value in zip(tensors, values, strict=True):
            sizes = self._piece_sizes.get(tensor, [tensor.numel()])  # one without ranges is padding only
            found.extend([value] if sizes is None else split_spans(value.view(-1), sizes))
        return found

    @cached_property
    def _piece_sizes(self) -> dict[Tensor, list[int] | None]:
        """For each tensor the sizes for `split_spans`, or None if it is a single range."""
        sizes: dict[Tensor, list[int] | None] = {}
        for tensor, ranges in self.ranges.items():
            is_single = len(ranges) == 1 and ranges[0].numel == tensor.numel()
            spans = ((each.tensor_start, each.numel) for each in ranges)
            sizes[tensor] = None if is_single else piece_sizes(spans, tensor.numel())
        return sizes


def piece_sizes(spans: Iterable[tuple[int, int]], numel: int) -> list[int]:
    """Return the sizes of the pieces into which spans divide a flat tensor: gap, span, gap, ..., span, gap.

    Args:
        spans: First element and number of elements of each span, in ascending order and without overlap.
        numel: Number of elements of the tensor.
    """
    sizes, end = [], 0
    for start, length in spans:
        sizes += [start - end, length]
        end = start + length
    return [*sizes, numel - end]


def split_spans(flat: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Return views of the spans of a flat tensor, with one operation for all of them.

    Args:
        flat: Tensor [N].
        sizes: Sizes from `piece_sizes`.
    """
    return torch.split_with_sizes(flat, sizes)[1::2]
