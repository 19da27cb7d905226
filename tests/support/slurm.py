"""A real Slurm on this machine: its daemons, with two nodes of one CPU each, and its commands."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.launching import POLL_SECONDS, free_port, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "squeue", "scancel")
START_SECONDS = 60.0
NODES = ("node1", "node2")
# The nodes are one machine, so each slurmd needs a port and a folder of its own. A requeued job waits until its
# credentials have expired, by default for two minutes.
CONFIG = """
ClusterName=vitrail
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1\n"


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs on this machine.

    Attributes:
        env: Environment variables with which Slurm's commands find the cluster.
    """

    env: dict[str, str]

    def __call__(self, *command: str | Path) -> str:
        """Run one of Slurm's commands and return its output."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows about a job, by the names that `scontrol show job` prints."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", maxsplit=1) for word in words if "=" in word)


@contextmanager
def start_slurm(folder: Path) -> Iterator[Slurm]:
    """Start Slurm's daemons, and end them after the block; skip the test with the reason where they cannot run.

    Args:
        folder: Empty folder with a short name, because it will contain a socket.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs Slurm (Debian's packages slurm-wlm and munge); missing: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("needs root to start slurmd")
    (folder / "state").mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs use the commands of this environment
    slurm = Slurm({**os.environ, "SLURM_CONF": str(write_config(folder)), "PATH": path})
    with ExitStack() as stack:
        for command in daemons(folder):
            stack.enter_context(daemon(command, folder, slurm.env))
        wait_for_nodes(slurm, folder)
        try:
            yield slurm
        finally:
            end_jobs(slurm)


def write_config(folder: Path) -> Path:
    """Write munge's key and slurm.conf; return the path of the latter."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host, path = socket.gethostname(), folder / "slurm.conf"
    nodes = [NODE.format(name=name, host=host, port=free_port()) for name in NODES]
    path.write_text(CONFIG.format(folder=folder, host=host, port=free_port()) + "".join(nodes))
    return path


def daemons(folder: Path) -> list[list[str]]:
    """Return the commands that start the daemons in the foreground, in their order."""
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed"]
    return [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]


@contextmanager
def daemon(command: Sequence[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    """Run a daemon during the block; its output goes to a file in the folder."""
    with (folder / f"{command[0]}.log").open("ab") as log:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_jobs(slurm: Slurm) -> None:
    """Kill the processes of all jobs, which know the path of slurm.conf, and wait until the cluster has noticed.

    Slurm itself would not find the ranks, because torchrun puts them into sessions of their own.
    """
    jobs = slurm("squeue", "--noheader", "--format=%A").split()
    if jobs:
        slurm("scancel", *jobs)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() not in PROGRAMS and process.environ().get("SLURM_CONF") == slurm.env["SLURM_CONF"]:
                process.kill()
    wait_for(lambda: not slurm("squeue", "--noheader"), timeout=120)


def wait_for_nodes(slurm: Slurm, folder: Path) -> None:
    """Wait until all nodes can run jobs; skip the test with the daemons' last lines if they do not come up."""
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        seen = subprocess.run(command, env=slurm.env, capture_output=True, text=True, timeout=60, check=False)
        if seen.stdout.split() == ["idle"] * len(NODES):
            return
        time.sleep(10 * POLL_SECONDS)
    logs = [f"{path.name}: {path.read_text(errors='replace')[-500:]}" for path in sorted(folder.glob("*.log"))]
    pytest.skip("Slurm's daemons cannot run here:\n" + "\n".join(logs))
