"""Run every check that needs an NVIDIA GPU, print a table with a verdict per line, and write it as JSON and Markdown.

    make gpu                                        # own environment, all groups, at most ten minutes
    make gpu WHEELS=/path/to/wheels                 # the same without a network
    python -m benchmarks.gpu --only waits right     # some groups, in the current environment
    python -m benchmarks.gpu --device cpu           # a rehearsal with tiny sizes; its figures mean nothing

Each group runs in a process of its own with a time limit, so that a group that fails or hangs stops no other one.
Exit codes: 0 if no check failed (a bar of speed that was missed is no failure), 1 if one failed, 2 without a GPU.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from benchmarks.gpu.checks import FAILED, SKIPPED, Check, markdown_rows, print_table, read

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = "no NVIDIA GPU found: torch.cuda.is_available() is false; --device cpu rehearses the checks on the CPU"
END_SECONDS = 10.0  # between asking a group to end and killing it


@dataclass(frozen=True)
class Group:
    """A group of checks, which runs in processes of its own.

    Attributes:
        module: Name of its module.
        least_seconds: Time without which it is not started; later groups keep theirs.
        num_ranks: Number of processes that run it together.
    """

    module: str
    least_seconds: float
    num_ranks: int = 1


GROUPS = {
    "waits": Group("benchmarks.gpu.waits", 60),
    "right": Group("benchmarks.gpu.right", 60),
    "alive": Group("benchmarks.gpu.alive", 45),
    "fast": Group("benchmarks.gpu.fast", 180),
    "rest": Group("benchmarks.gpu.rest", 90),
}
ON_TWO_RANKS = {"waits": "waits on 2 GPUs", "right": "right on 2 GPUs"}  # group -> its name on two ranks


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    num_gpus = count_gpus() if options.device == "cuda" else 0
    if options.device == "cuda" and not num_gpus:
        print(NO_GPU, file=sys.stderr)
        return 2
    chosen = {name: group for name, group in GROUPS.items() if name in (options.only or GROUPS)}
    if num_gpus > 1:
        chosen |= {ON_TWO_RANKS[name]: replace(chosen[name], num_ranks=2) for name in chosen.keys() & ON_TWO_RANKS}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vitrail-gpu-") as work:
        checks = run_groups(chosen, options.device, 60 * options.minutes, Path(work))
    facts = {**describe_machine(num_gpus), "seconds": round(time.monotonic() - started)}
    print_table(checks)
    write_results(options.out, facts, checks)
    return 1 if any(check.verdict == FAILED for check in checks) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="groups to run; all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all groups; what does not fit is skipped")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is a rehearsal with tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file; the Markdown file is next to it")
    return parser.parse_args(arguments)


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that torch can use."""
    import torch  # after the arguments are parsed, because it takes seconds

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def describe_machine(num_gpus: int) -> dict[str, object]:
    """Return the facts that make the figures comparable: hardware and versions."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if num_gpus else "CPU",
        "num_gpus": num_gpus,
        "num_cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if num_gpus else None,
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def git_commit() -> str:
    """Return the commit of the checkout, or an empty string without git."""
    if not shutil.which("git"):
        return ""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip()


def run_groups(groups: dict[str, Group], device: str, seconds: float, work: Path) -> list[Check]:
    """Run the groups one after the other, within a time for all of them; return all results."""
    end, checks = time.monotonic() + seconds, []
    waiting = sum(group.least_seconds for group in groups.values())
    for name, group in groups.items():
        waiting -= group.least_seconds
        left = end - time.monotonic()
        # A group may use what earlier ones left, but not what later ones need.
        limit = max(left - waiting, min(left, group.least_seconds))
        if limit < group.least_seconds:
            reason = f"needs {group.least_seconds:.0f} s, {max(limit, 0):.0f} s of --minutes are left"
            checks.append(Check(SKIPPED, check="all", group=name, reason=reason))
            continue
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        checks += run_group(name, group, device, limit, work / name.replace(" ", "-"))
    return checks


def run_group(name: str, group: Group, device: str, seconds: float, work: Path) -> list[Check]:
    """Run a group in processes of its own, and end them all when its time is over.

    Args:
        name: Name of the group in the table.
        group: The group.
        device: "cuda" or "cpu".
        seconds: Time limit, within which its processes are also ended.
        work: Folder for its files.

    Returns:
        Its results, with one that failed if the process did not end by itself and with exit code 0.
    """
    work.mkdir(parents=True)
    rows, log = work / "checks.jsonl", work / "log"
    command = [group.module, "--group", name, "--device", device, "--work", str(work)]
    command = [*python(group.num_ranks), *command, "--rows", str(rows), "--seconds", str(seconds - 2 * END_SECONDS)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(device, work), stdout=output, stderr=output, start_new_session=True
        )
        problem = wait_for(process, seconds - END_SECONDS)
    checks = read(rows)
    if problem:
        [last] = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:] or [""]
        checks.append(Check(FAILED, check="the process", group=name, reason=f"{problem}: {last[:300]}".rstrip(": ")))
    if any(check.verdict == FAILED for check in checks):
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr, flush=True)
    return checks


def python(num_ranks: int) -> list[str]:
    """Return the command that runs a module, in one process or in several ranks."""
    if num_ranks == 1:
        return [sys.executable, "-m"]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"]


def environment(device: str, work: Path) -> dict[str, str]:
    """Return the environment variables of a group's processes."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work.parent / "inductor"))  # so that nothing compiles twice
    variables.pop("DS_ACCELERATOR", None)
    if device == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        variables.setdefault("OMP_NUM_THREADS", "1")
    return variables


def wait_for(process: "subprocess.Popen[bytes]", seconds: float) -> str:
    """Wait for a process that leads a group of processes, and end all of the group; return what went wrong."""
    try:
        code = process.wait(seconds)
        return f"ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"ended after its time limit of {seconds:.0f} s"
    finally:  # also after Ctrl-C, and for what the process has left running
        end_group(process)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End all processes of the group that a process leads, and all that they started: SIGTERM first, then SIGKILL."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)  # torchrun starts its ranks in other groups
    except psutil.NoSuchProcess:
        started = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)  # psutil does not mistake another process with the same id for it
        end = time.monotonic() + END_SECONDS
        while time.monotonic() < end and (group_exists(process) or any(map(is_alive, started))):
            time.sleep(0.05)
    process.wait()


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process is running; one that has ended may stay in the list of processes as a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def group_exists(process: "subprocess.Popen[bytes]") -> bool:
    """Return whether any process of the group is left."""
    process.poll()  # a process that has ended remains in its group until its exit code is read
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def write_results(out: Path, facts: dict[str, object], checks: list[Check]) -> None:
    """Write all results as JSON, and next to it the rows for docs/benchmarks.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {**facts, "checks": [asdict(check) for check in checks]}
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    title = f"{facts['device']}, torch {facts['torch']}, commit {str(facts['commit'])[:10]}, {facts['seconds']} s"
    rows = out.with_suffix(".md")
    rows.write_text("\n".join([title, "", *markdown_rows(checks)]) + "\n", encoding="utf-8")
    print(f"\n{title}\nwritten: {out} and {rows}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the group at work, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
