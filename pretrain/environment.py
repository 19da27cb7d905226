"""Environment variables that would change a run although its config says otherwise."""

import os

import torch

from pretrain.errors import UserError

# Products of fp32 matrices become TF32, or `engine.compile` does nothing.
REFUSED = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCHDYNAMO_DISABLE",
    "TORCH_COMPILE_DISABLE",
)


def check_environment() -> None:
    """Check that no variable of this process changes the run.

    Raises:
        UserError: If one does.
    """
    found = [name for name in REFUSED if os.environ.get(name) not in (None, "", "0")]
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    if os.environ.get("DS_ACCELERATOR", expected) != expected:
        found.append("DS_ACCELERATOR")  # DeepSpeed would train on another device
    if found:
        named = ", ".join(f"{name}={os.environ[name]}" for name in found)
        raise UserError(f"{named}: set in the environment, which would change the run; unset it")
