"""Which parameters an optimizer moves, and how: one file an optimizer beside torch's own."""

from torch import nn
from torch.optim import AdamW, Optimizer

from pretrain.config import OptimizerConfig
from pretrain.optimizers.lamb import LAMB
from pretrain.optimizers.layer_decay import BLOCK
from pretrain.optimizers.muon import MATRICES, Muon


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Build the optimizer that the config names, over all trained parameters.

    Weights are decayed. Biases and norms (one dimension), CLS and positions (a first dimension of 1) are not. Muon's
    matrices are those of the blocks.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim > 1 and parameter.shape[0] > 1
            is_matrix = is_weight and parameter.ndim == 2 and config.name == "muon" and BLOCK.search(name)
            (matrices if is_matrix else decayed if is_weight else undecayed).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, MATRICES: True},
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "lamb":
        return LAMB(groups, config.learning_rate, config.betas, config.epsilon)
    if config.name == "muon":
        return Muon(groups, config.learning_rate, config.momentum, config.betas, config.epsilon)
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
