"""Which part of every parameter a rank holds, at any ZeRO stage. Only this file knows how ZeRO partitions.

Saving reads these fragments and loading writes them, so a checkpoint of one world size and stage loads into any other.
It relies on private attributes of DeepSpeed; `tests/pretrain/engine/test_deepspeed_version.py` lists and checks them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.engine.protocol import TrainingEngine, torch_optimizer

# The kinds of values that are saved for a parameter: its weight, its moving average, and the optimizer's moments under
# the optimizer's own names, such as exp_avg.
WEIGHT = "weight"
EMA = "ema"


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened parameter or buffer that this rank holds in fp32, with the optimizer's state for it.

    Attributes:
        name: Name of the parameter or buffer in the objective.
        start: First element of the range in the flattened parameter.
        numel: Number of elements in the range.
        master: The fp32 tensor that the optimizer updates; it may hold ranges of several parameters.
        offset: First element of the range in the flattened master, and in every moment.
        state: The optimizer's state for the master, or None if no optimizer updates it.
        replicated: Whether every rank holds the same values.
    """

    name: str
    start: int
    numel: int
    master: Tensor
    offset: int
    state: dict[str, Any] | None
    replicated: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of values that exist for this range: the weight, and all optimizer state of the same shape."""
        found = (kind for kind, value in (self.state or {}).items() if _is_like(value, self.master))
        return (WEIGHT, *sorted(found))

    def view(self, kind: str) -> Tensor:
        """Return a writable view [numel] of one kind of values; call `copy_masters_to_model` after writing weights."""
        tensor = self.master if kind == WEIGHT else (self.state or {})[kind]
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def local_fragments(engine: TrainingEngine) -> list[Fragment]:
    """Return everything that this rank holds: its partitions, replicated parameters, and buffers."""
    optimizer, states = engine.optimizer, torch_optimizer(engine).state
    masters = _unpartitioned_masters(optimizer)
    fragments = []
    for name, parameter in engine.module.named_parameters():
        start, numel, master, offset = _locate(optimizer, parameter, masters)
        if numel:
            state = states[master] if parameter.requires_grad else None
            replicated = not hasattr(parameter, "ds_tensor") and not hasattr(parameter, "_hp_mapping")
            fragments.append(Fragment(name, start, numel, master, offset, state, replicated))
    saved = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            fragments.append(Fragment(name, 0, buffer.numel(), buffer, 0, None, replicated=True))
    return fragments


def fragments_to_save(engine: TrainingEngine) -> list[Fragment]:
    """Return what this rank saves: its own partitions, and its share of the values that every rank holds."""
    rank, world_size = distributed.rank(), distributed.world_size()
    fragments = []
    for fragment in local_fragments(engine):
        if not fragment.replicated:
            fragments.append(fragment)
            continue
        first, last = fragment.numel * rank // world_size, fragment.numel * (rank + 1) // world_size
        if first < last:
            fragments.append(replace(fragment, start=first, numel=last - first, offset=fragment.offset + first))
    return fragments


def full_shapes(engine: TrainingEngine) -> dict[str, list[int]]:
    """Return the shape of every saved parameter and buffer before partitioning, by name."""
    saved = engine.module.state_dict().keys()
    found = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    return found | {name: list(buffer.shape) for name, buffer in engine.module.named_buffers() if name in saved}


def count_optimizer_steps(engine: TrainingEngine) -> float:
    """Return the number of steps that the optimizer has taken, which Adam's bias correction depends on."""
    states = torch_optimizer(engine).state.values()
    return max((float(state["step"]) for state in states if "step" in state), default=0.0)


def create_optimizer_state(
    fragments: list[Fragment], kinds: Mapping[str, Iterable[str]], num_optimizer_steps: float
) -> None:
    """Create the optimizer's state before its first step, so that a checkpoint can be copied into it.

    Args:
        fragments: Everything that this rank holds.
        kinds: Kinds of values that the checkpoint has for each parameter.
        num_optimizer_steps: Number of steps that the optimizer of the checkpoint had taken.
    """
    for fragment in fragments:
        moments = {*kinds[fragment.name]} - {WEIGHT}
        if fragment.state is not None and moments:
            for kind in moments - fragment.state.keys():
                fragment.state[kind] = torch.zeros_like(fragment.master, requires_grad=False)
            if moments - {EMA}:
                steps = torch.tensor(num_optimizer_steps, dtype=torch.float32, device=fragment.master.device)
                fragment.state["step"] = steps


def copy_masters_to_model(engine: TrainingEngine) -> None:
    """Copy the fp32 masters to the weights that the model computes with (collective)."""
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
        for low, master in _unpartitioned_masters(optimizer).items():
            low.data.copy_(master.data)


def _locate(optimizer: Any, parameter: Any, masters: dict[Tensor, Tensor]) -> tuple[int, int, Tensor, int]:
    """Return (start, numel, master, offset) of this rank's range of a parameter, as in `Fragment`."""
    if hasattr(parameter, "ds_tensor"):  # stage 3: each parameter is cut into equal parts, the last one padded
        size = int(parameter.ds_tensor.ds_numel)
        start = distributed.rank() * size
        numel = max(0, min(size, int(parameter.ds_numel) - start))
        if not parameter.requires_grad:
            return start, numel, parameter.ds_tensor, 0
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return start, numel, optimizer.fp32_partitioned_groups_flat[group], int(offset)
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2: all parameters are joined, then cut into equal parts
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, parameter, 0
        master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.lp_fragment_address
        return int(address.start), int(address.numel), master, int(mapping.hp_fragment_address.start)
    return 0, parameter.numel(), masters.get(parameter, parameter), 0


def _unpartitioned_masters(optimizer: Any) -> dict[Tensor, Tensor]:
    """Return the fp32 master of each bf16 parameter at stage 0; in fp32 there are none."""
    pairs = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    return {low: master for lows, masters in pairs for low, master in zip(lows, masters, strict=False)}


def _is_like(value: object, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == master.shape and value.ndim > 0
