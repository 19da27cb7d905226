"""Fine-tune small classifiers of several architectures; test_architectures.py compares what they have saved.

python tests/finetune/ranks_finetune.py --only resnet --folder /tmp/runs
"""

import gc
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn.parallel import DistributedDataParallel

import finetune.train
from finetune.config import FinetuneConfig
from finetune.run import FinetuneRun
from finetune.train import FinetuneResult, train_with_tracking
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.configfile import CommandLine, load_config
from pretrain.distributed import leave_process_group
from tests.support.classifiers import save_classifier, tiny_configs
from tests.support.ranks import main
from tests.support.runs import FINETUNE_YAML

COMPILED = "compiled-"  # prefix of the runs that compile their model
RUNS = [(2, "dinov2"), (2, "resnet"), (1, "dinov2"), (2, COMPILED + "dinov2")]


def run(name: str, folder: Path) -> dict[str, Any]:
    """Fine-tune a classifier for one epoch on this rank.

    Returns:
        The run folder, and the kinds of the wrappers around the model with whether they search for unused parameters.
    """
    architecture = name.removeprefix(COMPILED)
    shards = Path(str(load_config(PretrainConfig, folder.parents[1] / "tiny.yaml", []).config.data.train)).parent
    own = folder / f"of-rank-{distributed.rank()}"
    model = save_classifier(tiny_configs()[architecture], own / architecture)
    recipe = own / "finetune.yaml"
    recipe.write_text(FINETUNE_YAML.format(folder=folder, digits=shards))
    settings = [f"model={model}", "schedule.epochs=1", "tracking.uri=off", "data.num_workers=0"]
    config = load_config(FinetuneConfig, recipe, [*settings, f"engine.compile={name != architecture}"]).config
    searches: list[bool] = []

    def train_and_look(run: FinetuneRun, *arguments: Any) -> FinetuneResult:
        wrapped = [each for each in run.model.modules() if isinstance(each, DistributedDataParallel)]
        searches.extend(each.find_unused_parameters for each in wrapped)
        return train_with_tracking(run, *arguments)

    with (
        mock.patch("pretrain.distributed.leave_process_group", leave_without_model),
        mock.patch("finetune.train.train_with_tracking", train_and_look),
        mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")),  # inductor would take a minute
    ):
        assert finetune.train.main(CommandLine(config, "", False)) == 0
    return {"run_dir": str(config.run_dir), "searches": searches}


def leave_without_model() -> None:
    """Leave the process group, which could wait forever if torch's wrapper of the model ended after it."""
    assert not [each for each in gc.get_objects() if type(each) is DistributedDataParallel]
    leave_process_group()


if __name__ == "__main__":
    main(run, __doc__, RUNS)
