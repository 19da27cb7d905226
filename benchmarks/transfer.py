"""Is pretraining worth it? The digits 0 to 4 are learned first, then 5 to 9 from a few labels.

Beside each fine-tuned model stands a twin of the same architecture from scratch: the same labels, augmentations and
steps, and the better of the same learning rates for each.

    python benchmarks/transfer.py --labels 1 2 4 --seeds 0 1 2 --json transfer.json
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
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from finetune.config import FinetuneConfig
from finetune.train import build_run, open_tracker, train
from pretrain.configfile import load_config
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import Recipe
from pretrain.data.sources import keep_classes, list_digits
from pretrain.export.folder import export

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
TWINS = ("pretrained", "from scratch")


def make_digits(folder: Path) -> None:
    """Write the digits 0 to 4 for pretraining and 5 to 9 for fine-tuning; half of the latter is the test set."""
    digits = list_digits()
    for name, classes, validation in (("pretrain", "01234", 0.1), ("finetune", "56789", 0.5)):
        source = keep_classes(digits, list(classes))
        make_shards(source, folder / name, Recipe(validation=validation, shard_bytes=64_000, seed=0))


def pretrain(folder: Path, seed: int, overrides: list[str]) -> Path:
    """Pretrain by the quickstart's recipe; return the exported folder."""
    run_dir = folder / f"pretrain-seed{seed}"
    command = [
        sys.executable,
        str(ROOT / "launch" / "pretrain.py"),
        f"--config={ROOT / 'configs' / 'quickstart' / 'pretrain.yaml'}",
        f"run_dir={run_dir}",
        f"seed={seed}",
        f"data.train={folder / 'pretrain' / 'train'}",
        f"data.validation={folder / 'pretrain' / 'validation'}",
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    export(run_dir, run_dir / "export")
    return run_dir / "export"


def finetune(
    folder: Path, model: Path, seed: int, labels: int, twin: str, learning_rate: float, more: list[str]
) -> float:
    """Fine-tune by the quickstart's recipe, which measures once, after the last epoch; return the top-1."""
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
        f"optimizer.learning_rate={learning_rate}",
        f"from_scratch={'true' if twin == 'from scratch' else 'false'}",
        *more,
    ]
    loaded = load_config(FinetuneConfig, ROOT / "configs" / "quickstart" / "finetune.yaml", overrides)
    run = build_run(loaded.config, Accelerator(cpu=not torch.cuda.is_available()))
    with contextlib.redirect_stdout(sys.stderr):
        return train(run, open_tracker(run, loaded.text, enabled=False)).top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--finetune", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    results: list[dict[str, object]] = []
    started = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_digits(folder)
        for seed in arguments.seeds:
            model = pretrain(folder, seed, arguments.pretrain)
            for labels in arguments.labels:
                for twin in TWINS:
                    for rate in LEARNING_RATES:
                        top1 = finetune(folder, model, seed, labels, twin, rate, arguments.finetune)
                        row = {"seed": seed, "labels": labels, "twin": twin, "learning_rate": rate, "top1": top1}
                        results.append(row)
                        print(f"[{time.time() - started:.0f} s] {row}", file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print("| labels a class | " + " | ".join(TWINS) + " | gain |\n|---|---|---|---|")
    for labels in arguments.labels:
        best = {twin: [best_top1(results, seed, labels, twin) for seed in arguments.seeds] for twin in TWINS}
        gains = [a - b for a, b in zip(*best.values(), strict=True)]
        print(f"| {labels} | " + " | ".join(spread(values) for values in [*best.values(), gains]) + " |")


def best_top1(results: list[dict[str, object]], seed: int, labels: int, twin: str) -> float:
    """Return the better of the sweep's learning rates."""
    same = [r for r in results if (r["seed"], r["labels"], r["twin"]) == (seed, labels, twin)]
    return max(float(str(r["top1"])) for r in same)


def spread(values: list[float]) -> str:
    """Write mean and standard deviation over the seeds, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    main()
