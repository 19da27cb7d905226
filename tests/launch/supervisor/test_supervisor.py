"""`vitrail supervise`: when it starts again, with how many ranks, and what it says of the time."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.supervisor import resources as remains
from launch.supervisor import supervisor as supervise
from launch.supervisor.supervisor import Attempt, Goodput, Supervisor, find_run_dir, outcome_of
from pretrain.errors import UserError
from pretrain.heartbeat.beats import Beat
from pretrain.outcome import Outcome
from tests.support.launching import TINY

# Stands for a rank on another machine: it beats until it is ordered to leave.
ELSEWHERE = """
import json, sys, time
from pathlib import Path
ranks, left = Path(sys.argv[1]), Path(sys.argv[2])
beat = {"rank": 1, "pid": 1, "host": "elsewhere", "turns": 1, "step": 1, "phase": "backward", "since": 0.0}
for beats in range(300):
    text = json.dumps({**beat, "beats": beats, "work": None, "seconds": {}, "stack": ""})
    (ranks / "rank-00001.json").write_text(text)
    if (ranks / "order").read_text() == "leave":
        left.touch()
        break
    time.sleep(0.1)
"""
# Stands for a launcher: exits as the next word of a file says, "save" first puts a checkpoint there.
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
    """Run a plan to its end; return the exit code, the commands' words, and what was said."""
    script = tmp_path / "pretrain.py"
    (tmp_path / "plan").write_text(plan)
    names = {"plan": str(tmp_path / "plan"), "seen": str(tmp_path / "seen"), "run": str(tmp_path / "run")}
    script.write_text(FAKE.format(**names, elsewhere=ELSEWHERE))
    (tmp_path / "run").mkdir()
    said: list[str] = []
    command = [sys.executable, str(script), "--config", str(config), "--num_gpus", "4"]
    code = Supervisor(command, say=said.append, **options).run()
    return code, (tmp_path / "seen").read_text().splitlines(), said


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(supervise.signal, "signal", lambda *_: None)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_what_starting_again_would_not_change_ends_it(tmp_path: Path, config: Path, code: int) -> None:
    ended, seen, _ = supervised(tmp_path, config, f"1 {code}")
    assert (ended, len(seen)) == (code, 2)


def test_it_gives_up_after_some_failures_without_a_checkpoint(tmp_path: Path, config: Path) -> None:
    ended, seen, said = supervised(tmp_path, config, "1 save5 1 1 save9 1 1 1 1 0", max_failures=3, fewer_after=0)
    assert (ended, len(seen)) == (1, 8)
    assert "failed 4 times without a new checkpoint, last with exit code 1" in said
    assert "again in 0 s from step 5" in said[1]
    assert json.loads((tmp_path / "run" / "goodput.json").read_text())["attempts"][-1]["saved_step"] == 9


def test_ranks_on_other_machines_have_left_before_it_starts_again(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "SILENT_SECONDS", 0.5)
    ended, seen, _ = supervised(tmp_path, config, "elsewhere left?", fewer_after=0)
    assert (ended, len(seen)) == (0, 2)
    assert (tmp_path / "run" / "ranks" / "order").read_text() == ""


def test_a_stop_reaches_ranks_on_other_machines(tmp_path: Path, config: Path) -> None:
    ranks = tmp_path / "run" / "ranks"
    ranks.mkdir(parents=True)
    supervisor = Supervisor(["x", "pretrain.py", "--config", str(config)])
    beat = Beat(0, 1, "elsewhere", 1, 1, 1, "forward", 0.0, None, {}, "")
    (ranks / "rank-00000.json").write_text(json.dumps(asdict(beat)))
    supervisor.asked = 1
    supervisor._pass_on()
    assert (ranks / "order").read_text() == "stop"


def test_after_two_failures_it_goes_on_with_one_rank_fewer(tmp_path: Path, config: Path) -> None:
    ended, seen, said = supervised(tmp_path, config, "1 1 1 1 0", max_failures=9)
    assert ended == 0
    assert [line.split()[-1] for line in seen] == ["4", "4", "3", "3", "2"]
    assert "going on with 3 ranks; the global batch stays the same" in said


def test_what_fails_twice_is_started_on_what_still_answers(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remains, "list_gpus", lambda: ([0, 2], [1, 3]))
    _, seen, said = supervised(tmp_path, config, "1 1 save5 1 0", max_failures=9, fewer_after=0)
    assert [line.split()[-1] for line in seen] == ["4", "4", *["localhost:0,2"] * 3]
    assert "GPU 1, 3 does not answer; going on without" in said


def test_the_time_of_all_attempts_is_accounted_for() -> None:
    of_first = {"start": 6.0, "data": 10.0, "forward": 30.0, "backward": 40.0, "save": 2.0}
    of_second = {"start": 4.0, "data": 5.0, "forward": 20.0, "step": 25.0, "evaluate": 1.0}
    first = Attempt(Outcome.FAILED, -9, 100.0, of_first, 0, 50, 40)
    second = Attempt(Outcome.DONE, 0, 60.0, of_second, 40, 100, 100)
    goodput = Goodput([first, second], pauses=4.0)
    shares = goodput.shares()
    assert sum(shares.values()) == pytest.approx(164.0)
    assert shares["lost work"] == pytest.approx(70.0 * 10 / 50)
    assert shares["compute"] == pytest.approx(115.0 - 14.0)
    assert (shares["data wait"], shares["save stall"], shares["evaluation"]) == (15.0, 2.0, 1.0)
    assert shares["first start"] == 18.0
    assert shares["restart"] == pytest.approx(4.0 + 9.0)
    assert goodput.report().startswith("goodput 61.6% of 164 s, 1 restarts: compute 101 s, data wait 15 s, ")


@pytest.mark.parametrize(
    ("code", "said", "outcome"),
    [
        (1, ["stopped", "stopped"], "stopped"),  # torchrun's code for ranks that have left with 75
        (1, ["user error", None], "user error"),
        (1, ["diverged", "diverged"], "diverged"),
        (1, ["failed", None], "failed"),
        (0, [None, None], "failed"),  # killed, whatever the launcher thinks of it
        (0, ["done", "done"], "done"),
        (2, [], "user error"),
        (75, [], "stopped"),
        (1, [], "failed"),
    ],
)
def test_how_it_ended_the_ranks_know_better_than_the_launcher(code: int, said: list[str | None], outcome: str) -> None:
    beats = [Beat(rank, 1, "h", 1, 1, 1, "end", 0.0, None, {}, "", outcome=each) for rank, each in enumerate(said)]
    assert outcome_of(code, beats) == outcome


def test_the_run_folder_is_the_commands(tmp_path: Path, config: Path) -> None:
    assert find_run_dir(["deepspeed", "launch/pretrain.py", "--config", str(config)]) == tmp_path / "run"
    elsewhere = f"run_dir={tmp_path}/other"
    assert find_run_dir(["x", "pretrain.py", f"--config={config}", elsewhere]) == tmp_path / "other"
    for command in ([], ["ls"], ["deepspeed", "pretrain.py"], ["deepspeed", "other.py", "--config", str(config)]):
        with pytest.raises(UserError, match="starts no run; after --, give a command such as"):
            find_run_dir(command)
    config.write_text("run_dirr: x")
    with pytest.raises(UserError, match="unknown key; did you mean run_dir"):
        find_run_dir(["pretrain.py", "--config", str(config)])


def test_it_is_soon_clear_whether_a_process_lives() -> None:
    child = subprocess.Popen(["sleep", "30"])
    assert supervise.is_alive(child.pid)
    child.kill()
    deadline = time.monotonic() + 5
    while supervise.is_alive(child.pid):
        assert time.monotonic() < deadline
    child.wait()
    assert not supervise.is_alive(child.pid)
