"""Run one function over many tasks: in this process, in threads, in several processes, or on a Ray cluster.

Results are returned in the order of the tasks. Tasks must be independent, and it must be harmless to repeat a task that
was interrupted.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from pretrain.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
# Runs a function on each task, here or elsewhere, and yields the results in the order of the tasks.
Executor = Callable[[Callable[[Task], Result], Iterable[Task]], Generator[Result, None, None]]
TASKS_PER_WORKER = 4  # tasks submitted ahead per worker, so that a slow task does not hold up the others
POLL_SECONDS = 0.2
WAIT_SECONDS = 5.0


def run_tasks(
    work: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int = 1
) -> Generator[Result, None, None]:
    """Yield `work(task)` for each task.

    The worker processes end at once when the caller closes the generator, is interrupted or is killed.

    Args:
        work: Function to run; with several workers it must be importable.
        tasks: Tasks; with several workers they must be picklable.
        num_workers: Number of worker processes; 1 runs the tasks in this process.

    Raises:
        ChildProcessError: If a worker process dies.
    """
    if num_workers <= 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads can deadlock
    stop = context.Event()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (stop,)) as pool:
        try:
            yield from _in_order(
                lambda task: pool.submit(work, task),
                lambda future: future.result(),
                tasks,
                TASKS_PER_WORKER * num_workers,
            )
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process died, possibly because memory ran out; use fewer --workers"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def run_tasks_in_threads(
    work: Callable[[Task], Result], tasks: Iterable[Task], num_threads: int, on_wait: Callable[[], None] = lambda: None
) -> Generator[Result, None, None]:
    """Yield `work(task)` for each task, run in threads.

    Inside a training process, threads are safer than processes, which would import the entry script again. They help if
    the work is decoding and hashing, which release Python's global lock. When the caller closes the generator or is
    interrupted, tasks that have started are finished first.

    Args:
        work: Function to run.
        tasks: Tasks.
        num_threads: Number of threads.
        on_wait: Function called in the calling thread every few seconds while it waits for a result.
    """

    def result_of(future: Future[Result]) -> Result:
        while not wait([future], WAIT_SECONDS).done:
            on_wait()
        return future.result()

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            yield from _in_order(lambda task: pool.submit(work, task), result_of, tasks, num_threads)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_tasks_on_ray(work: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
    """Yield `work(task)` for each task, run on the Ray cluster at RAY_ADDRESS, or on this machine without one.

    Args:
        work: Function to run.
        tasks: Tasks; they must be picklable.

    Raises:
        DataError: If Ray is not installed.
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
        ahead = TASKS_PER_WORKER * int(ray.cluster_resources()["CPU"])
        yield from _in_order(remote.remote, _ray_result, tasks, ahead)
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
    submit: Callable[[Task], Any], result_of: Callable[[Any], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[Result]:
    """Yield the results of tasks in their order, with at most `ahead` tasks submitted beyond the one awaited."""
    submitted: deque[Any] = deque()
    for task in tasks:
        submitted.append(submit(task))
        if len(submitted) > ahead:
            yield result_of(submitted.popleft())
    while submitted:
        yield result_of(submitted.popleft())


def _start_worker(stop: Event) -> None:
    """Ignore Ctrl-C, which the parent process handles, and exit when the parent says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            if parent is not None and not parent.is_alive():
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
