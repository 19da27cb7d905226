"""Explain the errors of a GPU, which PyTorch raises as errors of the program."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.errors import RankError

PRETRAINING_FIXES = (
    "decrease engine.micro_batch_size (the global batch stays the same), set engine.activation_checkpointing=true, or "
    "increase engine.zero_stage"
)
FINETUNING_FIXES = "decrease engine.micro_batch_size (the global batch stays the same)"
# Libraries that fail to allocate raise other errors than PyTorch's own allocator.
MEMORY_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
DEVICE_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")


@contextmanager
def explain_device_errors(memory_fixes: str = PRETRAINING_FIXES) -> Iterator[None]:
    """Explain an error of the GPU that ends the block. Any other error passes unchanged.

    A GPU runs behind the program, so the traceback of its errors often names the wrong line. The error is raised
    unchanged after a sentence that tells how to find the right one.

    Args:
        memory_fixes: Advice for a GPU whose memory is too small.

    Raises:
        RankError: If the memory of the GPU is too small.
    """
    try:
        yield
    except RuntimeError as error:
        if _has_words(error, MEMORY_WORDS) or isinstance(error, torch.OutOfMemoryError):
            reason = str(error).split(". ")[0].strip().splitlines()[0]
            raise RankError(f"the memory of the GPU is too small ({reason}); {memory_fixes}") from error
        if isinstance(error, torch.AcceleratorError) or _has_words(error, DEVICE_WORDS):
            print(
                "the GPU reported an error, perhaps some operations later; set CUDA_LAUNCH_BLOCKING=1 and start the "
                "run again, which makes it slow and the traceback exact",
                file=sys.stderr,
                flush=True,
            )
        raise


def _has_words(error: RuntimeError, words: tuple[str, ...]) -> bool:
    return any(word in str(error) for word in words)
