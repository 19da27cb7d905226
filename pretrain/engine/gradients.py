"""The gradients of a step where DeepSpeed holds them: their accumulation, their norm, and the update with them.

DeepSpeed would compute the norm itself, but the host would wait for the device four times (once per parameter group and
operation). Here the norm is a scalar on the device, and clipping and skipping are left to the optimizer, which reads
both from the device. This file relies on private attributes of DeepSpeed;
`tests/pretrain/engine/test_deepspeed_version.py` lists and checks them.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.engine.protocol import TrainingEngine, torch_optimizer

CLIPPING_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Gradients:
    """The gradients of an engine, from the backward pass of a micro-batch to the update of the weights.

    A single rank has nothing to reduce or to partition. Without offloading, DeepSpeed's hooks, buckets and copies are
    therefore left out (`build_engine`), and DeepSpeed is given the gradients of autograd as they are.

    Args:
        engine: Engine from `build_engine`.
        max_norm: Norm to which gradients are clipped; 0 disables clipping.
    """

    def __init__(self, engine: TrainingEngine, max_norm: float) -> None:
        self.engine = engine
        self.max_norm = max_norm
        optimizer = engine.optimizer
        self._is_offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._sums: dict[Tensor, Tensor] = {}  # parameter -> its gradient in fp32, over the micro-batches of a step
        self._num_summed = 0  # micro-batches of the current step that are in the sums

    def collect(self, *, is_last: bool) -> None:
        """Collect the gradients of a micro-batch after its backward pass; those of bf16 are added up in fp32.

        Args:
            is_last: Whether this is the last micro-batch of the step.
        """
        optimizer = self.engine.optimizer
        if self.engine.enable_backward_allreduce or not hasattr(optimizer, "params_in_partition"):
            return  # DeepSpeed or autograd has done it
        if not is_last or self._num_summed:
            self._add_to_sums()
        if is_last:
            for group, parameters in enumerate(optimizer.params_in_partition):
                optimizer.averaged_gradients[group] = [self._gradient(parameter) for parameter in parameters]
            self._num_summed = 0

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm of the step's gradient, an fp32 scalar on the training device.

        The shares of all ranks add up to the squared norm.
        """
        if self._is_offloaded and self.engine.device.type == "cuda":
            torch.cuda.synchronize()  # the gradients are still being copied to the host
        held, num_holders = self._held()
        norms = torch.stack(torch._foreach_norm(held, 2, dtype=torch.float32))
        return (norms.square().sum() / num_holders).to(self.engine.device)

    def prepare_update(self, grad_norm: Tensor, skipped: Tensor) -> None:
        """Tell the optimizer by how much to clip the gradients and whether to skip the update, before `engine.step`.

        All our optimizers read `grad_scale` and `found_inf`, the attributes that torch's gradient scaler sets on fused
        ones. They divide the gradients by `grad_scale`, and with a `found_inf` of 1 they change neither weights nor
        moments.

        Args:
            grad_norm: Norm of the gradient over all ranks, a scalar on the device.
            skipped: 1 to skip the update, else 0, a scalar on the device.
        """
        optimizer: Any = torch_optimizer(self.engine)
        # An offloaded optimizer runs on the CPU. The host waits for these copies, or it might read them too early.
        device = torch.device("cpu") if self._is_offloaded else self.engine.device
        optimizer.found_inf = skipped.to(device)
        if self.max_norm:
            optimizer.grad_scale = ((grad_norm + CLIPPING_EPSILON) / self.max_norm).clamp(min=1.0).to(device)

    def _held(self) -> tuple[list[Tensor], int]:
        """Return the gradients that this rank holds, and the number of ranks that hold the same ones."""
        optimizer = self.engine.optimizer
        if self._is_offloaded:
            is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
            masters = (
                optimizer.fp32_partitioned_groups_flat if is_stage_3 else optimizer.single_partition_of_fp32_groups
            )
            return [master.grad for master in masters], 1
        if hasattr(optimizer, "averaged_gradients"):
            return [gradient for group in optimizer.averaged_gradients.values() for gradient in group], 1
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return gradients, distributed.world_size()

    def _add_to_sums(self) -> None:
        """Add the gradients of a micro-batch to the fp32 sums; gradients in fp32 are added up by autograd."""
        if self._parameters[0].dtype == torch.float32:
            return
        gradients = [_gradient_of(parameter) for parameter in self._parameters]
        if not self._sums:
            self._sums = {parameter: torch.empty_like(parameter, dtype=torch.float32) for parameter in self._parameters}
        add = torch._foreach_add_ if self._num_summed else torch._foreach_copy_
        add([*self._sums.values()], gradients)
        self._num_summed += 1
        for parameter in self._parameters:
            parameter.grad = None

    def _gradient(self, parameter: Tensor) -> Tensor:
        """Return the gradient of a parameter over all micro-batches of the step."""
        return self._sums[parameter] if self._num_summed else _gradient_of(parameter)


def _gradient_of(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient; zeros if the loss does not depend on the parameter."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
