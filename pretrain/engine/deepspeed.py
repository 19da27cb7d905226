"""Build and drive DeepSpeed's ZeRO engine. This is the only file that imports DeepSpeed.

DeepSpeed's config is derived from ours by one pure function, so that no value has to be kept equal in two places.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain import distributed
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engine.placement import bind_optimizer
from pretrain.engine.protocol import TrainingEngine, torch_optimizer
from pretrain.optimizers import build_optimizer
from pretrain.startup import join_process_group, prepare_process

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it, DeepSpeed searches for a GPU and prints a warning
# DeepSpeed's autotuner imports MLflow if it can, which costs every rank more than a second and 100 MB.
# With None in its place, Python takes it for not installed.
sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
import deepspeed  # noqa: E402

if sys.modules["mlflow"] is None:
    del sys.modules["mlflow"]

# Number of elements. With DeepSpeed's default of 5e8, a whole ViT-L fits into one bucket, so nothing overlaps.
BUCKET_SIZE = 25_000_000
# A gradient norm that is never reached. Without clipping, DeepSpeed does not compute the norm at every ZeRO stage.
NO_CLIPPING = 1e30


def start_distributed(should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Join the ranks of the launcher, or form a group of one if there is no launcher, for DeepSpeed too (collective).

    Args:
        should_stop: Whether this rank was asked to stop while it waits for others.

    Returns:
        Whether the group exists; False if the wait was stopped.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    prepare_process()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
        os.environ.setdefault(name, str(value))
    if not dist.is_initialized() and not join_process_group(should_stop):
        return False
    if not torch.cuda.is_available():
        _skip_shared_memory_build()
    deepspeed.init_distributed(verbose=False)  # takes over the group
    return True


def build_engine(
    objective: nn.Module,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    compiled: Sequence[type[nn.Module]] = (),
) -> TrainingEngine:
    """Wrap a model in a DeepSpeed engine, with an optimizer for all trainable parameters (collective).

    Args:
        objective: Model whose forward pass returns losses.
        config: ZeRO stage, precision, batch sizes and clipping.
        optimizer: Optimizer and its hyperparameters.
        compiled: Classes of modules that are compiled. ZeRO 3 gathers the parameters of such a module all at once. Its
            hooks would otherwise run inside of the module, where torch.compile follows them: 95 graph breaks, and the
            error "Global grad_mode state changed while dynamo tracing" on a busy machine.

    Returns:
        The engine. Its optimizer already knows how ZeRO has partitioned the parameters.
    """
    settings = deepspeed_config(config, distributed.world_size(), on_gpu=torch.cuda.is_available())
    inner = build_optimizer(objective, optimizer)
    if config.zero_stage == 3 and compiled:
        deepspeed.utils.set_z3_leaf_modules(objective, list(compiled))
    with _without_steps(inner):
        engine, *_ = deepspeed.initialize(model=objective, optimizer=inner, config=settings)
    if config.zero_stage == 0 and config.precision == "fp32":
        engine.clip_fp32_gradients = lambda: _clip_and_keep_norm(engine)
    bind_optimizer(engine, optimizer)
    return engine  # type: ignore[no-any-return]


def deepspeed_config(config: EngineConfig, world_size: int, *, on_gpu: bool) -> dict[str, Any]:
    """Derive DeepSpeed's config from ours.

    Args:
        config: Our engine section.
        world_size: Number of ranks.
        on_gpu: Whether the ranks train on GPUs.

    Returns:
        The config for `deepspeed.initialize`. Its micro-batch size is the largest of a step; if the ranks do not divide
        the global batch, the training loop weights each micro-batch by its true size.
    """
    accumulation_steps = config.accumulation_steps(world_size)
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": on_gpu and world_size > 1,  # overlapping slows a single GPU down
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
        # Use torch's AdamW even with offloading, where DeepSpeed would compile its own optimizer for the CPU.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # Checking every gradient for overflow took 22 of 97 ms per step; `health.py` checks their norm instead.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "steps_per_print": sys.maxsize,
    }


def gradient_norm(engine: TrainingEngine) -> Tensor:
    """Return the norm of the last step's gradient over all ranks before clipping: an fp32 scalar on the device."""
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    norm = engine.get_global_grad_norm() if norm is None else norm  # type: ignore[attr-defined]
    return torch.as_tensor(norm, dtype=torch.float32, device=engine.device)


def guard_updates(engine: TrainingEngine, is_bad: Callable[[Tensor], Tensor]) -> None:
    """Skip the weight update of every step whose gradient norm is judged bad, without a wait of the host.

    All optimizers read `found_inf`, the flag that torch's gradient scaler sets on fused optimizers: with a value of 1
    they change neither weights nor moments. It works at every ZeRO stage.

    Args:
        engine: Engine whose updates to guard.
        is_bad: Function that takes the gradient norm, a scalar on the device, and returns 1 to skip the update and 0
            to apply it, also as a scalar on the device.
    """

    def before_step(optimizer: Any, args: object, options: object) -> None:
        optimizer.found_inf = is_bad(gradient_norm(engine))

    torch_optimizer(engine).register_step_pre_hook(before_step)


@contextmanager
def _without_steps(optimizer: Optimizer) -> Iterator[None]:
    """Disable `optimizer.step` for a while.

    In bf16 at stage 0, DeepSpeed takes a step without gradients while it initializes, which would be counted.
    """
    optimizer.step = lambda *_: None  # type: ignore[assignment, method-assign]
    yield
    del optimizer.step


def _clip_and_keep_norm(engine: Any) -> None:
    """Clip the gradients as DeepSpeed does at stage 0 in fp32, and keep their norm, which DeepSpeed drops there."""
    engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())


def _skip_shared_memory_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory reductions on a CPU; gloo does the same work.

    The build takes minutes. If it is killed, it leaves a lock that every later run waits for
    (pytorch/pytorch#189245).
    """
    importlib.import_module("deepspeed.comm.torch")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
