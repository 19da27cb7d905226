"""Claim a run folder for one run, and check that all ranks share it."""

import os
import shutil
import socket
from pathlib import Path

from pretrain import distributed
from pretrain.checkpoint.history import list_unfinished
from pretrain.distributed import on_all_ranks
from pretrain.errors import UserError
from pretrain.heartbeat.beats import CONTINUE, beats_folder, find_live_rank, write_order

MAIN_RANK_FILE = "main"  # in the folder of the heartbeats: host and process id of the main rank


def claim_run_dir(run_dir: Path) -> None:
    """Create the run folder, refuse one that another run is using, and check that all ranks share it (collective)."""
    main_process = distributed.gather(f"{socket.gethostname()} {os.getpid()}")[0]
    on_all_ranks(lambda: create_run_dir(run_dir, main_process) if distributed.is_main() else None)
    on_all_ranks(lambda: check_shared(run_dir, main_process))


def create_run_dir(run_dir: Path, main_process: str) -> None:
    """Create the run folder, and remove unfinished checkpoints and the heartbeats of earlier ranks from it.

    Args:
        run_dir: Run folder.
        main_process: Host and process id of the main rank, which other ranks look for.

    Raises:
        UserError: If another run is training into the folder.
    """
    if other := find_live_rank(run_dir):
        raise UserError(f"{run_dir}: {other} is training into this folder; end that run or choose another run_dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    for remains in (*list_unfinished(run_dir), beats_folder(run_dir)):
        shutil.rmtree(remains, ignore_errors=True)
    beats_folder(run_dir).mkdir()
    (beats_folder(run_dir) / MAIN_RANK_FILE).write_text(main_process, encoding="utf-8")
    write_order(run_dir, CONTINUE)


def check_shared(run_dir: Path, main_process: str) -> None:
    """Check that this rank sees the files that the main rank has written.

    Args:
        run_dir: Run folder.
        main_process: Host and process id of the main rank.

    Raises:
        UserError: If it does not.
    """
    path = beats_folder(run_dir) / MAIN_RANK_FILE
    if not path.exists() or path.read_text(encoding="utf-8") != main_process:
        raise UserError(
            f"{run_dir}: rank {distributed.rank()} on {socket.gethostname()} cannot see files written by rank 0; "
            "run_dir must be on a file system shared by all nodes"
        )
