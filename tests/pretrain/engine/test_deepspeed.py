"""DeepSpeed's config is derived from ours."""

from types import SimpleNamespace

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engine.deepspeed import _order_on_device, build_engine, deepspeed_config
from pretrain.errors import UserError


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8))
def test_accumulation_steps_follow_from_the_batch_sizes(world_size: int, micro: int, accumulation: int) -> None:
    config = EngineConfig(micro_batch_size=micro, global_batch_size=world_size * micro * accumulation)
    derived = deepspeed_config(config, world_size, on_gpu=False)
    assert derived["gradient_accumulation_steps"] == accumulation
    assert derived["train_micro_batch_size_per_gpu"] == micro
    assert derived["train_batch_size"] == world_size * micro * accumulation


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_deepspeed_accepts_the_config(stage: int, precision: str, on_gpu: bool) -> None:
    config = EngineConfig(zero_stage=stage, precision=precision, offload_optimizer=stage > 0)  # type: ignore[arg-type]
    derived = deepspeed_config(config, 1, on_gpu=on_gpu)
    assert derived["gradient_clipping"] == 0  # the optimizers clip
    if stage:
        assert derived["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": on_gpu}
    parsed = DeepSpeedConfig(derived)
    assert parsed.zero_optimization_stage == stage
    assert parsed.zero_config.overlap_comm is False  # overlapping slows a single rank down
    assert parsed.bfloat16_config.check_grad_overflow is False


def test_a_batch_that_the_ranks_do_not_divide_takes_another_micro_batch() -> None:
    derived = deepspeed_config(EngineConfig(global_batch_size=64, micro_batch_size=8), 3, on_gpu=False)
    assert derived["gradient_accumulation_steps"] == 3
    assert derived["train_batch_size"] == 72  # DeepSpeed requires the product of all three


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeed_computes_no_norm_and_measures_no_throughput(stage: int, world_size: int) -> None:
    config = EngineConfig(zero_stage=stage, precision="bf16")  # type: ignore[arg-type]
    derived = deepspeed_config(config, world_size, on_gpu=True)
    assert derived["zero_optimization"]["compute_grad_norm"] is False
    assert derived["timers"] == {"throughput": {"enabled": False}}
    assert derived["zero_optimization"]["stage"] == (1 if world_size == 1 else stage)


def test_bf16_at_stage_0_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = EngineConfig(zero_stage=0, precision="bf16")
    with pytest.raises(UserError, match=r"waits for the GPU 72 times per step; set zero_stage=1"):
        build_engine(nn.Linear(2, 2), config, OptimizerConfig())


def test_the_device_and_not_the_host_waits_for_overlapped_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    accelerator = get_accelerator()
    monkeypatch.setattr(type(accelerator), "synchronize", lambda self, *_: calls.append("host waits"))
    stream = SimpleNamespace(wait_stream=calls.append)
    monkeypatch.setattr(type(accelerator), "current_stream", lambda self, *_: stream)
    optimizer = SimpleNamespace(
        reduction_stream="reductions", independent_gradient_partition_epilogue=lambda: get_accelerator().synchronize()
    )
    _order_on_device(optimizer)
    optimizer.independent_gradient_partition_epilogue()
    assert calls == ["reductions"]
    get_accelerator().synchronize()
    assert calls == ["reductions", "host waits"]
