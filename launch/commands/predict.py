"""`vitrail predict`: classify images with a Hugging Face folder."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import report_errors


def predict(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder with a trained image classifier.")],
    images: Annotated[list[Path], typer.Argument(help="Image files to classify.")],
    top_k: Annotated[int, typer.Option(min=1, help="Number of most likely classes to print per image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image, for scripts.")] = False,
) -> None:
    """Print the most likely classes of each image with their probabilities.

    Example: vitrail predict runs/quickstart-finetune/model cat.jpg dog.png

    Example: vitrail predict runs/quickstart-finetune/model *.jpg --top-k 1 --json
    """
    from finetune.predict import predict as classify

    with report_errors():
        for prediction in classify(folder, images, top_k):
            if as_json:
                classes = [{"class": name, "probability": value} for name, value in prediction.classes]
                print(json.dumps({"image": str(prediction.path), "classes": classes}))
            else:
                print(f"{prediction.path}: " + ", ".join(f"{name} {value:.1%}" for name, value in prediction.classes))
