"""Which ends of other ranks make a rank leave, and which do not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.heartbeat.beats import CONTINUE, END, Beat, beats_folder, read_order, write_beat
from pretrain.heartbeat.peers import Peers
from pretrain.heartbeat.processes import describe_process, neighbors, write_processes
from pretrain.outcome import Outcome

MAIN = describe_process()


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def process_of(pid: int) -> str:
    host, _, machine = MAIN.split()
    return f"{host} {pid} {machine}"


def claim(run_dir: Path, *processes: str) -> Peers:
    """List the processes of a run, of which this one is rank 0."""
    beats_folder(run_dir).mkdir(exist_ok=True)
    write_processes(run_dir, [*processes])
    return Peers(run_dir, 0)


def beat(run_dir: Path, rank: int, pid: int, outcome: Outcome | None = None) -> Beat:
    phase = END if outcome else "backward"
    beat = Beat(rank, pid, "h", 1, 5, 7, phase, 0.1, None, {}, "", outcome.value if outcome else None)
    write_beat(run_dir, beat)
    return beat


@pytest.mark.processes
def test_killed_rank_of_this_machine_is_noticed(tmp_path: Path, child: "subprocess.Popen[bytes]") -> None:
    peers = claim(tmp_path, MAIN, process_of(child.pid))
    beat(tmp_path, 1, child.pid)
    assert not peers.find_failure(CONTINUE, [])
    child.kill()
    child.wait()
    sentence = f"rank 1 (process {child.pid} on h) died in phase backward of step 7"
    assert peers.find_failure(CONTINUE, []) == sentence
    elsewhere = claim(tmp_path, MAIN)  # a rank of another machine, which learns it from the order
    assert elsewhere.find_failure(read_order(tmp_path), []) == sentence
    later_start = claim(tmp_path, process_of(4711))
    assert not later_start.find_failure(read_order(tmp_path), [])


@pytest.mark.processes
@pytest.mark.parametrize("outcome", [None, *Outcome])
def test_rank_that_ended_is_a_failure_only_with_an_error(
    tmp_path: Path, child: "subprocess.Popen[bytes]", outcome: Outcome | None
) -> None:
    child.kill()
    child.wait()
    peers = claim(tmp_path, MAIN, process_of(child.pid))
    beat(tmp_path, 1, child.pid, outcome)
    assert bool(peers.find_failure(CONTINUE, [])) == (outcome not in (Outcome.DONE, Outcome.STOPPED))


@pytest.mark.processes
def test_rank_that_was_killed_before_its_first_heartbeat_is_noticed(
    tmp_path: Path, child: "subprocess.Popen[bytes]"
) -> None:
    child.kill()
    child.wait()
    peers = claim(tmp_path, MAIN, process_of(child.pid))
    assert peers.find_failure(CONTINUE, []) == f"rank 1 (process {child.pid}) ended before its first heartbeat"


def test_error_in_a_heartbeat_is_noticed_before_the_process_is_gone(tmp_path: Path) -> None:
    peers = claim(tmp_path, MAIN, "elsewhere 4711 machine")
    sentence = "rank 1 (process 4711 on h) ended in step 7 (failed)"
    assert peers.find_failure(CONTINUE, [beat(tmp_path, 1, 4711, Outcome.FAILED)]) == sentence
    assert sentence in read_order(tmp_path)


def test_processes_of_other_machines_are_not_looked_for() -> None:
    """A container may have the same host name, and processes with the same numbers."""
    host, pid, machine = MAIN.split()
    processes = [MAIN, f"{host} 11 {machine}", f"{host} 12 {machine}x", f"other 13 {machine}"]
    assert neighbors(processes, 0) == {1: 11, 3: 13}
    assert neighbors(processes, 1) == {0: int(pid), 3: 13}


def test_folder_that_was_not_claimed_names_no_processes(tmp_path: Path) -> None:
    assert not Peers(tmp_path, 0).find_failure(CONTINUE, [])
