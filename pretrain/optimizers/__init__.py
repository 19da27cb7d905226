"""Optimizers and layer-wise learning rate decay. Each optimizer that torch does not have is one file."""

from torch import nn
from torch.optim import AdamW, Optimizer

from pretrain.config import OptimizerConfig
from pretrain.optimizers.lamb import LAMB
from pretrain.optimizers.layer_decay import BLOCK_NUMBER
from pretrain.optimizers.muon import MATRICES, Muon


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Build the configured optimizer for all trainable parameters of a module.

    Weight decay applies to weights only: not to biases and norms (one dimension), nor to the CLS token and positions
    (first dimension of 1). Muon orthogonalizes the weight matrices of the blocks and uses AdamW for the rest.

    Args:
        module: Model to train.
        config: Optimizer and its hyperparameters.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim > 1 and parameter.shape[0] > 1
            is_matrix = is_weight and parameter.ndim == 2 and config.name == "muon" and BLOCK_NUMBER.search(name)
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
