"""Ranks for tests: forked from one process that has imported everything, instead of being launched again for every run.

A script of ranks defines named runs and calls `main`. A test asks a `RankServer` for one of them; it starts the script
when it is first asked, so that a test selected alone costs one import and its own run.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from tests.support.launching import POLL_SECONDS, ROOT, TINY, Limits, Progress, end, free_port
from tests.support.shared import locked

ENDED = "exit_codes.json"  # written last
SEEN = "seen.json"
GRACE_SECONDS = 5.0  # for the other ranks when one has failed

Work = Callable[[str, Path], Any]  # name of the run and its folder -> what the main rank has seen
Seen = dict[str, Any]


def run_ranks(work: Work, name: str, world_size: int, folder: Path) -> list[int | None]:
    """Run `work` on that many forked ranks, each with a log in the folder; return their exit codes.

    When one rank fails, the others are ended, as a launcher does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context, port = multiprocessing.get_context("fork"), free_port()
    gc.freeze()  # a collection in a rank need not look at all that is imported here, and copy it
    arguments = [(work, name, rank, world_size, port, folder) for rank in range(world_size)]
    ranks = [context.Process(target=_be_rank, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    while running := [rank.sentinel for rank in ranks if rank.is_alive()]:
        wait(running)
        if any(rank.exitcode for rank in ranks):
            wait_all = time.monotonic() + GRACE_SECONDS
            for rank in ranks:
                rank.terminate()
            for rank in ranks:
                rank.join(max(0.0, wait_all - time.monotonic()))
                rank.kill()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def _be_rank(work: Work, name: str, rank: int, world_size: int, port: str, folder: Path) -> None:
    log = os.open(log_of(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    faulthandler.enable()
    sys.modules["__main__"] = ModuleType("__main__")  # data workers need not import the script of ranks again
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {key: str(value) for key, value in environment.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    try:
        seen = work(name, folder)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    if rank == 0:
        (folder / SEEN).write_text(json.dumps(seen))
    _leave(0)


def _leave(code: int) -> None:
    """Exit at once, without the exit handlers that the rank has inherited from its parent."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def log_of(folder: Path, rank: int) -> Path:
    """Return the file with the output of a rank."""
    return folder / f"rank-{rank}.log"


def serve(work: Work) -> None:
    """Run what the lines of standard input ask for, one run after another, until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        codes = run_ranks(work, request["name"], request["world_size"], folder)
        aside = folder / f"{ENDED}.partial"
        aside.write_text(json.dumps(codes))
        aside.rename(folder / ENDED)


def write_recipe(root: Path) -> None:
    """Write the tiny recipe, and shards of the digits 0 to 2 for it."""
    source = keep_classes(list_digits(), ["0", "1", "2"])
    make_shards(source, root / "digits", ShardOptions(validation_fraction=0.1, shard_bytes=50_000, seed=0))
    (root / "tiny.yaml").write_text(TINY.format(run_dir="unused", shards=root / "digits"))


def main(
    work: Work,
    description: str | None,
    runs: list[tuple[int, str]],
    needs: Callable[[int, str], list[tuple[int, str]]] = lambda world_size, name: [],
) -> None:
    """Run the selected runs of a script, or, for tests, what standard input asks for.

    Args:
        work: Function that runs one of them on this rank.
        description: Description of the script.
        runs: World size and name of each run.
        needs: Function that returns the runs whose checkpoints a run starts from.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the world size and the name of every run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of the runs; all of them if left out")
    parser.add_argument("--world-size", type=int, choices=(1, 2), help="number of ranks; each one if left out")
    parser.add_argument("--folder", type=Path, help="folder for the runs; a temporary one if left out")
    parser.add_argument("--serve", action="store_true", help="run what the lines of standard input ask for")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(work)
        return
    selected = [
        (world_size, name)
        for world_size, name in runs
        if arguments.world_size in (None, world_size) and (not arguments.only or name in arguments.only)
    ]
    if not selected:
        parser.error("no such run; --list prints all of them")
    if arguments.list:
        print(*(f"{world_size} {name}" for world_size, name in selected), sep="\n")
        return
    root = arguments.folder or Path(tempfile.mkdtemp(prefix="vitrail-runs-"))
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "tiny.yaml").exists():
        write_recipe(root)
    for world_size, name in dict.fromkeys(run for each in selected for run in [*needs(*each), each]):
        folder = folder_of(root, world_size, name)
        if (folder / ENDED).exists():
            continue
        started, cpu = time.monotonic(), sum(os.times()[2:4])
        codes = run_ranks(work, name, world_size, folder)
        (folder / ENDED).write_text(json.dumps(codes))
        seconds, cpu = time.monotonic() - started, sum(os.times()[2:4]) - cpu
        print(f"{world_size} {name}: exit codes {codes}, {seconds:.1f} s, {cpu:.1f} s of CPU time", flush=True)
    print(f"the runs are in {root}")


def folder_of(root: Path, world_size: int, name: str) -> Path:
    """Return the folder of a run below the folder of all runs."""
    return root / f"{world_size}-ranks" / name


class RankServer:
    """Run a script's named runs, each once for all workers of pytest.

    Args:
        script: Script that calls `main`.
        root: Folder of all runs, which the workers of pytest share.
        limits: When a run counts as hanging.
    """

    def __init__(self, script: Path, root: Path, limits: Limits | None = None) -> None:
        self.script, self.root, self.limits = script, root, limits or Limits()
        self.process: subprocess.Popen[str] | None = None

    def run(self, name: str, world_size: int, *, fails: bool = False) -> Seen:
        """Return what the main rank of a run has seen, which is run now unless another test has asked for it.

        Args:
            name: Name of the run in the script.
            world_size: Number of ranks.
            fails: Whether the run is meant to fail; then nothing is seen.
        """
        folder = folder_of(self.root, world_size, name)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not (folder / ENDED).exists():
                self._ask(name, world_size, folder)
        codes = json.loads((folder / ENDED).read_text())
        logs = [log_of(folder, rank) for rank in range(world_size)]
        texts = [log.read_text(errors="replace") for log in logs if log.exists()]
        assert any(codes) == fails, "\n".join([f"{name} on {world_size} ranks: exit codes {codes}", *texts])[-20_000:]
        seen: Seen = {} if fails else json.loads((folder / SEEN).read_text())
        return seen | {"folder": folder, "output": texts[0]}

    def _ask(self, name: str, world_size: int, folder: Path) -> None:
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"name": name, "world_size": world_size, "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        logs = [log_of(folder, rank) for rank in range(world_size)]
        progress = Progress(self.process, [self.root / f"server-{os.getpid()}.log", *logs], self.limits)
        while not (folder / ENDED).exists():
            try:
                progress.check()
                if self.process.poll() is not None:
                    progress.fail(f"the server of ranks ended with exit code {self.process.returncode}")
            except AssertionError as error:
                (folder / ENDED).write_text(json.dumps([-1] * world_size))  # no other test need wait for it again
                with log_of(folder, 0).open("a") as log:
                    log.write(str(error))
                raise
            time.sleep(POLL_SECONDS)

    def _start(self) -> "subprocess.Popen[str]":
        with (self.root / f"server-{os.getpid()}.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, str(self.script), "--serve"],
                cwd=self.root,
                env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def close(self) -> None:
        """End the server."""
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()  # type: ignore[union-attr]
            end(self.process)
