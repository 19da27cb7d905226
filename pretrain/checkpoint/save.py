"""Write a checkpoint aside; show it only when every rank's part is there."""

import shutil
from pathlib import Path

from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint.manifest import ENGINE, PARTIAL, WEIGHTS, Manifest, checkpoints_folder, list_checkpoints
from pretrain.distributed import is_main, wait_for_all
from pretrain.engine import Engine


def save(engine: Engine, manifest: Manifest, run_dir: Path, keep_last: int) -> Path:
    """Save a run; every rank calls this at the same step.

    Args:
        engine: holds the model and each rank's part of the optimizer.
        manifest: of this moment.
        run_dir: of the run.
        keep_last: how many checkpoints to keep, this one included.

    Returns:
        The checkpoint's folder. It is there whole, or not at all.
    """
    folder = checkpoints_folder(run_dir) / f"step-{manifest.step:08d}"
    partial = folder.with_name(folder.name + PARTIAL)
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False)
    weights = gather_weights(engine)
    if is_main():
        for script in partial.glob("zero_to_*.py"):  # DeepSpeed's converters; the weights are here already
            script.unlink()
        save_file(weights, partial / WEIGHTS)
        manifest.save(partial)
    wait_for_all()
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in list_checkpoints(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    wait_for_all()
    return folder


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """Return the fp32 weights and buffers on the main rank; elsewhere nothing. Every rank must call this."""
    module, weights, masters = engine.module, {}, _unsharded_masters(engine)
    for name, parameter in module.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # at ZeRO stages 1 to 3; None at stage 0
        if full is None:
            full = masters.get(parameter)
        if is_main():
            weights[name] = (parameter if full is None else full).detach().float().cpu().contiguous()
    if is_main():
        saved = module.state_dict().keys()
        buffers = ((name, buffer) for name, buffer in module.named_buffers() if name in saved)
        weights |= {name: buffer.float().cpu().contiguous() for name, buffer in buffers}
    return weights


def _unsharded_masters(engine: Engine) -> dict[Tensor, Tensor]:
    """Return the fp32 copies that stage 0 keeps of bf16 parameters; in fp32 there are none."""
    pairs = zip(
        getattr(engine.optimizer, "fp16_groups", ()), getattr(engine.optimizer, "fp32_groups", ()), strict=False
    )
    return {low: master for lows, masters in pairs for low, master in zip(lows, masters, strict=False)}
