"""What happens on each rank before a run begins: limits of the process, threads, and the meeting of all ranks.

torch's own rendezvous blocks in C++, where Python handles no signals, and it does not tell which ranks are missing.
Here a thread does what may block. The main thread reports who is missing, and ends the wait when the run must stop.
"""

import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pretrain import distributed
from pretrain.cores import available_cores
from pretrain.errors import StartupError, UserError, first_line

POLL_SECONDS = 0.1
POLLS_PER_LOOK = 50  # to see which ranks are missing, each of them is asked for
REPORT_SECONDS = 15.0  # until the first report about missing ranks; each later one takes twice as long
LIMIT_SECONDS = 900.0  # containers of a job may take minutes to start, one long after another
NUM_HERE = "vitrail/ranks"  # key in the store
ANY_FREE_PORT = ("127.0.0.1", 0)
OPEN_FILES = 65_536
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # values with which cuBLAS is deterministic


def prepare_process() -> None:
    """Raise the limit of open files as far as allowed, divide the cores of the machine, and find a home folder."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))
    try:
        Path.home()
    except RuntimeError:  # a container's user without a name; MLflow would end with this error
        os.environ["HOME"] = tempfile.gettempdir()
    if "OMP_NUM_THREADS" not in os.environ:
        num_threads = max(1, available_cores() // distributed.ranks_on_this_machine())
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # without it, Accelerate would set its own number
        torch.set_num_threads(num_threads)


def make_deterministic() -> None:
    """Use only deterministic algorithms in this process; call it before the first operation on a GPU.

    PyTorch then raises an error for an operation that has none. For attention it chooses the flash kernel or the
    memory-efficient one, whose backward passes have a deterministic variant, and leaves out that of cuDNN.

    Raises:
        UserError: If the environment sets cuBLAS to a workspace with which it is not deterministic.
    """
    workspace = os.environ.setdefault(WORKSPACE_VARIABLE, DETERMINISTIC_WORKSPACES[0])
    if workspace not in DETERMINISTIC_WORKSPACES:
        raise UserError(
            f"{WORKSPACE_VARIABLE}={workspace}: set in the environment, conflicts with engine.deterministic=true; "
            f"unset it or use {DETERMINISTIC_WORKSPACES[0]}"
        )
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def join_process_group(should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Create the process group of all ranks, waiting for those that are not here yet (collective).

    Args:
        should_stop: Whether this rank was asked to stop.

    Returns:
        Whether the group exists; False if the wait was stopped.

    Raises:
        StartupError: If this rank has no GPU, the port is taken, ranks are missing, or they cannot connect.
    """
    if torch.cuda.is_available():
        _select_gpu()
    rendezvous = _Rendezvous()
    rendezvous.start()
    started = reported = time.monotonic()
    while rendezvous.is_alive():
        rendezvous.join(POLL_SECONDS)
        seconds = time.monotonic() - started
        if should_stop():
            rendezvous.is_over.set()
            rendezvous.print(f"stopped while waiting for {rendezvous.missing}")
            return False
        if seconds > LIMIT_SECONDS:
            rendezvous.is_over.set()
            raise StartupError(
                f"rank {distributed.rank()}: gave up after {LIMIT_SECONDS:.0f} s of waiting for {rendezvous.missing}; "
                "see in their output why they did not start, and start the run again"
            )
        if time.monotonic() - reported > max(REPORT_SECONDS, reported - started):
            reported = time.monotonic()
            rendezvous.print(f"waiting for {rendezvous.missing} ({seconds:.0f} s so far)")
    if rendezvous.error is not None:
        raise rendezvous.error
    return True


def _select_gpu() -> None:
    """Make this rank's GPU the current one.

    Raises:
        StartupError: If the machine has no GPU for this rank.
    """
    local_rank, num_gpus = distributed.local_rank(), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise StartupError(
            f"rank {distributed.rank()}: LOCAL_RANK is {local_rank}, but {socket.gethostname()} has {num_gpus} GPUs; "
            "start one rank per GPU"
        )
    torch.cuda.set_device(local_rank)


class _OverError(Exception):
    """The main thread does not wait any longer."""


class _Rendezvous(threading.Thread):
    """Connect to the store of rank 0, wait until all ranks are there, and create the process group.

    Attributes:
        missing: Ranks that this rank is waiting for, as a text.
        error: Reason for which the group could not be created, or None.
        is_over: Set to end the thread, unless torch blocks it.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)  # at the end of the process, it may be blocked for good
        self.error: Exception | None = None
        self.is_over = threading.Event()
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.address = ANY_FREE_PORT  # a rank that is alone never collides with another run
        if self.world_size > 1:
            self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.missing = self._describe([0])
        self.has_met_rank_0 = self.all_are_here = False

    def run(self) -> None:
        try:
            store = self._connect()
            self._wait_for_all(store)
            self._create_group(store)
        except _OverError:
            return
        except Exception as error:
            self.error = StartupError(self._explain(error)) if isinstance(error, RuntimeError) else error

    def print(self, message: str) -> None:
        """Print a message once per machine, or on every rank as long as rank 0 is missing."""
        if distributed.local_rank() == 0 or not self.has_met_rank_0:
            print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)

    def _connect(self) -> TCPStore:
        """Return the store of rank 0, or that of torchrun."""
        torchrun_serves = self.world_size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_server = self.rank == 0 and not torchrun_serves
        if not is_server:
            self._wait_for_server()
        host, port = self.address
        return TCPStore(
            host, port, is_master=is_server, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False, multi_tenant=is_server
        )

    def _wait_for_server(self) -> None:
        """Wait until something listens at the address of rank 0; torch's client would print a warning per attempt."""
        while True:
            try:
                socket.create_connection(self.address, timeout=REPORT_SECONDS).close()
            except OSError as error:
                self.missing = f"{self._describe([0])}: {error.strerror or error}"
                self._pause()
            else:
                return

    def _wait_for_all(self, store: TCPStore) -> None:
        store.set(_key(self.rank), socket.gethostname())
        self.has_met_rank_0 = True
        num_here = store.add(NUM_HERE, 1)
        for attempt in count():
            if num_here >= self.world_size:
                self.all_are_here = True
                return
            if attempt % POLLS_PER_LOOK == 0:
                missing = [rank for rank in range(self.world_size) if not store.check([_key(rank)])]
                self.missing = self._describe(missing or [self.rank])
            self._pause()
            num_here = store.add(NUM_HERE, 0)

    def _pause(self) -> None:
        if self.is_over.wait(POLL_SECONDS):
            raise _OverError

    def _create_group(self, store: TCPStore) -> None:
        """Create the group. Its first reduction connects the ranks, which NCCL would otherwise do later."""
        self.missing = "the other ranks to connect"
        on_gpu, several = torch.cuda.is_available(), self.world_size > 1
        device = distributed.device()
        if on_gpu:
            torch.cuda.set_device(device)  # of this thread
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if on_gpu and several else None,
        )
        distributed.sum_over_ranks(torch.zeros(1, device=device)).item()

    def _describe(self, ranks: Sequence[int]) -> str:
        host, port = self.address
        return f"{describe_ranks(ranks)} of {self.world_size} (rank 0 is at {host}:{port})"

    def _explain(self, error: RuntimeError) -> str:
        host, port = self.address
        if "EADDRINUSE" in str(error):
            return (
                f"MASTER_PORT={port}: another program on {socket.gethostname()} uses this port; choose another one "
                "with --master_port (accelerate launch: --main_process_port) or MASTER_PORT"
            )
        if not self.all_are_here:
            return f"rank {self.rank}: rank 0 at {host}:{port} has ended ({first_line(error)}); see its output"
        return (
            f"rank {self.rank}: cannot connect to the other ranks through {host}:{port}: {first_line(error)}; check "
            "that the machines reach each other, and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to their interface"
        )


def describe_ranks(ranks: Sequence[int]) -> str:
    """Return a text such as "rank 3" or "ranks 0, 2, 8 to 15".

    Args:
        ranks: Ranks in ascending order, at least one.
    """
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    pieces = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(pieces)}"


def _key(rank: int) -> str:
    return f"vitrail/rank/{rank}"
