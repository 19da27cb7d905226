"""`vitrail checkpoints`: what a run has saved, whether it is whole, and what may go."""

import time
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import mistakes, progress_bar, stage

app = typer.Typer(help="List, verify and prune the checkpoints of a run.", no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="A run folder.")]


@app.command("list")
def list_(run: Run) -> None:
    """Print each checkpoint: its step, age, size, what wrote it, and whether it looks whole; bytes are not compared.

    Example: vitrail checkpoints list runs/quickstart
    """
    with mistakes():
        history, manifests = stage("pretrain.checkpoint.history"), stage("pretrain.checkpoint.manifest")
        rows = []
        for folder in found(run):
            try:
                manifest = manifests.Manifest.load(folder)
            except (manifests.CheckpointError, manifests.VersionError) as error:
                rows.append([folder.name, "", "", "", str(error)])
                continue
            engine = manifest.config["engine"]
            ranks = f"{manifest.world_size} {'rank' if manifest.world_size == 1 else 'ranks'}"
            wrote = f"{ranks}, ZeRO {engine['zero_stage']}, {engine['precision']}"
            size = f"{sum(file.num_bytes for file in manifest.files) / 1e6:.1f} MB"
            lacking = [file.name for file in manifest.files if not is_there(folder / file.name, file.num_bytes)]
            state = f"not whole: {', '.join(lacking)}" if lacking else "whole"
            age = time.time() - (folder / manifests.MANIFEST).stat().st_mtime
            rows.append([folder.name, duration(age) + " ago", size, wrote, state])
        for folder in history.list_remains(run):
            rows.append([folder.name, "", "", "", "left by a save that never ended"])
        for folder in history.list_damaged(run):
            rows.append([folder.name, "", "", "", "damaged, set aside when the run was continued"])
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command("verify")
def verify(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints/step-*.")],
) -> None:
    """Read every byte of every checkpoint and compare it with its checksum; exit code 1 if any is not whole.

    Example: vitrail checkpoints verify runs/quickstart
    """
    with mistakes():
        manifests, pieces = stage("pretrain.checkpoint.manifest"), stage("pretrain.checkpoint.pieces")
        folders = [run] if (run / manifests.MANIFEST).exists() else found(run)
        total = sum(path.stat().st_size for folder in folders for path in folder.glob("rank-*"))
        faults: dict[Path, list[str]] = {}
        with progress_bar("verifying", total, "bytes") as advance:
            for folder in folders:
                faults[folder] = list(pieces.find_faults(folder, progress=advance))
        for folder, sentences in faults.items():
            print("\n".join(sentences or [f"{folder.name}: whole"]))
    if any(faults.values()):
        raise typer.Exit(1)


@app.command("prune")
def prune(
    run: Run,
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")] = 1,
    keep_every: Annotated[int, typer.Option(min=0, help="Those at multiples of so many steps stay too; 0: none.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove old checkpoints, damaged ones, and what saves that never ended have left. Not for a run that is going on.

    Example: vitrail checkpoints prune runs/quickstart --keep-last 1 --keep-every 10000
    """
    with mistakes():
        history = stage("pretrain.checkpoint.history")
        found(run)
        old = history.superfluous(run, keep_last, keep_every)
        doomed = [*old, *history.list_damaged(run), *history.list_remains(run)]
        freed = 0
        for folder in doomed:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{'would remove' if dry_run else 'removed'} {folder.name}, {size / 1e6:.1f} MB")
            freed += size
            if not dry_run:
                history.remove(folder)
        print(f"{freed / 1e6:.1f} MB {'would be ' if dry_run else ''}freed")


def found(run: Path) -> list[Path]:
    """Return a run's checkpoints; there must be one."""
    history = stage("pretrain.checkpoint.history")
    history.find_checkpoint(run)
    folders: list[Path] = history.list_checkpoints(run)
    return folders


def is_there(path: Path, num_bytes: int) -> bool:
    """Say whether a file is there, as long as it should be."""
    return path.is_file() and path.stat().st_size == num_bytes


def duration(seconds: float) -> str:
    """Write an age as a person would."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
