"""The host never waits for the device in a step of fine-tuning, except for the stop flag of the step before.

What a CPU can show: no operation needs a value or a shape on the host, and every copy from the host is asynchronous.
Not yet run on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import finetune.evaluate
import finetune.train
from benchmarks.counting import HostWaits, mark_host_tensors
from finetune.config import FinetuneConfig
from finetune.evaluate import evaluate
from finetune.run import FinetuneRun, build_run, open_tracker
from pretrain.configfile import load_config
from pretrain.data.loading.loader import LoadedBatch, evaluation_batches, training_batches
from pretrain.data.transforms.batch import Batch
from tests.support.classifiers import save_classifier, tiny_configs

pytestmark = pytest.mark.slow

RECIPE = """
run_dir: {folder}/run
model: {folder}/model
data: {{train: {digits}/train, validation: {digits}/validation, num_workers: 0}}
augment: {{brightness: 0.3, contrast: 0.3, saturation: 0.3, hue: 0.1, grayscale: 0.2, erasing: 0.25}}
schedule: {{epochs: 1}}
engine: {{global_batch_size: 12, micro_batch_size: 6}}
logging: {{every_steps: 100}}
tracking: {{uri: off}}
"""
FLAG = "aten._local_scalar_dense.default in pretrain/delayed_flag.py:any_over_ranks"  # the only wait


@pytest.fixture
def build(tmp_path: Path, digits: Path) -> Callable[..., FinetuneRun]:
    """A function that builds a run of a tiny ViT with overrides."""

    def build(*overrides: str) -> FinetuneRun:
        save_classifier(tiny_configs()["vit"], tmp_path / "model")
        recipe = tmp_path / "finetune.yaml"
        recipe.write_text(RECIPE.format(folder=tmp_path, digits=digits))
        return build_run(load_config(FinetuneConfig, recipe, overrides).config, Accelerator(cpu=True))

    return build


@pytest.fixture(autouse=True)
def host_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark the tensors that the loader returns as tensors of the host, for both training and evaluation."""

    def marked(load: Callable[..., Iterator[LoadedBatch]]) -> Callable[..., Iterator[LoadedBatch]]:
        def load_marked(*arguments: Any, **options: Any) -> Iterator[LoadedBatch]:
            for loaded in load(*arguments, **options):
                mark_host_tensors(loaded.tensors)
                yield loaded

        return load_marked

    monkeypatch.setattr("finetune.steps.training_batches", marked(training_batches))
    monkeypatch.setattr("finetune.evaluate.evaluation_batches", marked(evaluation_batches))


def watched_steps(run: FinetuneRun, first: int, last: int) -> HostWaits:
    """Train, and return what happens from the beginning of one step to the end of another."""
    found, prepare_step = HostWaits(), finetune.train.prepare_step
    stack = ExitStack()

    def prepare(run: FinetuneRun, step: int) -> float:
        if step == first:
            stack.enter_context(found)
        if step == last + 1:
            stack.close()
        return prepare_step(run, step)

    with mock.patch("finetune.train.prepare_step", prepare), open_tracker(run, "") as tracker:
        finetune.train.train(run, tracker)
    return found


@pytest.mark.parametrize(
    "settings",
    [[], ["augment.mixup=0.2"], ["augment.cutmix=1.0", "label_smoothing=0.1"], ["engine.precision=bf16"]],
)
def test_a_step_waits_only_for_the_stop_flag_of_the_step_before(
    build: Callable[..., FinetuneRun], settings: list[str]
) -> None:
    found = watched_steps(build(*settings), 4, 6)
    assert found.waits == [FLAG] * 3
    assert found.num_operations > 100  # it was counted


def test_a_frozen_backbone_adds_no_wait(build: Callable[..., FinetuneRun]) -> None:
    assert watched_steps(build("freeze_backbone=true"), 4, 4).waits == [FLAG]


def test_an_evaluation_waits_for_a_flag_per_batch_and_for_its_result(build: Callable[..., FinetuneRun]) -> None:
    run = build()
    sizes: list[int] = []

    class Model:
        """The classifier, which counts its batches."""

        training = False
        eval = train = lambda *_: None

        def __call__(self, pixel_values: Tensor) -> Any:
            sizes.append(len(pixel_values))
            return run.classifier(pixel_values=pixel_values)

    data = run.validation
    arguments: dict[str, Any] = {"num_workers": 0, "device": torch.device("cpu"), "quarantine": run.quarantine}
    with HostWaits() as found:
        evaluate(Model(), data, run.preprocessor, batch_size=7, should_stop=lambda: False, **arguments)
    assert len(sizes) > 3
    own = [wait for wait in found.waits if "in pretrain/data" not in wait]  # the loader's tensors are on the host
    assert own == [*[FLAG] * (len(sizes) - 1), "copy to the host in finetune/evaluate.py:evaluate"]


def test_what_would_wait_is_found() -> None:
    """The counter of this file finds each kind of wait."""
    values, device = torch.ones(3), torch.device("cpu")
    mark_host_tensors(cast(Batch, {"image": values, "global_crops": {"image": torch.ones(1)}}))
    with HostWaits() as found:
        values.to(device, non_blocking=True)
        values[0].add(1).to(device)
        assert not found.waits
        values.to(device)
        values.to(device=device)
        torch.tensor([1.0], device=device)
        values[values > 0]
        values.nonzero()
        bool(values.sum() > 0)
        values.cpu()
        values.tolist()
    assert [wait.partition(" in ")[0] for wait in found.waits] == [
        "blocking copy",
        "blocking copy",
        "torch.tensor on a device",
        "aten.index.Tensor",
        "aten.nonzero.default",
        "aten._local_scalar_dense.default",
        "copy to the host",
        "copy to the host",
    ]
