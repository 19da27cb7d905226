"""What each rank holds of every parameter, at any ZeRO stage: the only file of ours that knows how ZeRO partitions.

Saving reads these fragments and loading writes them, so whatever one topology saved, any other can load.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.engine.deepspeed import Engine

WEIGHT = "weight"  # beside it stand the optimizer's own kinds, such as exp_avg
EMA = "ema"  # and the average of the weights, where one is kept


@dataclass(frozen=True)
class Fragment:
    """A range of a flat parameter or buffer that this rank holds in fp32, with the optimizer's moments of it.

    Attributes:
        name: in the objective.
        start: of the range.
        numel: of the range.
        master: the tensor that the optimizer moves; it holds the range from `offset` on.
        offset: in the flat master, and in every moment.
        moments: the optimizer's state of the master; None where it moves nothing.
        shared: whether every rank holds the same.
    """

    name: str
    start: int
    numel: int
    master: Tensor
    offset: int
    moments: dict[str, Any] | None
    shared: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """What there is of it: the weight, and each moment of the same shape."""
        found = (kind for kind, value in (self.moments or {}).items() if _is_like(value, self.master))
        return (WEIGHT, *sorted(found))

    def view(self, kind: str) -> Tensor:
        """Return the range itself, [numel]; what is written there, the engine has."""
        tensor = self.master if kind == WEIGHT else (self.moments or {})[kind]
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def held(engine: Engine) -> list[Fragment]:
    """Return all that this rank holds."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    copies = _unsharded_masters(optimizer)
    fragments = []
    for name, parameter in engine.module.named_parameters():
        start, numel, master, offset = _place(optimizer, parameter, copies)
        if numel:
            moments = inner.state[master] if parameter.requires_grad else None
            shared = not hasattr(parameter, "ds_tensor") and not hasattr(parameter, "_hp_mapping")
            fragments.append(Fragment(name, start, numel, master, offset, moments, shared))
    saved = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            fragments.append(Fragment(name, 0, buffer.numel(), buffer, 0, None, shared=True))
    return fragments


def owned(engine: Engine) -> list[Fragment]:
    """Return what this rank saves: its own partition, and its share of whatever every rank holds."""
    rank, world_size = distributed.rank(), distributed.world_size()
    fragments = []
    for fragment in held(engine):
        if not fragment.shared:
            fragments.append(fragment)
            continue
        first, last = fragment.numel * rank // world_size, fragment.numel * (rank + 1) // world_size
        if first < last:
            fragments.append(replace(fragment, start=first, numel=last - first, offset=fragment.offset + first))
    return fragments


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the whole shape of all that is saved."""
    saved = engine.module.state_dict().keys()
    found = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    return found | {name: list(buffer.shape) for name, buffer in engine.module.named_buffers() if name in saved}


def optimizer_steps(engine: Engine) -> float:
    """Return how many steps the optimizer has taken; AdamW corrects its bias by that."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return max((float(state["step"]) for state in inner.state.values() if "step" in state), default=0.0)


def make_moments(fragments: list[Fragment], kinds: Mapping[str, Iterable[str]], steps: float) -> None:
    """Give the optimizer the moments of each parameter, which it has only after its first step, and its steps."""
    for fragment in fragments:
        moments = {*kinds[fragment.name]} - {WEIGHT}
        if fragment.moments is not None and moments:
            for kind in moments - fragment.moments.keys():
                fragment.moments[kind] = torch.zeros_like(fragment.master, requires_grad=False)
            if moments - {EMA}:
                fragment.moments["step"] = torch.tensor(steps, dtype=torch.float32, device=fragment.master.device)


def refresh(engine: Engine) -> None:
    """Let the model have what was written into the masters; every rank must call this."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):  # stage 3
        for low, master in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            low.data.copy_(master.data)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    else:
        for low, master in _unsharded_masters(optimizer).items():
            low.data.copy_(master.data)


def _place(optimizer: Any, parameter: Any, copies: dict[Tensor, Tensor]) -> tuple[int, int, Tensor, int]:
    """Return (start, numel, master, offset) of this rank's range of a parameter."""
    if hasattr(parameter, "ds_tensor"):  # stage 3: equal parts, the last one padded
        size = int(parameter.ds_tensor.ds_numel)
        start = distributed.rank() * size
        numel = max(0, min(size, int(parameter.ds_numel) - start))
        if not parameter.requires_grad:
            return start, numel, parameter.ds_tensor, 0
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return start, numel, optimizer.fp32_partitioned_groups_flat[group], int(offset)
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2: all parameters end to end, cut into equal parts
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, parameter, 0
        master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        place = mapping.lp_fragment_address
        return int(place.start), int(place.numel), master, int(mapping.hp_fragment_address.start)
    return 0, parameter.numel(), copies.get(parameter, parameter), 0


def _unsharded_masters(optimizer: Any) -> dict[Tensor, Tensor]:
    """Return the fp32 copies that stage 0 keeps of bf16 parameters; in fp32 there are none."""
    pairs = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    return {low: master for lows, masters in pairs for low, master in zip(lows, masters, strict=False)}


def _is_like(value: object, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == master.shape and value.ndim > 0
