"""Layer-wise decay of the learning rate (arXiv 2003.10555), of any optimizer and without a group for each layer."""

import re

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optimizers.placement import Placement

BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks|stages)\.(\d+)\.")  # ours, and those of transformers' models
INPUT = re.compile(r"embedd|cls_token|position|mask_token|stem")
BEHIND = "decoder."  # what stands behind the encoder and has blocks too


def decay_by_layer(optimizer: Optimizer, placement: Placement, decay: float) -> None:
    """Let a step move each of the encoder's parameters by only a share of what it would.

    The last block's share is `decay`, that of the block before it the square, and so on down to the patches; of a
    network of stages, stage by stage. What stands behind the encoder moves whole. All steps are proportional to the
    learning rate, so this is the same as a smaller one. The tensors are copied for as long as a step takes.

    Args:
        optimizer: of any kind.
        placement: of the parameters in its tensors.
        decay: from 0 to 1.
    """
    shares = layer_shares(placement.names, decay)
    before: dict[Tensor, Tensor] = {}

    def keep(*__: object) -> None:
        tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
        before.update({tensor: tensor.detach().clone() for tensor in tensors if tensor.grad is not None})

    @torch.no_grad()
    def give_back(*__: object) -> None:
        for tensor, old in before.items():
            for number, _, start, numel in placement.ranges[tensor]:
                if shares[number] < 1:
                    here = slice(start, start + numel)
                    now = tensor.view(-1)[here]
                    now.copy_(torch.lerp(old.view(-1)[here], now, shares[number]))
        before.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(give_back)


def layer_shares(names: list[str], decay: float) -> list[float]:
    """Return the share of each parameter, by its name."""
    blocks = [None if name.startswith(BEHIND) else BLOCK.search(name) for name in names]
    depth = max((int(block[1]) + 1 for block in blocks if block), default=0)
    return [
        decay ** (depth - int(block[1])) if block else decay ** (depth + 1) if _is_input(name) else 1.0
        for name, block in zip(names, blocks, strict=True)
    ]


def _is_input(name: str) -> bool:
    return not name.startswith(BEHIND) and INPUT.search(name) is not None
