"""Where an optimizer's tensors hold the parameters, which ZeRO lays end to end and cuts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

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
