"""DeepSpeed ZeRO as the engine: the only file, with `checkpoint/`'s own, that imports it.

Its config is derived from ours by one pure function, so that a batch size stands in one place.
"""

import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain import distributed
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.optimizers import build_optimizer

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and warns when there is none
import deepspeed

Engine: TypeAlias = Any  # deepspeed.DeepSpeedEngine, which has no types

# Elements. DeepSpeed's own 5e8 would put a whole ViT-L into one bucket, so that nothing overlaps.
BUCKET_SIZE = 25_000_000
NO_CLIPPING = 1e30  # a limit that no gradient reaches; without one, DeepSpeed does not measure the norm everywhere


def start_distributed() -> None:
    """Join the other ranks, or start a group of one when there is no launcher."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.local_rank())
    elif not dist.is_initialized():
        _share_cores()
        _skip_shared_memory_build()
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def build_engine(objective: nn.Module, config: EngineConfig, optimizer: OptimizerConfig) -> Engine:
    """Put a model under DeepSpeed, with an optimizer over all that is trained."""
    settings = deepspeed_config(config, distributed.world_size(), on_gpu=torch.cuda.is_available())
    inner = build_optimizer(objective, optimizer)
    with _at_rest(inner):
        engine, *_ = deepspeed.initialize(model=objective, optimizer=inner, config=settings)
    if config.zero_stage == 0 and config.precision == "fp32":
        engine.clip_fp32_gradients = lambda: _clip_and_remember(engine)
    return engine


def deepspeed_config(config: EngineConfig, world_size: int, *, on_gpu: bool) -> dict[str, Any]:
    """Derive DeepSpeed's config. It is told the largest micro-batch; the loop weights each by its true size."""
    accumulation_steps = config.accumulation_steps(world_size)
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": on_gpu and world_size > 1,  # overlapping slows a single GPU
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET_SIZE,
        "allgather_bucket_size": BUCKET_SIZE,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": config.micro_batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.gradient_clipping or NO_CLIPPING,
        "zero_optimization": zero,
        # torch's AdamW also where DeepSpeed would compile its own for the CPU.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # Looking for overflows gradient by gradient took 22 of 97 ms a step; the loop looks at their norm.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "steps_per_print": sys.maxsize,
    }


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    """Set the learning rate of the step to come."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def gradient_norm(engine: Engine) -> Tensor:
    """Return the norm of the last step's whole gradient, before clipping."""
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    norm = engine.get_global_grad_norm() if norm is None else norm
    return torch.as_tensor(norm, dtype=torch.float32, device=engine.device)


def guard(engine: Engine, judge: Callable[[Tensor], Tensor]) -> None:
    """Show each step's gradient norm to `judge` before a weight moves; where it returns 1, none does.

    The fused AdamW looks at that number on the device, as it does for a gradient scaler, at every ZeRO stage.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)

    def before_step(optimizer: Any, args: object, options: object) -> None:
        optimizer.found_inf = judge(gradient_norm(engine))

    inner.register_step_pre_hook(before_step)


@contextmanager
def _at_rest(optimizer: Optimizer) -> Iterator[None]:
    """Keep DeepSpeed from a step of its own: in bf16 at stage 0 it takes one without gradients, which would count."""
    optimizer.step = lambda *_: None  # type: ignore[assignment, method-assign]
    yield
    del optimizer.step


def _clip_and_remember(engine: Engine) -> None:
    """Clip as DeepSpeed does where nothing is sharded or cast, and keep the norm, which it forgets there."""
    engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())


def _share_cores() -> None:
    """Give each rank of a machine its share of the cores, unless the user or the launcher has."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def _skip_shared_memory_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory reductions on a CPU.

    The build takes minutes, and one that is killed leaves a lock on which every later run waits for ever
    (pytorch/pytorch#189245). Without the op, gloo does the same work.
    """
    importlib.import_module("deepspeed.comm.torch")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
