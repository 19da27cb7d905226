"""The supervisor: when it restarts a run, with how many ranks, and when it gives up."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.supervisor import resources
from launch.supervisor import supervisor as supervisor_module
from launch.supervisor.supervisor import Supervisor, find_run_dir, outcome_of_attempt
from pretrain.errors import UserError
from pretrain.heartbeat.beats import Beat
from tests.support.launching import TINY

# Simulates a rank on another machine: it writes heartbeats until it is ordered to leave.
ELSEWHERE = """
import json, sys, time
from pathlib import Path
ranks, left = Path(sys.argv[1]), Path(sys.argv[2])
beat = {"rank": 1, "pid": 1, "host": "elsewhere", "num_phases": 1, "step": 1, "phase": "backward"}
for num_beats in range(300):
    beat |= {"num_beats": num_beats, "seconds_in_phase": 0.0, "work_seconds": None, "phase_seconds": {}, "stack": ""}
    (ranks / "rank-00001.json").write_text(json.dumps(beat))
    if (ranks / "order").read_text() == "abort":
        left.touch()
        break
    time.sleep(0.1)
"""
# Simulates a launcher: each run takes the next word of a plan. A number is the exit code, saveN writes a checkpoint of
# step N and fails, elsewhere leaves a rank behind and fails, left? succeeds if that rank has left.
FAKE = """
import subprocess, sys, time
from pathlib import Path
plan = Path({plan!r})
todo = plan.read_text().split()
plan.write_text(" ".join(todo[1:]))
Path({seen!r}).open("a").write(" ".join(sys.argv[1:]) + "\\n")
if todo[0] == "elsewhere":
    (Path({run!r}) / "ranks").mkdir()
    (Path({run!r}) / "ranks" / "order").write_text("")
    rank = [sys.executable, "-c", {elsewhere!r}, {run!r} + "/ranks", {run!r} + "/left"]
    subprocess.Popen(rank, start_new_session=True)
    time.sleep(0.5)
    todo[0] = "1"
elif todo[0] == "left?":
    todo[0] = "0" if (Path({run!r}) / "left").exists() else "2"
if todo[0].startswith("save"):
    folder = Path({run!r}) / "checkpoints" / f"step-{{int(todo[0][4:]):08d}}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("")
sys.exit(1 if todo[0].startswith("save") else int(todo[0]))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(run_dir=tmp_path / "run", shards=tmp_path))
    return path


def supervised(tmp_path: Path, config: Path, plan: str, **options: int) -> tuple[int, list[str], list[str]]:
    """Run a plan to its end; return the exit code, the arguments of each start, and the reported sentences."""
    script = tmp_path / "pretrain.py"
    (tmp_path / "plan").write_text(plan)
    names = {"plan": str(tmp_path / "plan"), "seen": str(tmp_path / "seen"), "run": str(tmp_path / "run")}
    script.write_text(FAKE.format(**names, elsewhere=ELSEWHERE))
    (tmp_path / "run").mkdir()
    reported: list[str] = []
    command = [sys.executable, str(script), "--config", str(config), "--num_gpus", "4"]
    code = Supervisor(command, report=reported.append, **options).run()
    return code, (tmp_path / "seen").read_text().splitlines(), reported


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(supervisor_module.signal, "signal", lambda *_: None)


@pytest.mark.processes
@pytest.mark.parametrize("code", [0, 2, 75])
def test_final_outcomes_are_not_restarted(tmp_path: Path, config: Path, code: int) -> None:
    ended, seen, _ = supervised(tmp_path, config, f"1 {code}")
    assert (ended, len(seen)) == (code, 2)


@pytest.mark.processes
def test_supervisor_gives_up_after_max_failures_without_a_checkpoint(tmp_path: Path, config: Path) -> None:
    ended, seen, reported = supervised(tmp_path, config, "1 save5 1 1 save9 1 1 1 1 0", max_failures=3, fewer_after=0)
    assert (ended, len(seen)) == (1, 8)
    assert "giving up after 4 failures without a new checkpoint; the last exit code was 1" in reported
    assert "restarting from step 5 in 0 s" in reported[1]
    assert json.loads((tmp_path / "run" / "goodput.json").read_text())["attempts"][-1]["saved_step"] == 9


@pytest.mark.processes
def test_restart_waits_for_ranks_on_other_machines(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "SILENT_SECONDS", 0.5)
    ended, seen, _ = supervised(tmp_path, config, "elsewhere left?", fewer_after=0)
    assert (ended, len(seen)) == (0, 2)
    assert (tmp_path / "run" / "ranks" / "order").read_text() == ""


def test_stop_reaches_ranks_on_other_machines(tmp_path: Path, config: Path) -> None:
    ranks = tmp_path / "run" / "ranks"
    ranks.mkdir(parents=True)
    supervisor = Supervisor(["x", "pretrain.py", "--config", str(config)])
    beat = Beat(0, 1, "elsewhere", 1, 1, 1, "forward", 0.0, None, {}, "")
    (ranks / "rank-00000.json").write_text(json.dumps(asdict(beat)))
    supervisor._request_stop(signal.SIGTERM, None)
    supervisor._forward_stop()
    assert (ranks / "order").read_text() == "stop"


@pytest.mark.processes
def test_two_failures_in_a_row_remove_one_rank(tmp_path: Path, config: Path) -> None:
    ended, seen, reported = supervised(tmp_path, config, "1 1 1 1 0", max_failures=9)
    assert ended == 0
    assert [line.split()[-1] for line in seen] == ["4", "4", "3", "3", "2"]
    assert "continuing with 3 ranks; the global batch size is unchanged" in reported


@pytest.mark.processes
def test_restart_after_two_failures_excludes_failed_gpus(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "list_gpus", lambda: ([0, 2], [1, 3]))
    _, seen, reported = supervised(tmp_path, config, "1 1 save5 1 0", max_failures=9, fewer_after=0)
    assert [line.split()[-1] for line in seen] == ["4", "4", *["localhost:0,2"] * 3]
    assert "GPU 1, 3: not responding; continuing without these GPUs" in reported


@pytest.mark.parametrize(
    ("code", "reported", "outcome"),
    [
        (1, ["stopped", "stopped"], "stopped"),  # torchrun replaces 75 by 1
        (1, ["user error", None], "user error"),
        (1, ["diverged", "diverged"], "diverged"),
        (1, ["failed", None], "failed"),
        (0, [None, None], "failed"),  # killed, although the launcher reports success
        (0, ["done", "done"], "done"),
        (2, [], "user error"),
        (75, [], "stopped"),
        (1, [], "failed"),
    ],
)
def test_outcome_of_attempt_prefers_the_ranks_over_the_launcher(
    code: int, reported: list[str | None], outcome: str
) -> None:
    beats = [Beat(rank, 1, "h", 1, 1, 1, "end", 0.0, None, {}, "", outcome=each) for rank, each in enumerate(reported)]
    assert outcome_of_attempt(code, beats) == outcome


def test_run_folder_is_read_from_the_command(tmp_path: Path, config: Path) -> None:
    assert find_run_dir(["deepspeed", "launch/pretrain.py", "--config", str(config)]) == tmp_path / "run"
    elsewhere = f"run_dir={tmp_path}/other"
    assert find_run_dir(["x", "pretrain.py", f"--config={config}", elsewhere]) == tmp_path / "other"
    for command in ([], ["ls"], ["deepspeed", "pretrain.py"], ["deepspeed", "other.py", "--config", str(config)]):
        with pytest.raises(
            UserError, match=r"does not start launch/pretrain.py with a config; after --, give a command such as"
        ):
            find_run_dir(command)
    config.write_text("run_dirr: x")
    with pytest.raises(UserError, match="unknown key; did you mean run_dir"):
        find_run_dir(["pretrain.py", "--config", str(config)])


@pytest.mark.processes
def test_is_alive_is_false_for_zombies() -> None:
    child = subprocess.Popen(["sleep", "30"])
    assert supervisor_module.is_alive(child.pid)
    child.kill()
    deadline = time.monotonic() + 5
    while supervisor_module.is_alive(child.pid):
        assert time.monotonic() < deadline
    child.wait()
    assert not supervisor_module.is_alive(child.pid)
