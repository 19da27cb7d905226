"""On which stacks a rank waits for others or for its device, and which frames of which thread a heartbeat shows."""

import _thread
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.heartbeat import stacks
from pretrain.heartbeat.stacks import (
    BACKWARD_FUNCTION,
    WAITING_FUNCTIONS,
    Wait,
    read_stack,
    read_stacks,
    wait_of,
)
from tests.support.frames import find_file, frames, functions_in
from tests.support.launching import wait_for


@pytest.mark.parametrize(("path", "name"), [*WAITING_FUNCTIONS, BACKWARD_FUNCTION])
def test_functions_of_other_libraries_have_not_moved(path: str, name: str) -> None:
    file = find_file(path)
    assert name in functions_in(file) if name else file.is_dir()


@pytest.mark.parametrize(
    "innermost",
    [
        "torch/cuda/streams.py:synchronize",
        "torch/cuda/__init__.py:synchronize",
        "torch/distributed/distributed_c10d.py:all_reduce",
        "deepspeed/comm/torch.py:all_reduce",
        "deepspeed/runtime/zero/partition_parameters.py:_allgather_params_coalesced:handle.wait()",
        "deepspeed/runtime/zero/stage3.py:has_overflow:.item()",
        "pretrain/interval.py:reduce:.tolist()",
        "pretrain/evaluation.py:_validate:.tolist()",
        "pretrain/evaluation.py:_probe:.cpu()",
        "pretrain/distributed.py:any_over_ranks",
    ],
)
def test_rank_waits(innermost: str) -> None:
    stack = frames("pretrain/train.py:train", innermost)
    assert wait_of(stack) is Wait.CERTAIN
    assert wait_of(stack + frames("pretrain/stop_signal.py:_handle")) is Wait.NO  # it hangs in a signal handler


def test_rank_waits_in_the_gathers_of_zero_3() -> None:
    gather = frames("deepspeed/runtime/zero/partition_parameters.py:wait", "deepspeed/utils/nvtx.py:wrapped_fn")
    assert wait_of(gather) is Wait.CERTAIN
    assert wait_of(gather + frames("pretrain/stop_signal.py:_handle")) is Wait.NO
    release = frames("deepspeed/runtime/zero/stage3.py:step", "deepspeed/utils/nvtx.py:wrapped_fn")
    assert wait_of(release) is Wait.NO


@pytest.mark.parametrize(
    "innermost",
    [
        "torch/utils/data/dataloader.py:_try_get_data",  # waits for its own data workers
        "torch/utils/data/_utils/pin_memory.py:_pin_memory_loop",
        "torch/cuda/streams.py:record_event",
        "torch/cuda/__init__.py:set_device",
        "torch/optim/adamw.py:adamw",
        "deepspeed/runtime/zero/stage_1_and_2.py:step",
        "deepspeed/runtime/zero/partition_parameters.py:_allgather_params_coalesced",
        "pretrain/model/vit.py:forward",
    ],
)
def test_rank_does_not_wait(innermost: str) -> None:
    assert wait_of(frames("pretrain/train.py:train", innermost)) is Wait.NO


class Hanging:
    """A thread that calls a function and stays in it until the end of the test."""

    def __init__(self, call: Callable[[Callable[[], None]], None], start: Callable[..., object]) -> None:
        self.ident = 0
        self.is_inside, self.is_over = threading.Event(), threading.Event()
        start(self._run, (call,))
        assert self.is_inside.wait(60)

    def _run(self, call: Callable[[Callable[[], None]], None]) -> None:
        self.ident = threading.get_ident()
        call(self._stay)

    def _stay(self) -> None:
        self.is_inside.set()
        while not self.is_over.wait(0.01):
            pass


def start_thread(function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def backward_that_hangs_in_a_hook(stay: Callable[[], None]) -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.register_hook(lambda gradient: stay())
    weight.sum().backward()


def wait_in_the_engine(stay: Callable[[], None]) -> None:
    """Wait without a further Python frame in a function that seems to be autograd's."""
    path, name = BACKWARD_FUNCTION
    lock = threading.Lock()
    lock.acquire()
    code = compile(f"def {name}(wait):\n    wait(True, 60)\n", str(find_file(path)), "exec")
    names: dict[str, Callable[[Callable[..., bool]], None]] = {}
    exec(code, names)
    stay_once(stay)
    names[name](lock.acquire)


def stay_once(stay: Callable[[], None]) -> None:
    """Tell that the thread has begun, without staying."""
    stay.__self__.is_inside.set()  # type: ignore[attr-defined]


def test_hook_of_backward_is_shown_on_a_cpu() -> None:
    """There, hooks run in the main thread."""
    main = Hanging(backward_that_hangs_in_a_hook, start_thread)
    stack = read_stack(main.ident)
    main.is_over.set()
    assert "in _engine_run_backward" in stack
    assert "in backward_that_hangs_in_a_hook" in stack
    assert wait_of(stack) is Wait.NO


def test_hook_of_backward_is_shown_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, hooks run in a thread of autograd, which Python did not start, while the main thread waits for it."""
    threads = set()  # pytest-xdist has threads that Python did not start, too
    monkeypatch.setattr(
        stacks, "read_stacks", lambda: {ident: text for ident, text in read_stacks().items() if ident in threads}
    )
    main = Hanging(wait_in_the_engine, start_thread)
    threads.add(main.ident)
    wait_for(lambda: wait_of(read_stack(main.ident)) is Wait.POSSIBLE, timeout=60)
    hook = Hanging(lambda stay: stay(), _thread.start_new_thread)
    threads.add(hook.ident)
    stack = read_stack(main.ident)
    hook.is_over.set()
    assert stack.index("in _engine_run_backward") < stack.index("in _stay")
    assert wait_of(stack) is Wait.NO
    assert Path(__file__).name in stack


def test_stack_is_written_as_in_a_traceback() -> None:
    hanging = Hanging(lambda stay: stay(), start_thread)
    stack = read_stack(hanging.ident)
    hanging.is_over.set()
    line = Hanging._stay.__code__.co_firstlineno + 2
    assert f'  File "{__file__}", line {line}, in _stay\n    while not self.is_over.wait(0.01):\n' in stack
    assert stack.index("in _bootstrap") < stack.index("in _run") < stack.index("in _stay")


@pytest.mark.processes
def test_reading_the_stack_of_a_busy_thread_does_not_crash() -> None:
    script = Path(__file__).with_name("read_busy_stacks.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, str(script)], check=True, timeout=120, env=environment)
