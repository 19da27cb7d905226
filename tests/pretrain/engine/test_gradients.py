"""Gradients on one rank: micro-batches in bf16 are added up in fp32, and the optimizer is told to clip or to skip."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pretrain.engine.gradients import Gradients
from pretrain.engine.protocol import TrainingEngine


def build(*parameters: Tensor) -> tuple[Gradients, Any]:
    """Return gradients of an engine as DeepSpeed's is on one rank at stage 1, and its ZeRO optimizer."""
    module = nn.ParameterList(nn.Parameter(parameter) for parameter in parameters)
    optimizer = SimpleNamespace(
        params_in_partition=[[*module]], averaged_gradients={}, optimizer=SimpleNamespace(found_inf=None)
    )
    engine = SimpleNamespace(
        module=module, optimizer=optimizer, device=torch.device("cpu"), enable_backward_allreduce=False
    )
    return Gradients(cast(TrainingEngine, engine), max_norm=0.5), optimizer


def test_micro_batches_in_bf16_are_added_up_in_fp32() -> None:
    """In bf16, which has 8 significant bits, 1 + 2**-9 is 1."""
    gradients, optimizer = build(torch.ones(3, dtype=torch.bfloat16))
    [parameter] = optimizer.params_in_partition[0]
    for step in range(2):  # the sums begin anew with each step
        for number, value in enumerate([1.0] + 4 * [2**-9]):
            parameter.grad = torch.full((3,), value, dtype=torch.bfloat16)
            gradients.collect(is_last=number == 4)
        [[total]] = optimizer.averaged_gradients.values()
        assert total.dtype == torch.float32
        assert torch.equal(total, torch.full((3,), 1 + 4 * 2**-9)), step


def test_a_single_micro_batch_is_handed_over_as_it_is() -> None:
    gradients, optimizer = build(torch.ones(2), torch.ones(3))
    used, unused = optimizer.params_in_partition[0]
    used.grad = torch.tensor([3.0, 4.0])
    gradients.collect(is_last=True)
    [[handed_over, missing]] = optimizer.averaged_gradients.values()
    assert handed_over is used.grad
    assert torch.equal(missing, torch.zeros_like(unused))  # DeepSpeed needs a gradient of every parameter
    assert float(gradients.squared_norm()) == 25.0


@pytest.mark.parametrize(("norm", "scale"), [(5.0, 10.0), (0.25, 1.0)])
def test_the_optimizer_divides_by_the_excess_of_the_norm(norm: float, scale: float) -> None:
    gradients, optimizer = build(torch.ones(2))
    skipped = torch.tensor(1.0)
    gradients.prepare_update(torch.tensor(norm), skipped)
    assert float(optimizer.optimizer.grad_scale) == pytest.approx(scale, rel=1e-5)
    assert optimizer.optimizer.found_inf is skipped
