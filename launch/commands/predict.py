"""`vitrail predict`: classify images with a Hugging Face folder."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import report_errors
from pretrain.outcome import EXIT_FAILED


def predict(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder with a trained image classifier.")],
    images: Annotated[
        list[Path], typer.Argument(help="Image files, folders of images, or patterns like photos/*.jpg.")
    ],
    top_k: Annotated[int, typer.Option(min=1, help="Number of most likely classes to print per image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image, for scripts.")] = False,
) -> None:
    """Print the most likely classes of each image with their probabilities.

    A file, folder or pattern that cannot be used is named, and the others are classified. The exit code is then 1.

    Example: vitrail predict runs/quickstart-finetune/model cat.jpg dog.png

    Example: vitrail predict runs/quickstart-finetune/model *.jpg --top-k 1 --json
    """
    from finetune.predict import find_images
    from finetune.predict import predict as classify

    with report_errors():
        files, faults = find_images(images)
        num_unusable = len(faults)
        for fault in faults:
            print(fault, file=sys.stderr)
        for prediction in classify(folder, files, top_k):
            if prediction.error:
                num_unusable += 1
                print(prediction.error, file=sys.stderr)
            elif as_json:
                classes = [{"class": name, "probability": value} for name, value in prediction.classes]
                print(json.dumps({"image": str(prediction.path), "classes": classes}))
            else:
                print(f"{prediction.path}: " + ", ".join(f"{name} {value:.1%}" for name, value in prediction.classes))
    if num_unusable:
        sys.exit(EXIT_FAILED)
