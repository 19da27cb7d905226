"""In a training step, the host waits for nothing but the result of the step before, and starts few kernels.

Waits are counted in the third step of the runs of tests/support/training.py, in the real training loop.
"""

import pytest

from tests.support.training import BF16, OFFLOAD, SETTINGS, Setting, Trained, zero

RESULT_OF_LAST_STEP = "copy to the host in pretrain/health.py:flush"
# At stage 3, DeepSpeed also reads a number that `build_engine` has put on the host, so it waits for nothing.
NUMBER_ON_HOST = "aten._local_scalar_dense.default in pretrain/train.py:take_step"


def may_wait(setting: Setting) -> bool:
    """Return whether DeepSpeed waits: for gradients on the CPU, or in bf16 at stage 0, which is refused on GPUs."""
    return OFFLOAD in setting.overrides or {BF16, zero(0)} <= {*setting.overrides}


LEAN = [
    (world_size, name)
    for name, setting in SETTINGS.items()
    for world_size in setting.world_sizes
    if not may_wait(setting)
]


@pytest.mark.parametrize(("world_size", "name"), LEAN)
def test_the_host_waits_for_the_result_of_the_step_before_only(trained: Trained, world_size: int, name: str) -> None:
    allowed = {RESULT_OF_LAST_STEP, *([NUMBER_ON_HOST] if zero(3) in SETTINGS[name].overrides else [])}
    waits = trained(world_size, name)["waits"]
    assert len(waits) == len(allowed)
    assert {*waits} == allowed


def test_a_wait_is_noticed(trained: Trained) -> None:
    assert len(trained(1, "bf16-zero0")["waits"]) > 40


@pytest.mark.parametrize(("name", "budget"), [("deep", 700), ("deep-lamb", 900)])
def test_a_step_starts_few_kernels(trained: Trained, name: str, budget: int) -> None:
    seen = trained(1, name)
    assert len(seen["weights"]) == 200
    assert 400 < seen["operations"] <= budget
