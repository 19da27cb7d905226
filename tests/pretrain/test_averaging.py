"""Running averages of several tensors, compared with `torch.lerp`."""

import pytest
import torch

from benchmarks.counting import HostWaits
from pretrain.averaging import move_averages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.004, 0.3, 0.9])
def test_averages_move_as_lerp_does_in_few_kernels(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    averages = [torch.randn(3, 4), torch.randn(5), torch.randn(())] * 20
    averages = [average.clone() for average in averages]
    values = [torch.randn_like(average).to(dtype) for average in averages]
    given = [value.clone() for value in values]
    expected = [average.lerp(value.float(), share) for average, value in zip(averages, values, strict=True)]
    with HostWaits() as counted:
        move_averages(averages, values, share)
    assert counted.num_operations <= 2
    assert not counted.waits
    torch.testing.assert_close(averages, expected, rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, values, given))


def test_a_skipped_step_leaves_the_averages_as_they_are_even_with_nan() -> None:
    averages = [torch.randn(4), torch.randn(2, 2)]
    before = [average.clone() for average in averages]
    values = [torch.full_like(average, torch.nan) for average in averages]
    for skipped in (torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64), torch.tensor(True)):
        move_averages(averages, values, 0.5, skipped)
        assert all(map(torch.equal, averages, before))
    move_averages(averages, values, 0.5, torch.tensor(0.0))
    assert not any(map(torch.equal, averages, before))


def test_no_averages_is_no_work() -> None:
    move_averages([], [], 0.5)
