"""The run folder: claim it for one run, and make sure that all ranks see the same one."""

import os
import shutil
import socket
from pathlib import Path

from pretrain import distributed
from pretrain.checkpoint.history import list_unfinished
from pretrain.distributed import on_all_ranks
from pretrain.errors import UserError
from pretrain.heartbeat.beats import CONTINUE, beats_folder, find_live_rank, write_order

MAIN_RANK = "main"  # beside the beats: which process is the main rank


def claim(run_dir: Path) -> None:
    """Make the run's folder on the main rank, and make sure that it is the same one for every rank."""
    main = distributed.gather(f"{socket.gethostname()} {os.getpid()}")[0]
    on_all_ranks(lambda: make_run_dir(run_dir, main))
    on_all_ranks(lambda: find_main(run_dir, main))


def make_run_dir(run_dir: Path, main: str) -> None:
    """Make the run's folder, on the main rank, and clear what saves that never ended and earlier ranks have left.

    Raises:
        UserError: another run is at work in it.
    """
    if not distributed.is_main():
        return
    if other := find_live_rank(run_dir):
        raise UserError(f"{run_dir}: {other} is training into it; end that run, or choose another run_dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    for remains in (*list_unfinished(run_dir), beats_folder(run_dir)):
        shutil.rmtree(remains, ignore_errors=True)
    beats_folder(run_dir).mkdir()
    (beats_folder(run_dir) / MAIN_RANK).write_text(main, encoding="utf-8")
    write_order(run_dir, CONTINUE)


def find_main(run_dir: Path, main: str) -> None:
    """Make sure that this rank sees what the main rank has written.

    Raises:
        UserError: it does not.
    """
    path = beats_folder(run_dir) / MAIN_RANK
    if not path.exists() or path.read_text(encoding="utf-8") != main:
        raise UserError(
            f"{run_dir}: what the main rank writes there is not seen by rank {distributed.rank()} on "
            f"{socket.gethostname()}; put run_dir on a file system that all machines share"
        )
