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
from torch import nn
from torch.optim import Optimizer

from pretrain import distributed
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engine.placement import bind_optimizer
from pretrain.engine.protocol import TrainingEngine
from pretrain.errors import UserError
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
    blocks: Sequence[type[nn.Module]] = (),
) -> TrainingEngine:
    """Wrap a model in a DeepSpeed engine, with an optimizer for all trainable parameters (collective).

    Args:
        objective: Model whose forward pass returns losses.
        config: ZeRO stage, precision, batch sizes and clipping.
        optimizer: Optimizer and its hyperparameters.
        blocks: Classes of modules whose parameters ZeRO 3 gathers all at once, by hooks around their forward pass.
            Around smaller modules, the hooks would run inside of compiled blocks: torch.compile follows them, with 95
            graph breaks, and the error "Global grad_mode state changed while dynamo tracing" on a busy machine.

    Returns:
        The engine. Its optimizer already knows how ZeRO has partitioned the parameters.

    Raises:
        UserError: If the host would wait for the GPU in each step, at stage 0 with bf16.
    """
    if config.zero_stage == 0 and config.precision == "bf16" and torch.cuda.is_available():
        raise UserError(
            "engine.zero_stage: 0 with precision=bf16 is not supported on GPUs, because DeepSpeed's optimizer for it "
            "waits for the GPU 72 times per step; set zero_stage=1, which computes the same and needs less memory"
        )
    settings = deepspeed_config(config, distributed.world_size(), on_gpu=torch.cuda.is_available())
    inner = build_optimizer(objective, optimizer)
    if config.zero_stage == 3 and blocks:
        deepspeed.utils.set_z3_leaf_modules(objective, list(blocks))
    with _without_steps(inner):
        engine, *_ = deepspeed.initialize(model=objective, optimizer=inner, config=settings)
    _leave_out_waits(engine, config)
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
    is_reduced = _is_reduced(config, world_size)
    zero: dict[str, Any] = {
        # A single rank has no gradients of other ranks to drop, which is what stage 2 adds to stage 1.
        "stage": config.zero_stage if is_reduced else min(config.zero_stage, 1),
        "overlap_comm": on_gpu and world_size > 1,  # overlapping slows a single GPU down
        "contiguous_gradients": is_reduced,
        "reduce_bucket_size": BUCKET_SIZE,
        "allgather_bucket_size": BUCKET_SIZE,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    elif config.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # `gradients.py` computes it without a wait of the host
    settings = {
        "train_batch_size": config.micro_batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": 0.0,  # the optimizers clip, see `gradients.py`
        "zero_optimization": zero,
        # Use torch's AdamW even with offloading, where DeepSpeed would compile its own optimizer for the CPU.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # Checking every gradient for overflow took 22 of 97 ms per step; `health.py` checks their norm instead.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "timers": {"throughput": {"enabled": False}},  # the host waits for the device twice per micro-batch
        "steps_per_print": sys.maxsize,
    }
    if config.precision == "bf16" and accumulation_steps > 1 and (zero["stage"] >= 2 or config.offload_optimizer):
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _is_reduced(config: EngineConfig, world_size: int) -> bool:
    """Return whether DeepSpeed reduces and copies gradients: on one rank, only at stage 3 and for offloading."""
    return world_size > 1 or config.zero_stage == 3 or config.offload_optimizer


def _leave_out_waits(engine: Any, config: EngineConfig) -> None:
    """Change what DeepSpeed's config has no keys for: the norm at stage 3, work of a single rank, and sums in fp32."""
    is_reduced = _is_reduced(config, distributed.world_size())
    engine.enable_backward_allreduce = is_reduced
    optimizer = engine.optimizer
    if config.zero_stage == 3 and not config.offload_optimizer:
        # DeepSpeed would compute the norm and read it on the host. A number on the host in its place costs no wait.
        optimizer._get_norm_groups = lambda: [torch.ones(())]
    if config.zero_stage in (1, 2) and getattr(optimizer, "overlap_comm", False):
        _order_on_device(optimizer)
    adds_up_bf16 = config.precision == "bf16" and engine.gradient_accumulation_steps() > 1
    if config.zero_stage == 1 and adds_up_bf16 and is_reduced:
        # If the config asked for sums in fp32, DeepSpeed would take an optimizer without partitions of this kind.
        optimizer.gradient_accumulation_dtype = torch.float32
        optimizer.use_separate_grad_accum = optimizer.use_grad_accum_attribute = True


def _order_on_device(optimizer: Any) -> None:
    """Let the device wait for overlapped reductions at the end of the backward pass, in place of the host.

    DeepSpeed synchronizes the device there (`independent_gradient_partition_epilogue`), so that the optimizer's kernels
    would be started only after the backward pass has ended. Not yet run on a GPU.
    """
    epilogue, accelerator = optimizer.independent_gradient_partition_epilogue, deepspeed.accelerator.get_accelerator()

    def wait_on_device(*_: object) -> None:
        accelerator.current_stream().wait_stream(optimizer.reduction_stream)

    def without_host_wait() -> None:
        accelerator.synchronize = wait_on_device
        try:
            epilogue()
        finally:
            del accelerator.synchronize  # the method of its class appears again

    optimizer.independent_gradient_partition_epilogue = without_host_wait


@contextmanager
def _without_steps(optimizer: Optimizer) -> Iterator[None]:
    """Disable `optimizer.step` for a while.

    In bf16 at stage 0, DeepSpeed takes a step without gradients while it initializes, which would be counted.
    """
    optimizer.step = lambda *_: None  # type: ignore[assignment, method-assign]
    yield
    del optimizer.step


def _skip_shared_memory_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory reductions on a CPU; gloo does the same work.

    The build takes minutes. If it is killed, it leaves a lock that every later run waits for
    (pytorch/pytorch#189245).
    """
    importlib.import_module("deepspeed.comm.torch")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
