"""Overfit an objective to one batch."""

import torch

from pretrain.objectives.objective import Objective


def overfit(objective: Objective, batch: dict[str, torch.Tensor], steps: int) -> float:
    """Train on the same batch for some steps; return the last loss.

    Asserts that every parameter had a gradient and was changed.
    """
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert not torch.equal(before[name], parameter), name
    return float(loss)
