"""Claim a run folder for one run, and check that all ranks share it."""

import shutil
import socket
from pathlib import Path

from pretrain import distributed
from pretrain.checkpoint.history import list_unfinished
from pretrain.distributed import on_all_ranks
from pretrain.errors import UserError
from pretrain.heartbeat.beats import CONTINUE, beats_folder, find_live_rank, write_order
from pretrain.heartbeat.processes import describe_process, read_processes, write_processes


def claim_run_dir(run_dir: Path) -> None:
    """Create the run folder, refuse one that another run is using, and check that all ranks share it (collective)."""
    processes = distributed.gather(describe_process())
    on_all_ranks(lambda: create_run_dir(run_dir, processes) if distributed.is_main() else None)
    on_all_ranks(lambda: check_shared(run_dir, processes))


def create_run_dir(run_dir: Path, processes: list[str]) -> None:
    """Create the run folder, and remove unfinished checkpoints and the heartbeats of earlier ranks from it.

    Args:
        run_dir: Run folder.
        processes: Process of each rank; the other ranks look for this list.

    Raises:
        UserError: If another run is training into the folder.
    """
    if other := find_live_rank(run_dir):
        raise UserError(f"{run_dir}: {other} is training into this folder; end that run or choose another run_dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    for remains in (*list_unfinished(run_dir), beats_folder(run_dir)):
        shutil.rmtree(remains, ignore_errors=True)
    beats_folder(run_dir).mkdir()
    write_processes(run_dir, processes)
    write_order(run_dir, CONTINUE)


def check_shared(run_dir: Path, processes: list[str]) -> None:
    """Check that this rank sees the files that the main rank has written.

    Args:
        run_dir: Run folder.
        processes: Process of each rank, as the main rank has written them.

    Raises:
        UserError: If it does not.
    """
    if read_processes(run_dir) != processes:
        raise UserError(
            f"{run_dir}: rank {distributed.rank()} on {socket.gethostname()} cannot see files written by rank 0; "
            "run_dir must be on a file system shared by all nodes"
        )
