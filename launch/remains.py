"""What is left to train on when a run has failed: the GPUs and machines that still answer."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PROBE_SECONDS = 60.0
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
# Each GPU by a process of its own, since one that is broken may hang or abort whoever touches it.
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
TOUCH_GPU = "import sys, torch; torch.ones(1, device=f'cuda:{sys.argv[1]}').item()"


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


def adapt(command: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Return the command for what still answers: the same one when nothing is lost, or nothing can be told."""
    words = [part for word in command for part in _apart(word)]
    if any(word in ("--include", "--exclude", "-i", "-e") for word in words):
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


def _apart(word: str) -> list[str]:
    """Take an option of the launcher and its value apart, as in --num_gpus=4; and give -H its long name."""
    option, equals, value = word.partition("=")
    if equals and option in ("--hostfile", "--num_gpus", "--include", "--exclude"):
        return [option, value]
    return ["--hostfile"] if word == "-H" else [word]


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
