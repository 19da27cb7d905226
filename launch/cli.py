"""The `vitrail` command: one verb, one function.

Stages are imported when their verb runs, so that `--help` and a user's mistakes don't wait for torch.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.commands import checkpoints, shards
from launch.commands.terminal import mistakes, stage

app = typer.Typer(
    help="Pretrain Vision Transformers on your images, export them to Hugging Face, fine-tune them.\n\n"
    "Training itself is started by a launcher: deepspeed launch/pretrain.py --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(shards.app, name="shards")
app.add_typer(checkpoints.app, name="checkpoints")


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints/step-*.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    model_type: Annotated[
        Literal["vit", "vit_mae"],
        typer.Option("--as", help="Its type in transformers: the encoder, or a masked autoencoder with its decoder."),
    ] = "vit",
) -> None:
    """Turn a checkpoint into a Hugging Face folder that is proved to give the same numbers.

    Example: vitrail export runs/quickstart runs/quickstart/export
    """
    with mistakes():
        checkpoint = stage("pretrain.checkpoint.history").find_checkpoint(run)
        proof = stage("pretrain.export.folder").export(checkpoint, out, overwrite, model_type)
    stage("pretrain.tracking.tracker").tag_run(checkpoint.parents[1], exported_folder=str(out.resolve()))
    print(f"{out}: loads strictly with transformers; it differs by at most {proof}")


@app.command("predict")
def predict(
    folder: Annotated[Path, typer.Argument(help="A fine-tuned or exported Hugging Face folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to print for each image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")] = False,
) -> None:
    """Print the likeliest classes of images, with their probabilities.

    Example: vitrail predict runs/quickstart-finetune/model cat.jpg dog.png
    """
    with mistakes():
        for prediction in stage("finetune.predict").predict(folder, images, top_k):
            if as_json:
                classes = [{"class": name, "probability": value} for name, value in prediction.classes]
                print(json.dumps({"image": str(prediction.path), "classes": classes}))
            else:
                print(f"{prediction.path}: " + ", ".join(f"{name} {value:.1%}" for name, value in prediction.classes))


@app.command("supervise")
def supervise(
    command: Annotated[list[str], typer.Argument(help="What starts the run, after --.")],
    max_failures: Annotated[int, typer.Option(min=0, help="In a row without a new checkpoint; then it gives up.")] = 5,
    fewer_after: Annotated[
        int, typer.Option(min=0, help="Failures in a row after which one rank fewer is started; 0: never.")
    ] = 2,
) -> None:
    """Start a run again after every crash or hang, from its last checkpoint; say at the end where the time went.

    SIGTERM, SIGUSR1 and Ctrl-C let it save and stop with exit code 75; the same command goes on.

    Example: vitrail supervise -- deepspeed launch/pretrain.py --config configs/quickstart/pretrain.yaml
    """
    with mistakes():
        module = stage("launch.supervisor.supervisor")
        supervisor = module.Supervisor(command, max_failures, fewer_after, module.say)
    code = supervisor.run()
    shares = {f"goodput.{name}": f"{seconds:.1f} s" for name, seconds in supervisor.goodput.shares().items()}
    stage("pretrain.tracking.tracker").tag_run(supervisor.run_dir, **shares)
    raise typer.Exit(code)


def main() -> None:
    """Run the command that the user typed."""
    app()
