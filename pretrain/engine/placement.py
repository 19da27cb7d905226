"""Tell optimizers which parameters the flat tensors of ZeRO hold."""

from collections import defaultdict
from dataclasses import replace

from torch import Tensor

from pretrain import distributed
from pretrain.config import OptimizerConfig
from pretrain.engine.partitions import full_shapes, local_fragments
from pretrain.engine.protocol import TrainingEngine, torch_optimizer
from pretrain.optimizers.lamb import LAMB
from pretrain.optimizers.layer_decay import apply_layer_decay
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.placement import Placement, Range


def bind_optimizer(engine: TrainingEngine, config: OptimizerConfig) -> None:
    """Give LAMB, Muon and layer-wise decay the placement of the parameters; AdamW alone does not need it."""
    if config.name == "adamw" and config.layer_decay == 1:
        return
    optimizer, placement = torch_optimizer(engine), parameter_placement(engine)
    if isinstance(optimizer, LAMB | Muon):
        optimizer.bind(placement)
    if config.layer_decay < 1:
        apply_layer_decay(optimizer, placement, config.layer_decay)


def parameter_placement(engine: TrainingEngine) -> Placement:
    """Return which ranges of which parameters the tensors of an engine's optimizer hold on this rank."""
    shapes = full_shapes(engine)
    indices = {name: index for index, name in enumerate(shapes)}
    ranges: dict[Tensor, list[Range]] = defaultdict(list)
    is_partitioned = False
    for fragment in local_fragments(engine):
        if fragment.state is not None:
            index = indices[fragment.name]
            ranges[fragment.master].append(Range(index, fragment.start, fragment.offset, fragment.numel))
            is_partitioned = is_partitioned or not fragment.replicated
    for each in ranges.values():
        each.sort(key=lambda one: one.tensor_start)
    placement = Placement([*shapes], [*shapes.values()], ranges)
    if not is_partitioned:
        return placement
    return replace(
        placement, sum_over_ranks=_sum_on_device, rank=distributed.rank(), world_size=distributed.world_size()
    )


def _sum_on_device(values: Tensor) -> Tensor:
    return distributed.sum_over_ranks(values.to(distributed.device())).to(values.device)
