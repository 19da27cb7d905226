"""The command lines of the launchers, and running one so that Ctrl-C reaches the ranks instead of the launcher."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import FrameType

import psutil

from pretrain.errors import UserError
from pretrain.heartbeat.beats import ABORT, STOP, find_live_rank, write_order
from pretrain.outcome import EXIT_CODE_FILE, EXIT_CODES, EXIT_FAILED, EXIT_INTERRUPTED

BIN = Path(sys.executable).parent
DEEPSPEED = (str(BIN / "deepspeed"), "--log_level", "error")  # otherwise it prints how it starts each process
SCRIPTS = {stage: str(Path(__file__).with_name(f"{stage}.py")) for stage in ("pretrain", "finetune")}
ACCELERATE_CONFIG = Path(__file__).with_name("accelerate.yaml")
POLL_SECONDS = 0.1


def deepspeed_command(num_ranks: int, gpus: list[str]) -> list[str]:
    """Return the words before the script that start ranks on this machine with deepspeed.

    With --num_gpus, deepspeed starts at the first GPU, whatever CUDA_VISIBLE_DEVICES says.
    """
    chosen = ["--num_gpus", str(num_ranks)]
    if "CUDA_VISIBLE_DEVICES" in os.environ and gpus:
        chosen = ["--include", f"localhost:{','.join(gpus[:num_ranks])}"]
    return [*DEEPSPEED, *chosen, "--master_port", free_port()]


def torchrun_command(num_ranks: int, gpus: list[str]) -> list[str]:
    """Return the words before the script that start ranks on this machine with torchrun."""
    return [str(BIN / "torchrun"), "--nproc_per_node", str(num_ranks), "--master_port", free_port()]


def accelerate_command(num_ranks: int, gpus: list[str]) -> list[str]:
    """Return the words before the script that start ranks on this machine with accelerate.

    Raises:
        UserError: If several ranks are wanted without GPUs, for which accelerate would start a single one.
    """
    words = [str(BIN / "accelerate"), "launch", "--config_file", str(ACCELERATE_CONFIG)]
    words += ["--num_machines", "1", "--num_processes", str(num_ranks), "--main_process_port", free_port()]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if not gpus and num_ranks > 1:
        raise UserError("--launcher accelerate starts only one process without GPUs; choose torchrun")
    if not gpus:
        return [*words, "--cpu"]
    return [*words, "--multi_gpu"] if num_ranks > 1 else words


def python_command(num_ranks: int, gpus: list[str]) -> list[str]:
    """Return the words before the script that start a single process.

    Raises:
        UserError: If more than one rank is wanted.
    """
    if num_ranks > 1:
        raise UserError(f"--launcher python starts one process, not {num_ranks}; choose another launcher")
    return [sys.executable]


LAUNCHERS: dict[str, Callable[[int, list[str]], list[str]]] = {
    "deepspeed": deepspeed_command,
    "torchrun": torchrun_command,
    "accelerate": accelerate_command,
    "python": python_command,
}


def list_gpus() -> list[str]:
    """Return the names of the NVIDIA GPUs that the driver has and CUDA_VISIBLE_DEVICES does not hide."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return []
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        num_gpus = len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
    if visible is None:
        return [str(gpu) for gpu in range(num_gpus)]
    named = takewhile(lambda gpu: gpu != "-1", (gpu.strip() for gpu in visible.split(",")))  # as CUDA reads it
    return [gpu for gpu in named if gpu][:num_gpus]


def free_port() -> str:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of slots of each host in a DeepSpeed hostfile.

    Raises:
        UserError: If the file cannot be read, or a line is not of the form `HOST slots=NUMBER`.
    """
    slots: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the hostfile ({error}); check the path") from None
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = words[1].removeprefix("slots=") if len(words) == 2 and words[1].startswith("slots=") else ""
        if not count.isdigit() or words[0] in slots:
            raise UserError(f"{path}:{number}: must name each machine once, as HOST slots=NUMBER, got {line.strip()!r}")
        slots[words[0]] = int(count)
    if not slots:
        raise UserError(f"{path}: names no machine; add a line such as gpu-node-01 slots=8")
    return slots


def run_launcher(command: Sequence[str], run_dir: Path, environment: Mapping[str, str]) -> int:
    """Run a launcher's command and return the exit code of the run that it started.

    Ctrl-C, SIGTERM and SIGUSR1 are sent to the ranks alone. Launchers answer them with tracebacks, and end ranks that
    are still saving. A second Ctrl-C ends everything at once.

    Args:
        command: Command of the launcher.
        run_dir: Run folder, through which ranks on other machines are asked to stop.
        environment: Environment variables of the launcher and its ranks.
    """
    with tempfile.TemporaryDirectory(prefix="vitrail-") as folder:
        code_file = Path(folder) / "exit-code"
        process = subprocess.Popen(command, env={**environment, EXIT_CODE_FILE: str(code_file)}, start_new_session=True)
        requests: list[int] = []

        def request_stop(number: int, frame: FrameType | None) -> None:
            requests.append(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, request_stop)
        num_handled = 0
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if len(requests) > num_handled:
                num_handled = len(requests)
                if num_handled > 1 or not ask_to_stop(process.pid, run_dir):
                    kill_tree(process)
                    if find_live_rank(run_dir):
                        write_order(run_dir, ABORT)
                    print("interrupted", file=sys.stderr)
                    return EXIT_INTERRUPTED
        if code_file.exists():
            return int(code_file.read_text(encoding="utf-8"))
    # A launcher that was ended by a signal has a negative code; deepspeed ends with 247 if a rank was killed.
    return process.returncode if process.returncode in EXIT_CODES else EXIT_FAILED


def ask_to_stop(launcher: int, run_dir: Path) -> bool:
    """Ask the ranks to save and stop; return False if none of them trains yet, so that there is nothing to save.

    Ranks below the launcher get SIGTERM. If there are none, because they run on other machines, the order to stop is
    written into the run folder.
    """
    ranks = [each for each in descendants(launcher) if is_rank(each) and catches(each.pid, signal.SIGUSR1)]
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.terminate()
    if not ranks and find_live_rank(run_dir):
        write_order(run_dir, STOP)
        return True
    return bool(ranks)


def descendants(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def is_rank(process: psutil.Process) -> bool:
    """Return whether a process is Python running a launch script, not a launcher with the script as an argument."""
    try:
        words = process.cmdline()[1:]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    return next((word for word in words if not word.startswith("-")), "") in SCRIPTS.values()


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started; torchrun puts its ranks into sessions of their own."""
    for each in descendants(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
