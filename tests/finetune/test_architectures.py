"""Fine-tuning of architectures that need care on several ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path

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

FineTune = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def fine_tuned(digits: Path, session_folder: Path) -> Iterator[FineTune]:
    """Fine-tune a classifier of an architecture on so many ranks; return its run folder."""
    root = session_folder / "ranks_finetune"
    root.mkdir(exist_ok=True)
    recipe = TINY.format(run_dir="unused", shards=digits)
    once(root / "tiny.yaml", lambda path: path.write_text(recipe))
    server = RankServer(ROOT / "tests" / "finetune" / "ranks_finetune.py", root)
    yield lambda architecture, world_size: Path(server.run(architecture, world_size)["run_dir"])
    server.close()


@pytest.mark.parametrize("architecture", ["dinov2", "resnet"])
def test_the_saved_model_has_the_loss_of_two_ranks(
    fine_tuned: FineTune, digits: Path, tmp_path: Path, architecture: str
) -> None:
    """DINOv2 has a parameter that classification never uses, and ResNet has statistics that differ between ranks."""
    run_dir = fine_tuned(architecture, 2)
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


def test_two_ranks_have_the_losses_of_one(fine_tuned: FineTune) -> None:
    assert losses(fine_tuned("dinov2", 1)) == pytest.approx(losses(fine_tuned("dinov2", 2)), abs=1e-4)
