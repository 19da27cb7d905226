"""Layer-wise learning rate decay (arXiv 2003.10555) for any optimizer, without a parameter group per layer."""

import re

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optimizers.placement import Placement

# The number of a block in a parameter's name, in our models and in those of transformers.
BLOCK_NUMBER = re.compile(r"(?:^|\.)(?:layers?|blocks|stages)\.(\d+)\.")
INPUT_LAYER = re.compile(r"embedd|cls_token|position|mask_token|stem")
DECODER_PREFIX = "decoder."  # prefix of parameters after the encoder, some of which are blocks too


def apply_layer_decay(optimizer: Optimizer, placement: Placement, decay: float) -> None:
    """Scale every later update of each encoder parameter by a factor that shrinks toward the input.

    The factor is `decay` for the last block, `decay ** 2` for the one before, and so on down to the patch embedding;
    for hierarchical networks it is per stage. Parameters after the encoder keep a factor of 1. Updates are proportional
    to the learning rate, so this equals a smaller learning rate.

    The weights are copied for the duration of a step, because an update is scaled after the optimizer has applied it:
    ZeRO makes a partition and a collective for each parameter group, so a group per layer would be slow.

    Args:
        optimizer: Optimizer of any kind.
        placement: Parameters that the optimizer's tensors hold.
        decay: Factor from one block to the next, from 0 to 1.
    """
    factors = layer_factors(placement.names, decay)
    scaled: list[tuple[float, Tensor, Tensor]] = []  # factor, weights, and the weights before the step

    @torch.no_grad()
    def copy_weights(*arguments: object) -> None:
        every = (tensor for group in optimizer.param_groups for tensor in group["params"])
        tensors = [tensor for tensor in every if tensor.grad is not None]
        found = [factors[each.parameter] for each in placement.ranges_in(tensors)]
        parts = [*zip(found, placement.parts(tensors, tensors), strict=True)]
        scaled[:] = [(factor, part, torch.empty_like(part)) for factor, part in parts if factor < 1]
        if scaled:
            _, weights, before = zip(*scaled, strict=True)
            torch._foreach_copy_(before, weights)

    @torch.no_grad()
    def scale_updates(*arguments: object) -> None:
        if scaled:
            scales, weights, before = zip(*scaled, strict=True)
            torch._foreach_lerp_(before, weights, scales)
            torch._foreach_copy_(weights, before)
        scaled.clear()

    optimizer.register_step_pre_hook(copy_weights)
    optimizer.register_step_post_hook(scale_updates)


def layer_factors(names: list[str], decay: float) -> list[float]:
    """Return the factor of each parameter's update, by its name.

    Args:
        names: Names of the parameters.
        decay: Factor from one block to the next, from 0 to 1.
    """
    blocks = [None if name.startswith(DECODER_PREFIX) else BLOCK_NUMBER.search(name) for name in names]
    depth = max((int(block[1]) + 1 for block in blocks if block), default=0)
    return [
        decay ** (depth - int(block[1])) if block else decay ** (depth + 1) if _is_input(name) else 1.0
        for name, block in zip(names, blocks, strict=True)
    ]


def _is_input(name: str) -> bool:
    return not name.startswith(DECODER_PREFIX) and INPUT_LAYER.search(name) is not None
