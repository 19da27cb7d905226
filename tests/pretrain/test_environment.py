"""Variables that would change a run are refused; those that only seem to are not."""

import pytest

from pretrain.environment import check_environment
from pretrain.errors import UserError


def test_variables_that_change_a_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_environment()  # DS_ACCELERATOR=cpu, without a GPU
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    check_environment()
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(
        UserError,
        match=r"^TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, TORCHDYNAMO_DISABLE=1, DS_ACCELERATOR=cuda: set in the "
        r"environment, .*; unset it$",
    ):
        check_environment()
