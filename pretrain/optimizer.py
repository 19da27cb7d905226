"""Which parameters an optimizer moves, and how."""

from torch import nn
from torch.optim import AdamW

from pretrain.config import OptimizerConfig


def build_adamw(module: nn.Module, config: OptimizerConfig) -> AdamW:
    """Build AdamW (arXiv 1711.05101) over all trained parameters.

    Weights are decayed. Biases and norms (one dimension), CLS and positions (a first dimension of 1) are not.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim > 1 and parameter.shape[0] > 1
            (decayed if is_weight else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
