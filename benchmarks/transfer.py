"""Measure what pretraining gains: pretrain on digits, then learn the digits 5 to 9 from few labels.

Supervised pretraining uses the digits 0 to 4 with their labels. The other objectives use these and the training images
of 5 to 9, all without labels. The model trained from scratch has the same architecture, labels, augmentations and
steps. For each model, the best of the same learning rates is reported. Frozen features are evaluated by k-NN and a
linear probe with the same labels.

    python benchmarks/transfer.py --labels 1 2 4 --results transfer.jsonl
    python benchmarks/transfer.py --objectives mae --seeds 0    # only the quickstart's objective

With `--results FILE`, an interrupted benchmark continues: what the file contains is not measured again.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import Results
from finetune.config import FinetuneConfig
from finetune.run import build_run, open_tracker
from finetune.train import train
from pretrain.configfile import Loaded, load_config
from pretrain.data.loading.loader import evaluation_batches
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.export.folder import export
from pretrain.metrics.knn import predict_knn
from pretrain.metrics.linear_probe import predict_linear_probe

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
RECIPES = {  # objective -> file in configs/quickstart
    "supervised": "supervised.yaml",
    "mae": "pretrain.yaml",
    "self_distillation": "self_distillation.yaml",
}
SCRATCH = "from scratch"
MEASURES = {  # key of a measure in the results -> its name in the table
    "fine-tuned": "fine-tuned",
    "k-NN": "k-NN of frozen features",
    "linear": "linear probe of frozen features",
}


def make_digits(folder: Path) -> None:
    """Write the digits 0 to 4 for pretraining and 5 to 9 for fine-tuning; half of the latter are for testing."""
    digits = list_digits()
    for name, classes, validation in (("pretrain", "01234", 0.1), ("finetune", "56789", 0.5)):
        source = keep_classes(digits, list(classes))
        make_shards(source, folder / name, ShardOptions(validation_fraction=validation, shard_bytes=64_000, seed=0))


def pretrain(folder: Path, objective: str, seed: int, overrides: list[str]) -> Path:
    """Pretrain with the quickstart's recipe and return the exported folder."""
    run_dir = folder / f"{objective}-seed{seed}"
    datasets = [str(folder / name / "train") for name in ("pretrain", "finetune")]
    command = [
        sys.executable,
        str(ROOT / "launch" / "pretrain.py"),
        f"--config={ROOT / 'configs' / 'quickstart' / RECIPES[objective]}",
        f"run_dir={run_dir}",
        f"seed={seed}",
        f"data.train={datasets[0] if objective == 'supervised' else json.dumps(datasets)}",
        f"data.validation={folder / 'pretrain' / 'validation'}",
        "tracking.uri=off",
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    export(run_dir, run_dir / "export")
    return run_dir / "export"


def load(
    folder: Path, model: Path, seed: int, labels: int, origin: str, extra_overrides: list[str]
) -> Loaded[FinetuneConfig]:
    """Return the config of the quickstart's fine-tuning recipe, which evaluates once, after the last epoch.

    Args:
        folder: Folder with the shards.
        model: Exported folder to fine-tune.
        seed: Random seed.
        labels: Number of labels per class.
        origin: Objective of the pretraining, or `SCRATCH` for random initial weights.
        extra_overrides: Further overrides of the recipe.
    """
    run_dir = folder / "finetune-run"
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = [
        f"run_dir={run_dir}",
        f"model={model}",
        f"seed={seed}",
        f"data.train={folder / 'finetune' / 'train'}",
        f"data.validation={folder / 'finetune' / 'validation'}",
        f"data.labels_per_class={labels}",
        f"engine.global_batch_size={5 * labels}",
        f"from_scratch={'true' if origin == SCRATCH else 'false'}",
        *extra_overrides,
    ]
    return load_config(FinetuneConfig, ROOT / "configs" / "quickstart" / "finetune.yaml", overrides)


def finetune(loaded: Loaded[FinetuneConfig]) -> float:
    """Fine-tune and return the top-1 accuracy."""
    run = build_run(loaded.config, Accelerator(cpu=not torch.cuda.is_available()))
    with contextlib.redirect_stdout(sys.stderr):
        best = train(run, open_tracker(run, loaded.text, enabled=False)).best
    assert best is not None
    return best.top1


@torch.no_grad()
def probe(loaded: Loaded[FinetuneConfig]) -> dict[str, float]:
    """Return the top-1 accuracy of a k-NN and a linear probe of the frozen features, fitted on the same few labels."""
    run = build_run(loaded.config, Accelerator(cpu=not torch.cuda.is_available()))
    backbone = run.classifier.eval().vit
    features_and_labels = []
    for samples in (run.training, run.validation):
        batches = evaluation_batches(samples, run.preprocessor, batch_size=64, rank=0, world_size=1, num_workers=0)
        parts = [(batch.tensors, batch.tensors["weight"] > 0) for batch in batches]
        features = [backbone(tensors["image"]).last_hidden_state[:, 0][kept] for tensors, kept in parts]
        features_and_labels += [torch.cat(features), torch.cat([tensors["label"][kept] for tensors, kept in parts])]
    train_features, train_labels, test_features, test_labels = features_and_labels
    predictors = {"k-NN": predict_knn, "linear": predict_linear_probe}
    return {
        name: float((predict(train_features, train_labels, test_features) == test_labels).float().mean())
        for name, predict in predictors.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--objectives", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="objectives to pretrain with"
    )
    parser.add_argument("--labels", type=int, nargs="+", default=[2], help="numbers of labels per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=list(LEARNING_RATES),
        help="learning rates of fine-tuning; the best is reported",
    )
    parser.add_argument(
        "--pretrain", nargs="*", default=[], metavar="key=value", help="overrides of the pretraining recipes"
    )
    parser.add_argument(
        "--finetune", nargs="*", default=[], metavar="key=value", help="overrides of the fine-tuning recipe"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="JSON lines file for the measurements; those that it already contains are not repeated",
    )
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results, settings = Results(arguments.results), {"pretrain": arguments.pretrain, "finetune": arguments.finetune}
    origins = [*arguments.objectives, SCRATCH]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_digits(folder)

        @cache
        def pretrained_folder(objective: str, seed: int) -> Path:
            return pretrain(folder, objective, seed, arguments.pretrain)

        for labels, seed, origin in product(arguments.labels, arguments.seeds, origins):
            case = {"seed": seed, "labels": labels, "origin": origin, **settings}
            # A model from scratch has the architecture of the first objective.
            objective = arguments.objectives[0] if origin == SCRATCH else origin
            if not results.top1_values(**case, measure="linear"):
                loaded = load(folder, pretrained_folder(objective, seed), seed, labels, origin, arguments.finetune)
                for measure, top1 in probe(loaded).items():
                    results.add(**case, measure=measure, top1=top1)
            for rate in arguments.learning_rates:
                tuned_case = {**case, "measure": "fine-tuned", "learning_rate": rate}
                if not results.top1_values(**tuned_case):
                    overrides = [f"optimizer.learning_rate={rate}", *arguments.finetune]
                    top1 = finetune(load(folder, pretrained_folder(objective, seed), seed, labels, origin, overrides))
                    results.add(**tuned_case, top1=top1)
    print("| labels per class | | " + " | ".join(origins) + " | gain |")
    print("|---" * (len(origins) + 3) + "|")
    for labels, measure in product(arguments.labels, MEASURES):
        best = {
            origin: [
                max(results.top1_values(seed=seed, labels=labels, origin=origin, measure=measure, **settings))
                for seed in arguments.seeds
            ]
            for origin in origins
        }
        gains = [
            spread([a - b for a, b in zip(best[objective], best[SCRATCH], strict=True)])
            for objective in arguments.objectives
        ]
        cells = [str(labels), MEASURES[measure], *(spread(values) for values in best.values()), ", ".join(gains)]
        print(f"| {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    """Return the mean and standard deviation of shares as text, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    main()
