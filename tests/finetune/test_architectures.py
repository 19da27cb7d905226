"""Fine-tuning of architectures that need care on several ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.backbone import load_classifier
from finetune.evaluate import evaluate
from finetune.preprocessor import load_preprocessor
from pretrain.config import FaultBudget
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.quarantine import Quarantine
from tests.support.launching import ROOT, TINY
from tests.support.ranks import RankServer
from tests.support.runs import logged, losses
from tests.support.shared import once

FineTune = Callable[[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def fine_tuned(digits: Path, session_folder: Path) -> Iterator[FineTune]:
    """Fine-tune a classifier of an architecture on so many ranks; return what its main rank has seen."""
    root = session_folder / "ranks_finetune"
    root.mkdir(exist_ok=True)
    recipe = TINY.format(run_dir="unused", shards=digits)
    once(root / "tiny.yaml", lambda path: path.write_text(recipe))
    server = RankServer(ROOT / "tests" / "finetune" / "ranks_finetune.py", root)
    yield server.run
    server.close()


@pytest.mark.parametrize("architecture", ["dinov2", "resnet"])
def test_the_saved_model_has_the_loss_of_two_ranks(
    fine_tuned: FineTune, digits: Path, tmp_path: Path, architecture: str
) -> None:
    """DINOv2 has a parameter that classification never uses, and ResNet has statistics that differ between ranks."""
    run_dir = Path(fine_tuned(architecture, 2)["run_dir"])
    evaluation = evaluate(
        load_classifier(run_dir / "model"),
        open_dataset(digits / "validation"),
        load_preprocessor(run_dir / "model"),
        batch_size=8,
        num_workers=0,
        device=torch.device("cpu"),
        quarantine=Quarantine(tmp_path / "quarantine.jsonl", FaultBudget(), 0, writes=True),
    )
    assert evaluation is not None
    assert logged(run_dir, "validation/loss") == pytest.approx([evaluation.loss], abs=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "compiled-dinov2"])
def test_two_ranks_have_the_losses_of_one(fine_tuned: FineTune, name: str) -> None:
    alone, together = (Path(seen["run_dir"]) for seen in (fine_tuned("dinov2", 1), fine_tuned(name, 2)))
    assert losses(alone) == pytest.approx(losses(together), abs=1e-4)


def test_no_step_searches_for_unused_parameters(fine_tuned: FineTune) -> None:
    """A rank that trains alone has no wrapper around its model at all."""
    assert fine_tuned("dinov2", 2)["searches"] == [False]
    assert fine_tuned("resnet", 2)["searches"] == [False]
    assert fine_tuned("dinov2", 1)["searches"] == []
