"""Which parameters an optimizer's tensors hold.

ZeRO flattens the parameters, joins them and cuts the result into partitions, so one optimizer tensor may hold ranges of
several parameters, and one parameter may be spread over several ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

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
        ranges: Ranges in each optimizer tensor of this rank.
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
