"""`vitrail checkpoints`: list, verify and prune the checkpoints of a run."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import report_errors
from pretrain.outcome import EXIT_FAILED
from pretrain.tracking.progress import progress_bar

app = typer.Typer(help="List, verify and prune the checkpoints of a run.", no_args_is_help=True)
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]


@app.command("list")
def list_(run: RunFolder) -> None:
    """Print the step, age, size, origin and state of each checkpoint.

    The state is "complete" if all files exist with their full size. Checksums are compared by `vitrail checkpoints
    verify`.

    Example: vitrail checkpoints list runs/quickstart
    """
    from pretrain.checkpoint.history import list_damaged, list_unfinished

    with report_errors():
        rows = [describe(folder) for folder in existing_checkpoints(run)]
        rows += [[folder.name, "", "", "", "incomplete: the save was interrupted"] for folder in list_unfinished(run)]
        rows += [[folder.name, "", "", "", "damaged: renamed when the run resumed"] for folder in list_damaged(run)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command("verify")
def verify(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its checkpoints/step-* folders.")],
) -> None:
    """Compare every byte of every checkpoint with its checksum; the exit code is 1 if one is damaged.

    Example: vitrail checkpoints verify runs/quickstart
    """
    from pretrain.checkpoint.manifest import MANIFEST

    faults: dict[Path, list[str]] = {}
    with report_errors():
        folders = [run] if (run / MANIFEST).exists() else existing_checkpoints(run)
        from pretrain.checkpoint.pieces import find_faults  # imports torch, so a wrong path is reported before it

        total = sum(path.stat().st_size for folder in folders for path in folder.glob("rank-*"))
        with progress_bar("verifying", total, "bytes") as advance:
            for folder in folders:
                faults[folder] = list(find_faults(folder, progress=advance))
    for folder, sentences in faults.items():
        print("\n".join(sentences or [f"{folder.name}: complete"]))
    if any(faults.values()):
        sys.exit(EXIT_FAILED)


@app.command("prune")
def prune(
    run: RunFolder,
    keep_last: Annotated[int, typer.Option(min=1, help="Number of newest checkpoints to keep.")] = 1,
    keep_every: Annotated[
        int, typer.Option(min=0, help="Also keep checkpoints at multiples of this many steps; 0 keeps no others.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed and remove nothing.")] = False,
) -> None:
    """Remove old checkpoints, damaged ones, and the remains of interrupted saves.

    Do not prune a run while it is training.

    Example: vitrail checkpoints prune runs/quickstart --keep-last 1 --keep-every 10000
    """
    from pretrain.checkpoint.history import list_damaged, list_expired, list_unfinished
    from pretrain.files import remove_folder

    with report_errors():
        existing_checkpoints(run)
        freed = 0
        for folder in [*list_expired(run, keep_last, keep_every), *list_damaged(run), *list_unfinished(run)]:
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{'would remove' if dry_run else 'removed'} {folder.name}, {num_bytes / 1e6:.1f} MB")
            freed += num_bytes
            if not dry_run:
                remove_folder(folder)
    print(f"{freed / 1e6:.1f} MB {'would be ' if dry_run else ''}freed")


def existing_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; a run without any is an error."""
    from pretrain.checkpoint.history import find_checkpoint, list_checkpoints

    find_checkpoint(run)
    return list_checkpoints(run)


def describe(checkpoint: Path) -> list[str]:
    """Return what `list` prints for a checkpoint: name, age, size, origin, state."""
    from pretrain.checkpoint.manifest import MANIFEST, Manifest
    from pretrain.errors import CheckpointError, VersionError
    from pretrain.tracking.progress import duration

    try:
        manifest = Manifest.load(checkpoint)
    except (CheckpointError, VersionError) as error:
        return [checkpoint.name, "", "", "", str(error)]
    age = time.time() - (checkpoint / MANIFEST).stat().st_mtime
    size = sum(file.num_bytes for file in manifest.files)
    engine = manifest.config["engine"]
    ranks = f"{manifest.world_size} {'rank' if manifest.world_size == 1 else 'ranks'}"
    missing = [file.name for file in manifest.files if not has_size(checkpoint / file.name, file.num_bytes)]
    return [
        checkpoint.name,
        f"{duration(age)} ago",
        f"{size / 1e6:.1f} MB",
        f"{ranks}, ZeRO {engine['zero_stage']}, {engine['precision']}",
        f"incomplete: {', '.join(missing)}" if missing else "complete",
    ]


def has_size(path: Path, num_bytes: int) -> bool:
    """Return whether a file exists and has a given size."""
    return path.is_file() and path.stat().st_size == num_bytes
