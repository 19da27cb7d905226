"""The `vitrail` command, assembled from the verbs in `launch/commands/`."""

import sys
from typing import Annotated

import typer

from launch.commands import checkpoints, shards
from launch.commands.export import export
from launch.commands.init import init
from launch.commands.predict import predict
from launch.commands.supervise import supervise
from launch.commands.train import finetune, pretrain
from pretrain import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: faster, and it can be copied
)
app.command("init")(init)
app.add_typer(shards.app, name="shards")
app.command("pretrain")(pretrain)
app.command("export")(export)
app.command("finetune")(finetune)
app.command("predict")(predict)
app.add_typer(checkpoints.app, name="checkpoints")
app.command("supervise")(supervise)


def print_version(wanted: bool) -> None:
    """Print the version and exit, if `--version` was given."""
    if wanted:
        print(f"vitrail {__version__}")
        sys.exit(0)


@app.callback()
def vitrail(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrain Vision Transformers on your images, export them to Hugging Face, and use them.

    From images to a classifier: init, shards make, pretrain, export, finetune, predict.

    Example: vitrail shards make photos/ shards/photos
    """


def main() -> None:
    """Run the command line."""
    app()
