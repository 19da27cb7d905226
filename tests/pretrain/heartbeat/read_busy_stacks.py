"""Read the main thread's stack while functions end and garbage is collected, and then while threads of C start.

If collections could start while frames are read, this would end with a segmentation fault under Python 3.11, or with
an object in place of a frame; if faulthandler read them, with a segmentation fault too.
"""

import ctypes
import gc
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pretrain.heartbeat.stacks import read_stack


class Garbage:
    """An object that only the collector frees; like a tensor, it lets other threads run meanwhile."""

    num_freed = 0

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        Garbage.num_freed += 1
        if Garbage.num_freed % 200 == 0:
            time.sleep(0.00005)


def function_with_locals(number: int) -> Callable[..., None]:
    """Return a function with this number of local variables, which calls one of several functions."""
    names = ", ".join(f"v{i}" for i in range(number))
    lines = [
        "def call(depth, functions):",
        f"    {names} = range({number})",
        "    Garbage()",
        "    if depth:",
        "        functions[depth % len(functions)](depth - 1, functions)",
    ]
    space: dict[str, Any] = {"Garbage": Garbage}
    exec("\n".join(lines), space)
    call: Callable[..., None] = space["call"]
    return call


def start_threads_of_c(library: ctypes.CDLL, call: Any) -> None:
    """Start threads that enter Python without having been started by it, as autograd's do, and wait for them."""
    threads = [ctypes.c_ulong() for _ in range(8)]
    for thread in threads:
        library.pthread_create(ctypes.byref(thread), None, call, None)
    for thread in threads:
        library.pthread_join(thread, None)


def main() -> None:
    """Call functions of random sizes to random depths, then start threads, while another thread reads the stack."""
    ident, is_over = threading.get_ident(), threading.Event()

    def read() -> None:
        while not is_over.is_set():
            gc.enable()  # only here, so that collections start in this thread
            read_stack(ident)
            gc.disable()

    sys.setswitchinterval(1e-5)
    gc.disable()
    gc.set_threshold(1)
    library, call = ctypes.CDLL(None), ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: 0)
    functions = [function_with_locals(number) for number in range(2, 40)]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        end = time.monotonic() + 4
        while time.monotonic() < end:
            random.shuffle(functions)
            functions[0](random.randrange(60), functions)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            start_threads_of_c(library, call)
        is_over.set()
        reading.result()


if __name__ == "__main__":
    main()
