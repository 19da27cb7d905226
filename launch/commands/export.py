"""`vitrail export`: from a checkpoint to a Hugging Face folder."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.commands.terminal import report_errors


def export(
    run: Annotated[
        Path,
        typer.Argument(
            help="Run folder, whose newest checkpoint is exported, or one of its checkpoints/step-* folders."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder if it already exists.")
    ] = False,
    model_type: Annotated[
        Literal["vit", "vit_mae"],
        typer.Option(
            "--as",
            help="Model type in transformers. vit: the encoder, with its classifier if it has one. vit_mae: a masked "
            "autoencoder with its decoder, to continue pretraining elsewhere.",
        ),
    ] = "vit",
) -> None:
    """Export a checkpoint as a Hugging Face folder and verify that it gives the same outputs.

    The folder appears only after transformers has loaded it and reproduced the checkpoint's outputs.

    Example: vitrail export runs/quickstart runs/quickstart/export

    Example: vitrail export runs/mae/checkpoints/step-00100000 mae-step-100000 --as vit_mae
    """
    from pretrain.checkpoint.history import find_checkpoint

    with report_errors():
        checkpoint = find_checkpoint(run)
        # Slow imports, so a wrong path is reported before them.
        from pretrain.export.folder import export as export_checkpoint
        from pretrain.tracking.progress import summary
        from pretrain.tracking.tracker import tag_run

        proof = export_checkpoint(checkpoint, out, overwrite, model_type)
    tag_run(checkpoint.parents[1], {"exported_folder": str(out.resolve())})
    next_command = shlex.join(["vitrail", "finetune", "FILE", f"model={out}"])
    if proof.has_classifier:
        next_command = f"{shlex.join(['vitrail', 'predict', str(out)])} IMAGE..."
    title = f"{out}: loads strictly with transformers and matches the checkpoint to within {proof}"
    print(summary(title, {"next": next_command}))
