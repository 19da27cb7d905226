"""Evaluation in one process: when it is due, what it returns, and that a stop request ends it early."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.counting import HostWaits, mark_host_tensors
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.open import open_dataset
from pretrain.data.dataset.subset import LabelSubset
from pretrain.data.loading.loader import LoadedBatch, evaluation_batches
from pretrain.data.loading.quarantine import Quarantine
from pretrain.engine.ema import Ema
from pretrain.errors import BadSampleError, DataError
from pretrain.evaluation import Evaluator
from pretrain.heartbeat.watch import Watch
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.tracking.pictures import GAP, add_captions
from tests.support.checkpoints import PlainEngine

Build = Callable[..., Evaluator]

STEPS = 8
FLAG = "aten._local_scalar_dense.default in pretrain/delayed_flag.py:any_over_ranks"
PROBES = {"knn_top1", "linear_top1", "feature_rank", "feature_spread", "seconds"}


class CallableEngine(PlainEngine):
    """A plain engine that evaluation can call like DeepSpeed's."""

    device = torch.device("cpu")

    def __call__(self, batch: Any, output: str = "losses") -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.module(batch, output=output)
        return outputs

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


@pytest.fixture
def build_evaluator(tiny: Path) -> Iterator[Build]:
    """A function that builds an evaluator of the tiny recipe with overrides."""
    with ExitStack() as stack:
        yield lambda *overrides: _build_evaluator(tiny, stack, *overrides)


def _build_evaluator(recipe: Path, stack: ExitStack, *overrides: str) -> Evaluator:
    settings = ["data.num_workers=0", f"schedule.total_steps={STEPS}", "evaluation.probe_samples=40", *overrides]
    config = load_config(PretrainConfig, recipe, settings).config
    training, validation = open_dataset(config.data.train), open_dataset(str(config.data.validation))
    torch.manual_seed(0)
    objective = build_objective(config.objective, ViT(config.model), training.class_shares, config.preprocessing)
    engine = CallableEngine.adamw(objective.train())
    config.run_dir.mkdir(parents=True)
    quarantine = Quarantine(config.run_dir / "quarantine.jsonl", config.data, 0, writes=True)
    watch = stack.enter_context(Watch(config.run_dir, 0, 1))
    return Evaluator(config, training, validation, objective, engine, Ema(engine, 0.0), quarantine, watch)


def fail(dataset: Dataset, shard: int, row: int) -> EncodedSample:
    raise BadSampleError("shard", f"key-{row}", "damaged")


class Stop:
    """Asks to stop when it is called for the given time; never for 0."""

    def __init__(self, at_call: int = 0) -> None:
        self.at_call = at_call
        self.calls = 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls == self.at_call


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], {8}),
        (["evaluation.every_steps=3"], {3, 6, 8}),
        (["evaluation.probe_every_steps=5"], {5, 8}),
        (["evaluation.every_steps=3", "evaluation.probe_every_steps=4"], {3, 4, 6, 8}),
    ],
)
def test_evaluation_is_due_at_its_steps_and_at_the_last(
    build_evaluator: Build, settings: list[str], expected: set[int]
) -> None:
    evaluator = build_evaluator(*settings)
    assert {step for step in range(1, STEPS + 1) if evaluator.is_due(step)} == expected


def test_evaluation_returns_losses_and_probes_and_saves_pictures(build_evaluator: Build) -> None:
    evaluator = build_evaluator("evaluation.probe_every_steps=4")
    middle, last = evaluator.evaluate(4, Stop()), evaluator.evaluate(STEPS, Stop())
    assert middle is not None
    assert last is not None
    assert middle.keys() == {f"probe/{name}" for name in PROBES}
    assert last.keys() == middle.keys() | {"validation/loss", "validation/top1"}
    pictures = sorted((evaluator.config.run_dir / "pictures").iterdir())
    assert [path.name for path in pictures] == ["step-00000004.png", "step-00000008.png"]
    assert evaluator.objective.training
    assert replace(evaluator, validation=None).evaluate(STEPS, Stop()) == {}


def test_pictures_say_what_they_show(build_evaluator: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = build_evaluator("evaluation.probe_every_steps=4")
    assert evaluator.validation is not None
    three = LabelSubset(evaluator.validation, 1, seed=0)
    pages = []
    monkeypatch.setattr("pretrain.evaluation.add_captions", lambda *page: pages.append(page) or add_captions(*page))
    replace(evaluator, validation=three).evaluate(4, Stop())
    with mock.patch.object(three, "class_names", []):
        replace(evaluator, validation=three).evaluate(4, Stop())
    fetch = three.fetch
    monkeypatch.setattr(three, "fetch", lambda shard, row: fetch(shard, row) if row != 1 else fail(three, shard, row))
    replace(evaluator, validation=three).evaluate(4, Stop())
    titles, headings, names = ([page[i] for page in pages] for i in (1, 2, 3))
    assert titles == ["tiny, step 4 (supervised): validation images"] * 3
    assert headings == [["original", "head 1 attention", "head 2 attention"]] * 3
    assert names == [["0", "1", "2"], [], ["0", "unusable image", "2"]]
    assert [page[0].size for page in pages] == [(3 * 96 + 2 * GAP, 3 * 96 + 2 * GAP)] * 3  # no image is repeated


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_a_stop_request_ends_the_evaluation_without_a_result(build_evaluator: Build, share: float) -> None:
    """In the validation, or while the features of training or validation images are computed for the probes."""
    evaluator, never = build_evaluator("evaluation.probe_every_steps=4"), Stop()
    assert evaluator.evaluate(STEPS, never) is not None
    call = 1 + int(share * never.calls)
    (evaluator.config.run_dir / "pictures" / "step-00000008.png").unlink()
    stop = Stop(call)
    assert evaluator.evaluate(STEPS, stop) is None
    assert stop.calls == call + 1  # the ranks agree on it one batch later
    assert evaluator.objective.training
    assert not list((evaluator.config.run_dir / "pictures").iterdir())


def test_no_batch_waits_for_the_device(build_evaluator: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads a stop flag per batch, that of the batch before, and the result at the end."""

    def load_marked(*arguments: Any, **options: Any) -> Iterator[LoadedBatch]:
        for loaded in evaluation_batches(*arguments, **options):
            mark_host_tensors(loaded.tensors)
            yield loaded

    monkeypatch.setattr("pretrain.evaluation.evaluation_batches", load_marked)
    evaluator, stop = build_evaluator(), Stop()
    with HostWaits() as found:
        evaluator.evaluate(STEPS, stop)
    assert stop.calls > 2
    assert _waits_of(found) == [*[FLAG] * (stop.calls - 1), "copy to the host in pretrain/evaluation.py:_validate"]
    assert evaluator.training is not None
    with torch.no_grad(), HostWaits() as found:
        evaluator._features(evaluator.training, stop)
    assert _waits_of(found) == [
        "aten.nonzero.default in pretrain/evaluation.py:_features"
    ]  # of the weights, on the host


def _waits_of(found: HostWaits) -> list[str]:
    """Return the waits outside the loader, whose tensors are on the host."""
    return [wait for wait in found.waits if "in pretrain/data/loading" not in wait]


def test_a_final_evaluation_is_missing_if_its_row_was_not_logged(build_evaluator: Build) -> None:
    evaluator = build_evaluator()
    rows = [{"step": STEPS, "train/loss": 1.0}, {"step": 4, "validation/loss": 1.0}]
    assert evaluator.final_is_missing(rows, STEPS)
    assert not evaluator.final_is_missing(rows, STEPS - 1)
    assert not evaluator.final_is_missing([*rows, {"step": STEPS, "validation/loss": 1.0}], STEPS)
    assert not replace(evaluator, validation=None).final_is_missing(rows, STEPS)


def test_a_validation_set_without_usable_samples_is_refused(
    build_evaluator: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = build_evaluator()
    monkeypatch.setattr(type(evaluator.validation), "fetch", fail)
    with pytest.raises(DataError, match=r"validation: no sample of the validation set is usable; see .*quarantine"):
        evaluator.evaluate(STEPS, Stop())


def test_a_full_disk_costs_only_the_picture(
    build_evaluator: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluator = build_evaluator("evaluation.probe_every_steps=4")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain.evaluation.save_picture", refuse)
    assert evaluator.evaluate(4, Stop()) is not None
    assert "step 4: the picture could not be saved: [Errno 28] No space left on device" in capsys.readouterr().err
