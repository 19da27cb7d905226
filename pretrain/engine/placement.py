"""Tell an optimizer which parameters its flat tensors hold."""

from collections import defaultdict
from dataclasses import replace

from torch import Tensor

from pretrain import distributed
from pretrain.config import OptimizerConfig
from pretrain.engine.deepspeed import Engine
from pretrain.engine.partitions import held, shapes
from pretrain.optimizers.lamb import LAMB
from pretrain.optimizers.layer_decay import decay_by_layer
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.placement import Placement, Range


def bind_optimizer(engine: Engine, config: OptimizerConfig) -> None:
    """Tell an optimizer that asks for it which parameters its flat tensors hold."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if config.name == "adamw" and config.layer_decay == 1:
        return
    placement = place(engine)
    if isinstance(optimizer, LAMB | Muon):
        optimizer.placement = placement
    if config.layer_decay < 1:
        decay_by_layer(optimizer, placement, config.layer_decay)


def place(engine: Engine) -> Placement:
    """Say which parameters the tensors of an engine's optimizer hold."""
    whole = shapes(engine)
    numbers = {name: number for number, name in enumerate(whole)}
    ranges: dict[Tensor, list[Range]] = defaultdict(list)
    is_cut = False
    for fragment in held(engine):
        if fragment.moments is not None:
            number = numbers[fragment.name]
            ranges[fragment.master].append(Range(number, fragment.start, fragment.offset, fragment.numel))
            is_cut = is_cut or not fragment.shared
    placement = Placement([*whole], [*whole.values()], ranges)
    if not is_cut:
        return placement
    return replace(placement, total=_sum_on_device, rank=distributed.rank(), world_size=distributed.world_size())


def _sum_on_device(values: Tensor) -> Tensor:
    return distributed.sum_over_ranks(values.to(distributed.device())).to(values.device)
