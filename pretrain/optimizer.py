"""Which parameters an optimizer moves, and how."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pretrain.config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Build the optimizer that the config names, over all trained parameters.

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
    if config.name == "lamb":
        return LAMB(groups, config.learning_rate, config.betas, config.epsilon)
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


class Range(NamedTuple):
    """A range of one parameter in a flat tensor that an optimizer moves."""

    parameter: int
    start: int
    numel: int


class LAMB(Optimizer):
    """Adam's step of each decayed parameter, as long as the parameter itself times the rate (arXiv 1904.00962).

    A parameter's length is that of all of it, wherever its pieces lie: `bind` says where, once ZeRO has cut them. As
    with the fused AdamW, a step with `found_inf` of 1 moves nothing and is not counted, without the host knowing.

    Args:
        params: parameters or groups; those without weight decay take Adam's step as it is.
        lr: learning rate.
        betas: of the moments.
        eps: added to the second moment's root.
        weight_decay: of groups that have none of their own.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._ranges: dict[Tensor, list[Range]] = {}
        self._num_parameters = 0
        self._sum: Callable[[Tensor], Tensor] = lambda squares: squares

    def bind(
        self, ranges: dict[Tensor, list[Range]], num_parameters: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Say which parameters the flat tensors hold.

        Args:
            ranges: of each tensor that is moved.
            num_parameters: over all ranks.
            sum_over_ranks: adds up the squares that each rank has of its own ranges.
        """
        self._ranges, self._num_parameters, self._sum = ranges, num_parameters, sum_over_ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        pairs = ((tensor, group) for group in self.param_groups for tensor in group["params"])
        moved = [(tensor, group) for tensor, group in pairs if tensor.grad is not None]
        if not moved:
            return
        if not self._ranges:
            self._ranges = {tensor: [Range(i, 0, tensor.numel())] for i, (tensor, _) in enumerate(moved)}
            self._num_parameters = len(moved)
        directions = [self._direction(tensor, group) for tensor, group in moved]
        squares = torch.zeros(2, self._num_parameters, device=moved[0][0].device)
        for (tensor, _), direction in zip(moved, directions, strict=True):
            for number, start, numel in self._ranges[tensor]:
                for row, values in enumerate((tensor, direction)):
                    squares[row, number] += values.view(-1)[start : start + numel].square().sum()
        length, own = self._sum(squares).sqrt()
        trust = torch.where((length > 0) & (own > 0), length / own, 1.0)
        for (tensor, group), direction in zip(moved, directions, strict=True):
            taken = 1.0 if self.found_inf is None else 1.0 - self.found_inf.to(tensor.device)
            for number, start, numel in self._ranges[tensor]:
                factor = group["lr"] * taken * (trust[number] if group["weight_decay"] else 1.0)
                tensor.view(-1)[start : start + numel] -= factor * direction.view(-1)[start : start + numel]

    def _direction(self, tensor: Tensor, group: dict[str, Any]) -> Tensor:
        """Update the moments, and return Adam's direction with the decay in it."""
        state, (first, second) = self.state[tensor], group["betas"]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=tensor.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
        gradient, taken = tensor.grad, torch.ones((), device=tensor.device)
        assert gradient is not None
        if self.found_inf is not None:
            taken = 1.0 - self.found_inf.to(tensor.device)
            gradient = torch.where(taken > 0, gradient, 0.0)
        state["step"] += taken
        state["exp_avg"].lerp_(gradient, (1 - first) * taken)
        state["exp_avg_sq"].lerp_(gradient.square(), (1 - second) * taken)
        steps = state["step"].clamp_min(1.0)
        corrected = state["exp_avg"] / (1 - first**steps)
        root = (state["exp_avg_sq"] / (1 - second**steps)).sqrt()
        direction: Tensor = corrected / (root + group["eps"]) + group["weight_decay"] * tensor
        return direction
