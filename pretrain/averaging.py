"""Running averages of many tensors, updated in one operation."""

import torch
from torch import Tensor


@torch.no_grad()
def move_averages(averages: list[Tensor], values: list[Tensor], share: float, skipped: Tensor | None = None) -> None:
    """Move averages toward new values, in place: `average <- average + share * (value - average)`.

    This is one step of gradient descent with learning rate `share` on half the squared distance, whose gradient is
    `average - value`. torch's fused SGD does it for all tensors in one operation, which reads the flag on the device,
    where `torch._foreach_lerp_` would need the share as a number of the host.

    Args:
        averages: Averages in fp32.
        values: New values, in the shapes and memory layouts of the averages and of one data type.
        share: Share of the new values, from 0 to 1.
        skipped: 1 to leave the averages as they are, even if values are NaN, and 0 to move them; a scalar tensor. None
            moves them.
    """
    if not averages:
        return
    if values[0].dtype != averages[0].dtype:
        copies = [torch.empty_like(average) for average in averages]
        torch._foreach_copy_(copies, values)
        values = copies
    torch._fused_sgd_(
        averages,
        values,
        momentum_buffer_list=[],
        lr=share,
        weight_decay=1.0,  # adds the average to the gradient
        maximize=True,  # takes the values for the negative gradient
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        is_first_step=False,
        found_inf=None if skipped is None else skipped.to(averages[0]),
    )
