"""Compare the speed of training with timm and transformers, compiled, in one run on the same device.

- benchmarks/train_step.py: our loop on synthetic images and timm in a plain torch loop, in turns.
- launch/pretrain.py: our loop with photos from tar shards, beside the same on synthetic images.
- benchmarks/duel.py: our masked autoencoder and that of transformers, in turns.

A bar that is not reached is "missed", which is no failure. On a CPU the sizes are tiny and the figures mean nothing.
"""

import json
import os
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import SKIPPED, Check, Task, judge_speed
from benchmarks.gpu.group import Place, run_group
from benchmarks.gpu.photos import make_photo_shards
from pretrain.journal import read_rows

REAL_DATA_BAR = 0.97  # images per second from tars, relative to synthetic images
FIRST_ROWS = 2  # rows of metrics that contain compilation and the start of the data workers
EMA_DECAY = 0.9999


@dataclass(frozen=True)
class Size:
    """A model and how it is measured.

    Attributes:
        name: Name of the model in train_step.py.
        model: Overrides of a recipe that describe it.
        batch: Images per step.
        rounds: Rounds of each contender.
        bar: Speed of our loop, relative to timm.
        mae_bar: Speed of our masked autoencoder, relative to transformers.
        seconds: Time that each comparison needs on an H100, compilation included.
    """

    name: str
    model: list[str]
    batch: int
    rounds: int
    bar: float
    mae_bar: float
    seconds: float


B16 = Size("B/16", [], 256, 2, 1.10, 1.5, 90)
L16 = Size("L/16", ["model={hidden_size: 1024, num_hidden_layers: 24, num_attention_heads: 16}"], 128, 1, 1.05, 1.3, 90)
TINY_MODEL = "model={hidden_size: 192, num_hidden_layers: 12, num_attention_heads: 3, patch_size: 8, image_size: 64}"
REHEARSAL = Size("Ti/8 at 64", [TINY_MODEL], 2, 1, 1.10, 1.5, 0)


def tasks(place: Place) -> dict[str, Task]:
    """Return the comparisons by name: those of B/16 first, because L/16 may not fit into the time."""
    if not place.on_gpu:
        return tasks_of(place, REHEARSAL)
    [synthetic, real], [large, _] = tasks_of(place, B16).items(), tasks_of(place, L16).items()
    return dict([synthetic, real, *mae_tasks(place, B16).items(), large, *mae_tasks(place, L16).items()])


def tasks_of(place: Place, size: Size) -> dict[str, Task]:
    """Return the supervised comparisons of a size."""
    speeds: dict[str, float] = {}
    found = {
        f"{size.name}, ours on synthetic images": Task(partial(compare_steps, place, size, speeds), size.seconds),
        f"{size.name}, ours from tars": Task(partial(train_from_tars, place, size, speeds), size.seconds / 2),
    }
    return found if place.on_gpu else found | mae_tasks(place, size)


def mae_tasks(place: Place, size: Size) -> dict[str, Task]:
    """Return the comparison of masked autoencoders of a size."""
    return {f"{size.name}, MAE": Task(partial(compare_mae, place, size), size.seconds)}


def compare_steps(place: Place, size: Size, speeds: dict[str, float]) -> list[Check]:
    """Measure our loop on synthetic images and timm's model, in turns; note our speed in `speeds`."""
    kind = "compiled" if place.on_gpu else "eager"
    ours, theirs = f"ours {kind}", f"timm {kind}"
    out = place.work / f"steps-{size.batch}.json"
    steps = ["--steps", "20", "--warmup", "10"] if place.on_gpu else ["--steps", "1", "--warmup", "1"]
    command = ["benchmarks/train_step.py", "--model", size.name, "--micro-batch", str(size.batch), *steps]
    place.run([*command, "--rounds", str(size.rounds), "--contenders", theirs, ours, "--json", out])
    found = json.loads(out.read_text(encoding="utf-8"))
    failures: dict[str, str] = found.get("failures", {})
    if ours in failures:
        raise RuntimeError(f"{ours}: {failures[ours]}")
    own = median_speed(found, ours)
    speeds["synthetic"] = own
    facts = f"{own:.0f} images/s, {describe_step(found['figures'][ours][-1])}"
    if theirs in failures:
        return [Check(SKIPPED, f"{own:.0f} images/s", f"at least {size.bar:.2f}x", f"{theirs}: {failures[theirs]}")]
    return [judge_speed(own / median_speed(found, theirs), size.bar, f"{facts}; {theirs}")]


def median_speed(found: dict[str, Any], contender: str) -> float:
    """Return the median of a contender's images per second over the rounds."""
    return float(statistics.median(each["images_per_second"] for each in found["figures"][contender]))


def describe_step(measured: dict[str, Any]) -> str:
    """Return what else train_step.py has measured of a step, as far as it is known on this device."""
    parts = [f"{measured['peak_memory_gb']:.1f} GB"]
    if measured.get("kernels") is not None:
        parts.append(f"{measured['kernels']} kernels/step")
    if measured.get("joules_per_image") is not None:
        parts.append(f"{measured['joules_per_image']:.2f} J/image")
    return ", ".join(parts)


def train_from_tars(place: Place, size: Size, speeds: dict[str, float]) -> Check:
    """Train from shards of photos with the launch script; compare its speed with that on synthetic images."""
    if "synthetic" not in speeds:
        return Check(SKIPPED, reason="there is no speed on synthetic images to compare with")
    num_photos, steps, every = (1024, 100, 20) if place.on_gpu else (16, 4, 1)
    shards = make_photo_shards(place.work, num_photos)
    run_dir = place.work / "tars"
    place.run(["launch/pretrain.py", "--config", write_recipe(place, size, shards, steps, every), f"run_dir={run_dir}"])
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "speed/images_per_second" in row][FIRST_ROWS:]
    speed = statistics.median(row["speed/images_per_second"] for row in rows)
    waiting = statistics.median(row["data/wait_fraction"] for row in rows)
    reason = f"{speed:.0f} images/s, waiting for data {waiting:.0%}, {os.cpu_count()} cores"
    return judge_speed(speed / speeds["synthetic"], REAL_DATA_BAR, reason)


def write_recipe(place: Place, size: Size, shards: Path, steps: int, every: int) -> Path:
    """Write a recipe for the same run as that of train_step.py, with real data; return its path."""
    precision, workers = ("bf16", max(1, (os.cpu_count() or 2) - 2)) if place.on_gpu else ("fp32", 1)
    path = place.work / "tars.yaml"
    path.write_text(
        "\n".join(
            [
                "run_dir: unused",
                f"data: {{train: {shards}, num_workers: {workers}}}",
                *(override.replace("=", ": ", 1) for override in size.model),
                "optimizer: {learning_rate: 1e-4, weight_decay: 0.05}",
                f"schedule: {{total_steps: {steps}, warmup_steps: 1}}",
                f"ema: {{decay: {EMA_DECAY}}}",
                f"engine: {{zero_stage: 1, precision: {precision}, global_batch_size: {size.batch}, "
                f"micro_batch_size: {size.batch}, compile: {str(place.on_gpu).lower()}}}",
                f"logging: {{every_steps: {every}}}",
                "checkpoint: {every_steps: 100000}",
                'tracking: {uri: "off"}',
            ]
        ),
        encoding="utf-8",
    )
    return path


def compare_mae(place: Place, size: Size) -> Check:
    """Train our masked autoencoder and that of transformers in turns; compare their speed."""
    out = place.work / f"mae-{size.batch}.jsonl"
    options = ["--model", size.name, "--batch", str(size.batch), "--steps", "40", "--compile"]
    if not place.on_gpu:
        options = ["--batch", str(size.batch), "--steps", "12"]
    place.run(["benchmarks/duel.py", "--objective", "mae", *options, "--seeds", "0", "--results", out])
    [row] = read_rows(out)
    return judge_speed(row["ratio"], size.mae_bar, f"{'compiled' if place.on_gpu else 'eager'} transformers")


if __name__ == "__main__":
    run_group(__doc__, tasks)
