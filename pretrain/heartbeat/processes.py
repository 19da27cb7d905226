"""The processes of all ranks of a run, listed in the run folder, so that a rank notices when a neighbor disappears."""

import os
import socket
from pathlib import Path

from pretrain.heartbeat.beats import beats_folder

PROCESSES_FILE = "processes"  # in the folder of the heartbeats, one line per rank
PROCESS_NAMESPACE = Path("/proc/self/ns/pid")  # a link that identifies the processes that this one can see
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # identifies the running system of a machine


def describe_process() -> str:
    """Return the host, the process ID and the machine of this process, separated by spaces."""
    return f"{socket.gethostname()} {os.getpid()} {_machine()}"


def write_processes(run_dir: Path, processes: list[str]) -> None:
    """List the processes of all ranks in the run folder.

    Args:
        run_dir: Run folder.
        processes: Result of `describe_process` on each rank, in the order of the ranks.
    """
    (beats_folder(run_dir) / PROCESSES_FILE).write_text("\n".join(processes), encoding="utf-8")


def read_processes(run_dir: Path) -> list[str]:
    """Return the processes of all ranks; an empty list if the run folder has none."""
    try:
        return (beats_folder(run_dir) / PROCESSES_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def neighbors(processes: list[str], rank: int) -> dict[int, int]:
    """Return the process ID of each other rank on the machine of this process, by rank.

    Args:
        processes: Result of `read_processes`.
        rank: Rank of this process.
    """
    words = [line.split() for line in processes]
    machine = _machine()
    return {i: int(pid) for i, (_, pid, where) in enumerate(words) if where == machine and i != rank}


def is_alive(pid: int) -> bool:
    """Return whether a process exists on this machine and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _machine() -> str:
    """Return a name that only processes with the same process IDs share.

    The name of the host is not enough: two containers may share it and still count their processes separately. Where
    the system does not tell, no other process has the same name.
    """
    try:
        return f"{BOOT_ID.read_text(encoding='ascii').strip()}/{PROCESS_NAMESPACE.readlink()}"
    except OSError:
        return f"{socket.gethostname()}/{os.getpid()}"
