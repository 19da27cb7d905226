"""Compare our ViT, with and without pretraining, with a ResNet on the digits 5 to 9 for 1 to 64 labels per class.

The quickstart's ViT is fine-tuned in three ways: from scratch, after masked autoencoding of the training images of all
digits without labels, and after supervised pretraining on the digits 0 to 4. The ResNet (transformers' own, with about
as many parameters) is trained from scratch. All use the same shards, augmentations, batches, steps and learning rates,
and are evaluated once, on images that no stage has seen.

    python benchmarks/vit_vs_cnn.py --seeds 0 1 2 --results vit_vs_cnn.jsonl --picture docs/vit_vs_cnn.png

With `--results FILE`, an interrupted benchmark continues: what the file contains is not measured again.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import Results
from benchmarks.transfer import LEARNING_RATES, RECIPES, SCRATCH, finetune, load, make_digits, pretrain, spread

LABELS = (1, 2, 4, 16, 64)
STEPS = 400
LARGEST_BATCH = 40
RESNET = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "layer_type": "basic"}
NAMES = {
    "supervised": "ViT, pretrained on 0 to 4",
    "mae": "ViT, pretrained without labels",
    "vit": "ViT from scratch",
    "cnn": "ResNet from scratch",
}


def make_resnet(folder: Path, like: Path) -> Path:
    """Write a ResNet without downsampling in its first stage, with the preprocessing of the ViT in `like`."""
    config = transformers.ResNetConfig(**RESNET, downsample_in_first_stage=False, num_labels=5)
    config.architectures = ["ResNetForImageClassification"]
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(folder)
    shutil.copy(like / "preprocessor_config.json", folder)
    return folder


def count_parameters(folder: Path) -> float:
    """Return the number of parameters of a Hugging Face folder in millions."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def schedule_overrides(labels: int, steps: int) -> list[str]:
    """Return the overrides with which fine-tuning takes about `steps` steps, for any number of labels per class."""
    batch = min(LARGEST_BATCH, 5 * labels)
    epochs = max(1, round(steps * batch / (5 * labels)))
    return [
        f"engine.global_batch_size={batch}",
        f"schedule.epochs={epochs}",
        f"schedule.warmup_epochs={epochs / 20}",
        f"evaluation.every_epochs={epochs}",
    ]


def draw(accuracies: dict[tuple[str, int], list[float]], labels: list[int], path: Path) -> None:
    """Plot top-1 accuracy over labels per class, with mean and standard deviation over the seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for key, name in NAMES.items():
        means = [100 * statistics.mean(accuracies[key, count]) for count in labels]
        deviations = [100 * statistics.stdev(v) if len(v := accuracies[key, count]) > 1 else 0.0 for count in labels]
        axes.errorbar(labels, means, deviations, label=name, marker="o", capsize=3)
    axes.set(xscale="log", xlabel="labels per class", ylabel="top-1, %", title="The digits 5 to 9")
    axes.set_xticks(labels, [str(count) for count in labels])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=list(LABELS), help="numbers of labels per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds")
    parser.add_argument("--steps", type=int, default=STEPS, help="approximate number of steps of each fine-tuning")
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
        "--results",
        type=Path,
        help="JSON lines file for the measurements; those that it already contains are not repeated",
    )
    parser.add_argument("--picture", type=Path, help="PNG file for the plot")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = Results(arguments.results)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_digits(folder)

        @cache
        def model_folder(key: str, seed: int) -> Path:
            if key == "cnn":
                return make_resnet(folder / "resnet", model_folder("vit", seed))
            if key == "vit":
                return model_folder("mae", seed)  # its architecture is trained from scratch
            return pretrain(folder, key, seed, arguments.pretrain)

        for seed, labels, key, rate in product(arguments.seeds, arguments.labels, NAMES, arguments.learning_rates):
            case = {"seed": seed, "labels": labels, "model": key, "learning_rate": rate, "pretrain": arguments.pretrain}
            if not results.top1_values(**case):
                model, origin = model_folder(key, seed), key if key in RECIPES else SCRATCH
                overrides = [*schedule_overrides(labels, arguments.steps), f"optimizer.learning_rate={rate}"]
                top1 = finetune(load(folder, model, seed, labels, origin, overrides))
                results.add(**case, parameters=count_parameters(model), top1=top1)
    accuracies = {
        (key, labels): [
            max(results.top1_values(seed=seed, labels=labels, model=key, pretrain=arguments.pretrain))
            for seed in arguments.seeds
        ]
        for key, labels in product(NAMES, arguments.labels)
    }
    if arguments.picture:
        draw(accuracies, arguments.labels, arguments.picture)
    sizes = {row["model"]: f"{row['parameters']:.2f} M" for row in results.rows}
    print(f"The ViT has {sizes['vit']} parameters, the ResNet {sizes['cnn']}.\n")
    print(f"| labels per class | {' | '.join(NAMES.values())} |")
    print("|---" * (len(NAMES) + 1) + "|")
    for labels in arguments.labels:
        print(f"| {labels} | {' | '.join(spread(accuracies[key, labels]) for key in NAMES)} |")


if __name__ == "__main__":
    main()
