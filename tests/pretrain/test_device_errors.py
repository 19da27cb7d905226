"""Errors of a GPU are explained: a sentence for too little memory, advice next to the traceback for all others."""

import subprocess
import sys

import pytest
import torch

from pretrain import distributed
from pretrain.device_errors import FINETUNING_FIXES, explain_device_errors
from pretrain.errors import MachineError, RankError, StartupError
from pretrain.outcome import Outcome, outcome_of

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.06 GiB is free"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(OUT_OF_MEMORY),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory_is_one_sentence_with_the_fix(error: RuntimeError) -> None:
    with pytest.raises(RankError) as caught, explain_device_errors():
        raise error
    assert str(caught.value) == (
        f"the memory of the GPU is too small ({str(error).splitlines()[0].split('. ')[0]}); decrease "
        "engine.micro_batch_size (the global batch stays the same), set engine.activation_checkpointing=true, or "
        "increase engine.zero_stage"
    )
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MachineError)
    assert outcome_of(caught.value) is Outcome.FAILED
    with (
        pytest.raises(RankError, match=r"decrease engine.micro_batch_size \(.*\)$"),
        explain_device_errors(FINETUNING_FIXES),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_other_errors_of_a_gpu_keep_their_traceback(error: RuntimeError, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as caught, explain_device_errors():
        raise error
    assert caught.value is error
    assert "set CUDA_LAUNCH_BLOCKING=1 and start the run again" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("x"), MachineError("y")])
def test_errors_of_the_program_pass_unchanged(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as caught, explain_device_errors():
        raise error
    assert caught.value is error
    assert not capsys.readouterr().err


def test_error_of_one_rank_is_printed_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    for error, is_printed in ((RankError("x"), True), (StartupError("x"), True), (MachineError("x"), False)):
        distributed.print_error(error)
        assert bool(capsys.readouterr().err) == is_printed


@pytest.mark.processes
def test_traceback_names_the_line_of_the_program() -> None:
    program = (
        "from pretrain.device_errors import explain_device_errors\n"
        "with explain_device_errors():\n"
        "    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'File "<string>", line 3' in done.stderr
    assert "CUDA_LAUNCH_BLOCKING=1" in done.stderr
