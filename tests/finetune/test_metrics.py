"""The same number as scikit-learn's, and one number on any number of ranks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from finetune.metrics import evaluate
from pretrain.config import FaultBudget
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.quarantine import Quarantine
from pretrain.data.transforms.views import EvalView
from pretrain.errors import DataError
from pretrain.journal import read_rows


class Answer:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Linear(nn.Module):
    """A fixed random classifier of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)  # must be off while measuring
        self.weight = nn.Parameter(torch.randn(3 * 32 * 32, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixel_values: torch.Tensor) -> Answer:
        return Answer(self.dropout(pixel_values.float()).flatten(1) / 255 @ self.weight / 10)


def settings(folder: Path) -> dict[str, Any]:
    quarantine = Quarantine(folder / "quarantine.jsonl", FaultBudget(), 0, writes=True)
    return {"num_workers": 0, "device": torch.device("cpu"), "quarantine": quarantine}


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_equals_scikit_learn(digits: Path, tmp_path: Path, batch_size: int) -> None:
    samples, model = open_dataset(digits / "validation"), Linear().train()
    measured = evaluate(model, samples, EvalView(32), batch_size=batch_size, **settings(tmp_path))
    assert model.training
    records = [samples.read(shard, row) for shard, size in enumerate(samples.shard_sizes) for row in range(size)]
    pixels = torch.from_numpy(np.stack([record.image.transpose(2, 0, 1) for record in records]))
    labels = [record.label for record in records]
    with torch.no_grad():
        probabilities = model.eval()(pixels).logits.softmax(dim=1).numpy().astype(float)
    assert measured["count"] == len(records)
    assert measured["top1"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)), abs=1e-9)
    assert measured["loss"] == pytest.approx(
        log_loss(labels, probabilities / probabilities.sum(1, keepdims=True)), rel=1e-4
    )


def test_samples_that_cannot_be_used_do_not_count_and_are_named(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "validation", tmp_path / "data")
    tar = tmp_path / "data" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    samples = open_dataset(tmp_path / "data")
    measured = evaluate(Linear(), samples, EvalView(32), batch_size=7, **settings(tmp_path))
    assert measured["count"] == sum(samples.shard_sizes) - 1
    [fault] = read_rows(tmp_path / "quarantine.jsonl")
    assert (fault["shard"], fault["reason"]) == (str(tar), "damaged: its checksum is off")
    for path in (tmp_path / "data").glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no validation sample can be used; .*quarantine.jsonl says why"):
        evaluate(Linear(), samples, EvalView(32), batch_size=64, **settings(tmp_path))
