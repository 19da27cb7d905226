"""Evaluation returns the same numbers as scikit-learn, names unusable samples, and can be stopped."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from finetune.evaluate import Evaluation, evaluate
from pretrain.config import FaultBudget
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.quarantine import Quarantine
from pretrain.data.transforms.views import EvalView
from pretrain.errors import DataError
from pretrain.journal import read_rows


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Linear(nn.Module):
    """A fixed random classifier of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)  # must be inactive during an evaluation
        self.weight = nn.Parameter(torch.randn(3 * 32 * 32, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixel_values: torch.Tensor) -> Output:
        return Output(self.dropout(pixel_values.float()).flatten(1) / 255 @ self.weight / 10)


def evaluate_linear(
    dataset: Dataset, folder: Path, *, batch_size: int, model: nn.Module | None = None, **options: Any
) -> Evaluation | None:
    return evaluate(
        model or Linear(),
        dataset,
        EvalView(32),
        batch_size=batch_size,
        num_workers=0,
        device=torch.device("cpu"),
        quarantine=Quarantine(folder / "quarantine.jsonl", FaultBudget(), 0, writes=True),
        **options,
    )


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_equals_scikit_learn(digits: Path, tmp_path: Path, batch_size: int) -> None:
    dataset, model = open_dataset(digits / "validation"), Linear().train()
    evaluation = evaluate_linear(dataset, tmp_path, batch_size=batch_size, model=model)
    assert evaluation is not None
    assert model.training
    samples = [dataset.read(shard, row) for shard, size in enumerate(dataset.shard_sizes) for row in range(size)]
    pixels = torch.from_numpy(np.stack([sample.image.transpose(2, 0, 1) for sample in samples]))
    labels = [sample.label for sample in samples]
    with torch.no_grad():
        probabilities = model.eval()(pixels).logits.softmax(dim=1).numpy().astype(float)
    assert evaluation.num_samples == len(samples)
    assert evaluation.top1 == pytest.approx(accuracy_score(labels, probabilities.argmax(1)), abs=1e-9)
    assert evaluation.loss == pytest.approx(
        log_loss(labels, probabilities / probabilities.sum(1, keepdims=True)), rel=1e-4
    )


def test_unusable_samples_are_named_and_do_not_count(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "validation", tmp_path / "data")
    tar = tmp_path / "data" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    dataset = open_dataset(tmp_path / "data")
    evaluation = evaluate_linear(dataset, tmp_path, batch_size=7)
    assert evaluation is not None
    assert evaluation.num_samples == sum(dataset.shard_sizes) - 1
    [fault] = read_rows(tmp_path / "quarantine.jsonl")
    assert (fault["shard"], fault["reason"]) == (str(tar), "damaged: its checksum is off")


def test_data_without_a_usable_sample_is_an_error(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "validation", tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    for path in (tmp_path / "data").glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no sample is usable; see the reasons in .*quarantine.jsonl"):
        evaluate_linear(dataset, tmp_path, batch_size=64)


def test_a_stopped_evaluation_has_no_result(digits: Path, tmp_path: Path) -> None:
    calls = iter([False, True, True])
    model = Linear().train()
    dataset = open_dataset(digits / "validation")
    result = evaluate_linear(dataset, tmp_path, batch_size=7, model=model, should_stop=lambda: next(calls))
    assert result is None
    assert next(calls, None) is None  # requested before the second batch, and agreed on before the third
    assert model.training
