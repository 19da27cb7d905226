"""Measure how fast the recipes for folders of photos train here, and what that means for 2,000 photos.

The photos are crops of the two that scikit-learn ships. They have the size and the JPEG quality of real ones, so the
speed is real; the accuracy means nothing. `--folder-only` makes only the folder, to try the README's commands on.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from launch.commands.init import find_recipes
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.folder import list_folder
from pretrain.journal import read_rows

PHOTOS = 2000  # for which the time is computed
SIZES = (320, 480)  # width of a photo, in pixels
CLASSES = ("building", "flower")
ON_A_CPU = [
    "engine.precision=fp32",
    "engine.compile=false",
    "engine.global_batch_size=64",
    "engine.micro_batch_size=32",
]


def make_photos(out: Path, per_class: int) -> None:
    """Write a folder with one subfolder per class, each with random crops of a photo as JPEG files."""
    generator = np.random.default_rng(0)
    for name, photo in zip(CLASSES, load_sample_images().images, strict=True):
        folder = out / name
        folder.mkdir(parents=True)
        height, width, _ = photo.shape
        for number in range(per_class):
            crop_width = int(generator.integers(SIZES[0] // 2, SIZES[0]))
            crop_height = crop_width * 3 // 4
            left, top = (int(generator.integers(limit)) for limit in (width - crop_width, height - crop_height))
            crop = Image.fromarray(photo[top : top + crop_height, left : left + crop_width])
            size = int(generator.integers(*SIZES))
            crop.resize((size, size * 3 // 4)).save(folder / f"IMG_{number:04d}.jpg", quality=90)


def measure(recipe: Path, shards: Path, work: Path, steps: int) -> tuple[float, float]:
    """Train a recipe for some steps.

    Returns:
        Images per second after the first step, and the number of epochs of the recipe.
    """
    config = load_config(PretrainConfig, recipe).config
    run_dir = work / recipe.stem
    overrides = [f"run_dir={run_dir}", f"data.train={shards}/train", f"data.validation={shards}/validation"]
    overrides += ["schedule.epochs=0", "schedule.warmup_epochs=0", f"schedule.total_steps={steps}", "tracking.uri=off"]
    overrides += ["evaluation.every_steps=100000", "evaluation.probe_every_steps=0", f"logging.every_steps={steps}"]
    command = ["vitrail", "pretrain", str(recipe), *overrides, *ON_A_CPU]
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)
    [*_, row] = [row for row in read_rows(run_dir / "metrics.jsonl") if "speed/images_per_second" in row]
    return row["speed/images_per_second"], config.schedule.epochs


def main() -> None:
    """Make the photos, and measure every recipe for them unless only the folder is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the photos; a temporary one by default")
    parser.add_argument("--per-class", type=int, default=150, help="number of photos in each of the two classes")
    parser.add_argument("--folder-only", action="store_true", help="make only the folder")
    parser.add_argument("--steps", type=int, default=21, help="steps per recipe; the first one is not measured")
    parser.add_argument("--recipes", nargs="+", help="names of recipes; by default all for photos")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos = arguments.out or work / "photos"
        make_photos(photos, arguments.per_class)
        if arguments.folder_only:
            print(f"{photos}: {arguments.per_class} photos in each of {len(CLASSES)} classes")
            return
        make_shards(list_folder(photos), work / "shards", ShardOptions(validation_fraction=0.1))
        recipes = find_recipes()
        for name in arguments.recipes or [name for name in recipes if name.startswith("photos_")]:
            speed, epochs = measure(recipes[name], work / "shards", work, arguments.steps)
            hours = PHOTOS * epochs / speed / 3600
            print(
                f"{name}: {speed:.0f} images/s; {PHOTOS} photos for {epochs:.0f} epochs take {hours:.1f} h", flush=True
            )


if __name__ == "__main__":
    main()
