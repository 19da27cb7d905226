"""Start the worker processes of a DataLoader from a fork server, never by a fork of the training process.

A fork copies the locks that other threads hold at that moment, but not the threads that would release them. The
training process always has other threads (autograd, gloo or NCCL, the heartbeat, queue feeders), so a forked worker can
wait for such a lock forever. CPython itself can: its after-fork hook takes a runtime lock in
`_PyThreadState_DeleteExcept` that another thread may have held, and the training process then waits for that worker
forever. Therefore the fork server of `multiprocessing` forks the workers. It has a single thread and imports torch only
once. Python uses it by default since version 3.14.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from pretrain.errors import DataError, MachineError

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED_MODULES = ("pretrain.data.loading.loader",)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 30  # as long as the deepspeed launcher waits for a training process after SIGTERM
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class DeadWorkerError(DataError, MachineError):
    """A worker process that was killed, for example by the kernel when memory ran out."""


def start_server(modules: Sequence[str] = ()) -> None:
    """Start the fork server of this process, unless it is running; return before it is ready.

    Call it early: the server needs a few seconds to import torch, and the first worker waits for it. The server ends
    when this process ends, also if this process is killed.

    Args:
        modules: Modules that the server imports in addition, so that not every worker imports them: for example the one
            that defines the view.
    """
    CONTEXT.set_forkserver_preload([*PRELOADED_MODULES, *modules])
    # Started first, because it resets the signal mask. It warns of semaphores that a killed process left behind.
    with _environment({"PYTHONWARNINGS": "ignore:resource_tracker"}):
        resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the server and its workers inherit the mask
    # The server ignores this process's sys.path in Python 3.11, and does not report modules that it cannot find.
    search_path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    try:
        with _environment({**SINGLE_THREADED, "PYTHONPATH": search_path}):
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def initialize_worker(environment: Mapping[str, str], worker: int) -> None:
    """Prepare a worker process: the `worker_init_fn` of a DataLoader, once the environment is bound.

    A worker ends at once when the training process ends. It outlives a signal that a launcher sends to all processes of
    a job, because the training process needs batches until it has saved a checkpoint: it ignores SIGINT and SIGUSR1,
    and ends `GRACE_SECONDS` after SIGTERM.

    Args:
        environment: Environment variables of the training process. The server may have been started before they were
            set.
        worker: Number of the worker.
    """
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # torch's own check compares getppid() with its first value. That is the fork server, which lives as long as any
    # worker does.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def check_workers(workers: Sequence[BaseProcess]) -> None:
    """Check that workers are alive, after an error that a dead one may have caused.

    Raises:
        DeadWorkerError: If one of them has ended.
    """
    wait(
        [worker.sentinel for worker in workers], timeout=1.0
    )  # a worker that was just killed may not count as dead yet
    for worker in workers:
        if worker.exitcode is not None:
            remedy = "if memory ran out, decrease data.num_workers or data.shuffle_window"
            if worker.exitcode == -signal.SIGBUS:
                remedy = "/dev/shm is full: enlarge it (in a container with --shm-size), or decrease data.num_workers"
            raise DeadWorkerError(
                f"data worker {worker.pid} ended unexpectedly with exit code {worker.exitcode}; {remedy}"
            )


def _exit_with_parent() -> None:
    """Exit when the process that asked for this worker ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables during the block, for a process that is started in it."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
