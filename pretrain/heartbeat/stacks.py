"""Read the stack of the main thread, and tell from it whether the rank waits for other ranks or for its device."""

import gc
import sys
import threading
import traceback
from enum import IntEnum
from itertools import islice
from types import FrameType

NUM_FRAMES = 12  # innermost frames of a thread that are read
# Functions that wait for other ranks or for the device of this rank; an empty name stands for every function of a file.
WAITING_FUNCTIONS = (
    ("torch/distributed/", ""),
    ("deepspeed/comm/", ""),
    ("deepspeed/runtime/zero/partition_parameters.py", "wait"),  # for the gathers of ZeRO 3
    ("torch/cuda/streams.py", "synchronize"),
    ("torch/cuda/__init__.py", "synchronize"),
    ("pretrain/distributed.py", "any_over_ranks"),
)
# Calls that wait for a collective, or for the device, from which they copy a value. They are in C++, so the innermost
# frame is their caller.
WAITING_CALLS = ("handle.wait()", ".item()", ".tolist()", ".cpu()")
TRANSPARENT_FILE = "deepspeed/utils/nvtx.py"  # calls the function that its caller names
# The backward pass runs in C++ here. On a GPU, it runs in another thread, and this one only waits for that thread.
BACKWARD_FUNCTION = ("torch/autograd/graph.py", "_engine_run_backward")


class Wait(IntEnum):
    """How certain it is that a rank waits for other ranks or for its device."""

    NO = 0
    POSSIBLE = 1  # inside the backward pass, where C++ code computes or waits
    CERTAIN = 2


def wait_of(stack: str) -> Wait:
    """Return whether a rank with this stack waits.

    Only the innermost frame decides: code that hangs inside a collective, such as a signal handler, does not wait. On a
    GPU, a rank may also wait in any operation, because the device accepts about a thousand operations in advance. No
    stack shows this, so `Diagnosis` also compares how far the ranks are.

    Args:
        stack: Frames as text, the innermost one last.
    """
    innermost = next((frame for frame in reversed(stack.split('File "')) if TRANSPARENT_FILE not in frame), "")
    if any(_is_in(innermost, *function) for function in WAITING_FUNCTIONS):
        return Wait.CERTAIN
    if any(call in innermost for call in WAITING_CALLS):
        return Wait.CERTAIN
    return Wait.POSSIBLE if _is_in(innermost, *BACKWARD_FUNCTION) else Wait.NO


def read_stack(main_thread: int) -> str:
    """Return the innermost frames of the main thread as text.

    If the main thread is in the backward pass, the frames of autograd's own thread follow: on a GPU, the hooks of the
    backward pass run there.

    Args:
        main_thread: Identifier of the main thread.
    """
    stacks = read_stacks()
    stack = stacks.get(main_thread, "")
    if wait_of(stack) is Wait.POSSIBLE:
        ours = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        stack += "".join(other for ident, other in stacks.items() if ident not in ours)
    return stack


def read_stacks() -> dict[int, str]:
    """Return the innermost frames of each thread as text, by the thread's identifier.

    Up to Python 3.11, making a frame object of a running thread can start a garbage collection, during which that
    thread may leave the frame, and then the process crashes. Therefore there is no collection meanwhile. (faulthandler
    makes no frame objects, but crashes when a thread of C++ code starts at the same moment.)
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        stacks = {ident: _innermost(frame) for ident, frame in sys._current_frames().items()}
    finally:
        if collects:
            gc.enable()
    return {ident: "".join(stack.format()) for ident, stack in stacks.items()}


def _innermost(frame: FrameType) -> traceback.StackSummary:
    """Return the innermost frames of a thread, whose lines of code are read later, when they are formatted."""
    frames = islice(traceback.walk_stack(frame), NUM_FRAMES)
    stack = traceback.StackSummary.extract(frames, lookup_lines=False)
    stack.reverse()
    return stack


def _is_in(frame: str, path: str, function: str) -> bool:
    """Return whether a frame, without the words before its path, is in a function, or anywhere in a file."""
    where, _, name = frame.partition("\n")[0].rpartition(", in ")
    return path in where and function in ("", name)
