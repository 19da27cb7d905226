"""Adapt the command of a failed run to the GPUs and machines that still respond, or to one rank fewer."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PROBE_SECONDS = 60.0
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
# Each GPU is probed by its own process, because a broken one may hang or abort the process that uses it.
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
TOUCH_GPU = "import sys, torch; torch.ones(1, device=f'cuda:{sys.argv[1]}').item()"
NUM_RANKS_OPTION = re.compile(r"--num_gpus|--nproc[_-]per[_-]node")
NUM_NODES_OPTION = re.compile(r"--nnodes[= ](\S+)")
PLACEMENT_OPTIONS = ("--hostfile", "--include", "--exclude")
DEFAULT_HOSTFILE = Path("/job/hostfile")  # where deepspeed looks


def list_gpus(python: str = sys.executable) -> tuple[list[int], list[int]]:
    """Return the indices of this machine's GPUs that work, and of those that do not; both empty without CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return [], []  # torch would need seconds to say the same
    try:
        counted = subprocess.run([python, "-c", COUNT_GPUS], capture_output=True, timeout=PROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return [], []
    gpus = range(int(counted.stdout))
    works = _run_all([[python, "-c", TOUCH_GPU, str(gpu)] for gpu in gpus])
    return [gpu for gpu in gpus if works[gpu]], [gpu for gpu in gpus if not works[gpu]]


def list_unreachable_hosts(hostfile: Path) -> list[str]:
    """Return the hosts of a DeepSpeed hostfile that ssh cannot reach; this machine is not probed.

    None are returned if the file cannot be read, or if ssh is not installed.
    """
    if shutil.which(SSH[0]) is None:
        return []
    try:
        text = hostfile.read_text(encoding="utf-8")
    except OSError:
        return []  # the launcher reports it
    lines = (line.split() for line in text.splitlines())
    named = [words[0] for words in lines if words and not words[0].startswith("#")]
    hosts = [host for host in named if not is_this_machine(host)]
    reached = _run_all([[*SSH, host, "true"] for host in hosts])
    return [host for host, is_reached in zip(hosts, reached, strict=True) if not is_reached]


def is_this_machine(host: str) -> bool:
    """Return whether a host name or an address belongs to this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)  # the system refuses addresses of other machines
    except OSError:
        return False
    return True


def with_fewer_ranks(command: Sequence[str], report: Callable[[str], None], world_size: int) -> list[str]:
    """Return the command with one rank fewer.

    It is unchanged if it has only one rank, if a hostfile decides, or if every machine runs a command of its own.

    Args:
        command: Command that starts a run with deepspeed or torchrun.
        report: Function that is called with a sentence about a change.
        world_size: Number of ranks of the last attempt, used if the command leaves the number to the launcher.
    """
    if _is_one_of_several(command):
        return list(command)
    words = _with_explicit_ranks(command, world_size)
    place = next((i for i, word in enumerate(words[:-1]) if NUM_RANKS_OPTION.fullmatch(word)), None)
    if place is None or not words[place + 1].isdigit() or int(words[place + 1]) < 2:
        return list(command)
    num_ranks = int(words[place + 1]) - 1
    words[place + 1] = str(num_ranks)
    report(f"continuing with {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}; the global batch size is unchanged")
    return words


def without_lost_resources(command: Sequence[str], report: Callable[[str], None], world_size: int) -> list[str]:
    """Return the command without the GPUs and hosts that no longer respond.

    The command is unchanged if everything responds, if nothing can be probed, if the user chose the resources with
    --include or --exclude, or if every machine runs a command of its own.

    Args:
        command: Command that starts a run with deepspeed or torchrun.
        report: Function that is called with a sentence about a change.
        world_size: Number of ranks of the last attempt, used if the command leaves the number to the launcher.
    """
    words = _with_explicit_ranks(command, world_size)
    if _is_one_of_several(command) or any(word in ("--include", "--exclude") for word in words):
        return list(command)
    if "--hostfile" in words[:-1]:
        place = words.index("--hostfile")
        lost = list_unreachable_hosts(Path(words[place + 1]))
        if lost:
            report(f"{', '.join(lost)}: not reachable with ssh; continuing without these machines")
            words[place:place] = ["--exclude", "@".join(lost)]
        return words
    if "--num_gpus" in words[:-1]:
        place = words.index("--num_gpus")
        working, failed = list_gpus()
        if working and failed:
            report(f"GPU {', '.join(map(str, failed))}: not responding; continuing without these GPUs")
        if working and (failed or len(working) < int(words[place + 1])):
            kept = working[: int(words[place + 1])]
            words[place : place + 2] = ["--include", f"localhost:{','.join(map(str, kept))}"]
    return words


def _is_one_of_several(command: Sequence[str]) -> bool:
    """Return whether other machines run the same command, which a change of this one would no longer fit."""
    num_nodes = NUM_NODES_OPTION.search(" ".join(command))
    return "--no_ssh" in command or (num_nodes is not None and num_nodes[1] not in ("1", "1:1"))


def _with_explicit_ranks(command: Sequence[str], world_size: int) -> list[str]:
    """Return the command with the number of ranks as a number, where the launcher would count the GPUs itself."""
    words = [part for word in command for part in _split_option(word)]
    option = next((i for i, word in enumerate(words[:-1]) if NUM_RANKS_OPTION.fullmatch(word)), None)
    if world_size and option is not None and not words[option + 1].isdigit():
        words[option + 1] = str(world_size)  # for example --nproc_per_node gpu
    is_placed = DEFAULT_HOSTFILE.exists() or any(word in PLACEMENT_OPTIONS for word in words)
    launcher = next((i for i, word in enumerate(words) if Path(word).name == "deepspeed"), None)
    if world_size and option is None and launcher is not None and not is_placed:
        words[launcher + 1 : launcher + 1] = ["--num_gpus", str(world_size)]
    return words


def _split_option(word: str) -> list[str]:
    """Split a launcher's --option=value into two words, and replace a short option by its long name."""
    option, equals, value = word.partition("=")
    if equals and (option in PLACEMENT_OPTIONS or NUM_RANKS_OPTION.fullmatch(option)):
        return [option, value]
    return [{"-H": "--hostfile", "-i": "--include", "-e": "--exclude"}.get(word, word)]


def _run_all(commands: list[list[str]]) -> list[bool]:
    """Run commands in parallel; return for each whether it succeeded within PROBE_SECONDS."""
    null = subprocess.DEVNULL
    running = [subprocess.Popen(command, stdin=null, stdout=null, stderr=null) for command in commands]
    succeeded = []
    for process in running:
        try:
            succeeded.append(process.wait(timeout=PROBE_SECONDS) == 0)
        except subprocess.TimeoutExpired:
            process.kill()
            succeeded.append(False)
    return succeeded
