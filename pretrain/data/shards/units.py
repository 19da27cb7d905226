"""Run one function over many units of work: in this process, in several, or on a Ray cluster. Results keep their order.

Units must not depend on each other, and a unit that was cut off must do no harm when it is done again.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from pretrain.errors import DataError

Unit = TypeVar("Unit")
Result = TypeVar("Result")
AHEAD = 4  # units under way for each worker, so that a slow one holds up no other
POLL_SECONDS = 0.2


def run_units(
    work: Callable[[Unit], Result], units: Iterable[Unit], num_workers: int = 1
) -> Generator[Result, None, None]:
    """Yield `work(unit)` for each unit, on so many processes; with one, in this process.

    When the caller wants no more, or is interrupted, the processes end at once; they end too when this one is killed.

    Raises:
        ChildProcessError: a process died.
    """
    if num_workers <= 1:
        yield from map(work, units)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    stop = context.Event()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (stop,)) as pool:
        try:
            yield from _in_order(
                lambda unit: pool.submit(work, unit), lambda future: future.result(), units, AHEAD * num_workers
            )
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process died, perhaps for want of memory: fewer --workers need less"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def run_units_on_ray(work: Callable[[Unit], Result], units: Iterable[Unit]) -> Generator[Result, None, None]:
    """Yield `work(unit)` for each unit, on the Ray cluster of RAY_ADDRESS, or else on this machine.

    Raises:
        DataError: Ray is not installed.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError:
        raise DataError("--engine ray needs Ray: pip install 'vitrail[ray]'") from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level="error")
    try:
        remote = ray.remote(work)
        ahead = AHEAD * int(ray.cluster_resources()["CPU"])
        yield from _in_order(remote.remote, _ray_result, units, ahead)
    finally:
        if started_here:
            ray.shutdown()


def _ray_result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _in_order(
    begin: Callable[[Unit], Any], result: Callable[[Any], Result], units: Iterable[Unit], ahead: int
) -> Iterator[Result]:
    """Yield the results of units in their order, with only so many begun at a time."""
    begun: deque[Any] = deque()
    for unit in units:
        begun.append(begin(unit))
        if len(begun) > ahead:
            yield result(begun.popleft())
    while begun:
        yield result(begun.popleft())


def _start_worker(stop: Event) -> None:
    """Leave Ctrl-C to the process that was typed at; end when that one says so, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            if parent is not None and not parent.is_alive():
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
