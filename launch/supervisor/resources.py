"""What is left to train on when a run has failed: the GPUs and machines that still answer, or a rank fewer."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PROBE_SECONDS = 60.0
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
# Each GPU by a process of its own, since one that is broken may hang or abort whoever touches it.
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
TOUCH_GPU = "import sys, torch; torch.ones(1, device=f'cuda:{sys.argv[1]}').item()"
NUM_RANKS = re.compile(r"--num_gpus|--nproc[_-]per[_-]node")
CHOSEN = ("--hostfile", "--include", "--exclude")  # where ranks go, in the user's own words
DEFAULT_HOSTFILE = Path("/job/hostfile")  # of deepspeed


def list_gpus(python: str = sys.executable) -> tuple[list[int], list[int]]:
    """Return the numbers of this machine's GPUs that answer, and of those that do not."""
    try:
        counted = subprocess.run([python, "-c", COUNT_GPUS], capture_output=True, timeout=PROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return [], []
    numbers = range(int(counted.stdout))
    answers = _all_answer([[python, "-c", TOUCH_GPU, str(number)] for number in numbers])
    return [i for i in numbers if answers[i]], [i for i in numbers if not answers[i]]


def list_lost_hosts(hostfile: Path) -> list[str]:
    """Return the machines of a DeepSpeed hostfile that ssh does not reach; none if the file cannot be read."""
    try:
        text = hostfile.read_text(encoding="utf-8")
    except OSError:
        return []  # the launcher will say so
    lines = (line.split() for line in text.splitlines())
    hosts = [words[0] for words in lines if words and not words[0].startswith("#")]
    answers = _all_answer([[*SSH, host, "true"] for host in hosts])
    return [host for host, answered in zip(hosts, answers, strict=True) if not answered]


def with_fewer_ranks(command: Sequence[str], say: Callable[[str], None], world_size: int) -> list[str]:
    """Return the command for one rank fewer; the same one where that is none, or machines are chosen by a hostfile.

    Args:
        command: starts a run by deepspeed or torchrun.
        say: is told.
        world_size: how many ranks it had, for a command that does not say so.
    """
    words = _with_number(command, world_size)
    place = next((i for i, word in enumerate(words[:-1]) if NUM_RANKS.fullmatch(word)), None)
    if place is None or not words[place + 1].isdigit() or int(words[place + 1]) < 2:
        return list(command)
    left = int(words[place + 1]) - 1
    words[place + 1] = str(left)
    say(f"going on with {left} {'rank' if left == 1 else 'ranks'}; the global batch stays the same")
    return words


def adapt(command: Sequence[str], say: Callable[[str], None], world_size: int) -> list[str]:
    """Return the command for what still answers: the same one when nothing is lost, or nothing can be told."""
    words = _with_number(command, world_size)
    if any(word in ("--include", "--exclude") for word in words):
        return list(command)  # the user has chosen
    if "--hostfile" in words[:-1]:
        place = words.index("--hostfile")
        lost = list_lost_hosts(Path(words[place + 1]))
        if lost:
            say(f"{', '.join(lost)}: not reached by ssh; going on without")
            words[place:place] = ["--exclude", "@".join(lost)]
        return words
    if "--num_gpus" in words[:-1]:
        place = words.index("--num_gpus")
        left, lost_gpus = list_gpus()
        if left and lost_gpus:
            say(f"GPU {', '.join(map(str, lost_gpus))} does not answer; going on without")
        if left and (lost_gpus or len(left) < int(words[place + 1])):
            kept = left[: int(words[place + 1])]
            words[place : place + 2] = ["--include", f"localhost:{','.join(map(str, kept))}"]
    return words


def _with_number(command: Sequence[str], world_size: int) -> list[str]:
    """Return the command with the number of ranks spelled out where a launcher would have counted the GPUs itself."""
    words = [part for word in command for part in _apart(word)]
    numbered = next((i for i, word in enumerate(words[:-1]) if NUM_RANKS.fullmatch(word)), None)
    if world_size and numbered is not None and not words[numbered + 1].isdigit():
        words[numbered + 1] = str(world_size)  # as --nproc_per_node gpu
    elsewhere = DEFAULT_HOSTFILE.exists() or any(word in CHOSEN for word in words)
    launcher = next((i for i, word in enumerate(words) if Path(word).name == "deepspeed"), None)
    if world_size and numbered is None and launcher is not None and not elsewhere:
        words[launcher + 1 : launcher + 1] = ["--num_gpus", str(world_size)]
    return words


def _apart(word: str) -> list[str]:
    """Take an option of a launcher and its value apart, as in --num_gpus=4; and give short ones their long names."""
    option, equals, value = word.partition("=")
    if equals and (option in CHOSEN or NUM_RANKS.fullmatch(option)):
        return [option, value]
    return [{"-H": "--hostfile", "-i": "--include", "-e": "--exclude"}.get(word, word)]


def _all_answer(commands: list[list[str]]) -> list[bool]:
    """Run commands side by side; say of each whether it ended well, and in time."""
    null = subprocess.DEVNULL
    running = [subprocess.Popen(command, stdin=null, stdout=null, stderr=null) for command in commands]
    answers = []
    for process in running:
        try:
            answers.append(process.wait(timeout=PROBE_SECONDS) == 0)
        except subprocess.TimeoutExpired:
            process.kill()
            answers.append(False)
    return answers
