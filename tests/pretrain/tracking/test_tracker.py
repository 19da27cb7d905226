"""Tracking: the local file first, then MLflow. A resumed run stays one run; a dead server costs no time and no row."""

import io
import json
import os
import shutil
import socket
import sqlite3
import subprocess
from pathlib import Path
from threading import Thread

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pretrain.config import TrackingConfig
from pretrain.errors import MachineError
from pretrain.journal import read_rows
from pretrain.tracking.mlflow_sink import Sink, serve
from pretrain.tracking.tracker import ROOT, RunDescription, Tracker, default_uri, git_commit, picture_name, tag_run
from tests.support.disk import full_disk
from tests.support.launching import wait_for

PARAMS = {"seed": 1, "model.hidden_size": 32}
DESCRIPTION = RunDescription("pretrain", data_digest="d1", config_text="seed: 1\n", params=PARAMS)


def start_tracker(run_dir: Path, uri: str | None = None, resume_step: int = 0, enabled: bool = True) -> Tracker:
    config = TrackingConfig(uri=uri, experiment="test")
    return Tracker(run_dir, config, DESCRIPTION, resume_step=resume_step, enabled=enabled)


def track(
    run_dir: Path,
    uri: str | None = None,
    resume_step: int = 0,
    steps: tuple[int, ...] = (),
    grayscale: int | None = None,
    status: str = "FINISHED",
) -> str:
    """Track a short run with a loss of 1 / step and, with `grayscale`, a picture of that color at each step."""
    with start_tracker(run_dir, uri, resume_step) as tracker:
        for step in steps:
            tracker.log({"train/loss": 1.0 / step}, step)
            if grayscale is not None:
                path = run_dir / "pictures" / picture_name(step)
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (4, 4), (grayscale,) * 3).save(path)
        tracker.finish(status)
    return default_uri(run_dir)


class SinkInThread:
    """Stands for the sink's process: importing MLflow again takes seconds."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        reading, writing = os.pipe()
        self.stdin = os.fdopen(writing, "w")
        self._thread = Thread(target=serve, args=(Sink(run_dir, uri, experiment), io.FileIO(reading)), daemon=True)
        self._thread.start()

    def communicate(self, timeout: float) -> None:
        self.stdin.close()
        self._thread.join(timeout)
        assert not self._thread.is_alive()


@pytest.fixture
def in_thread(monkeypatch: pytest.MonkeyPatch, stores: None) -> None:
    """Let the tracker start a thread instead of a process."""
    monkeypatch.setattr("pretrain.tracking.tracker._start_sink", SinkInThread)


def only_run(uri: str) -> Run:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    return run


@pytest.mark.processes
def test_a_resumed_run_is_one_mlflow_run_without_repeated_steps(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    uri = track(run_dir, steps=(10, 20, 30))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    track(run_dir, steps=(30, 40), resume_step=20)  # it had stopped after step 30 and resumes from a checkpoint at 20

    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [10, 20, 30, 40]
    assert (run_dir / "config.yaml").read_text() == "seed: 1\n"
    run = only_run(uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert run.data.params == {"seed": "1", "model.hidden_size": "32"}
    assert run.data.tags["stage"] == "pretrain"
    assert run.data.tags["data_digest"] == "d1"
    assert run.data.tags["git_commit"] == git_commit()
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in (10, 20, 30, 40)]


@pytest.mark.processes
def test_rows_before_the_resume_step_are_kept(tmp_path: Path) -> None:
    track(tmp_path / "a", uri="off", steps=(10, 20, 30))
    tracker = start_tracker(tmp_path / "a", "off", resume_step=20)
    assert [row["step"] for row in tracker.kept_rows] == [10, 20]
    assert start_tracker(tmp_path / "a", "off", resume_step=20, enabled=False).kept_rows == []


@pytest.mark.slow
@pytest.mark.usefixtures("in_thread")
def test_each_picture_is_sent_once_at_its_step(tmp_path: Path) -> None:
    """A picture that is drawn again is sent again; pictures after the resume step are removed."""
    run_dir = tmp_path / "runs" / "a"
    track(run_dir, steps=(10, 20, 30), grayscale=1)
    (run_dir / "pictures" / "step-00000020.partial").write_bytes(b"half")
    uri = track(run_dir, steps=(20,), resume_step=10, grayscale=2)
    run, client = only_run(uri), MlflowClient(uri)
    assert run.data.tags["mlflow.loggedImages"] == "True"  # MLflow shows logged images with a slider over the steps
    sent = sorted(
        (
            int(file.path.split("+")[2]),
            Image.open(client.download_artifacts(run.info.run_id, file.path)).getpixel((0, 0)),
        )
        for file in client.list_artifacts(run.info.run_id, "images")
        if file.path.endswith(".png")
    )
    assert sent == [(step, (grayscale,) * 3) for step, grayscale in ((10, 1), (20, 1), (20, 2), (30, 1))]
    assert sorted(path.name for path in (run_dir / "pictures").glob("*.png")) == [picture_name(10), picture_name(20)]
    names = [name for name, _ in json.loads((run_dir / "mlflow.json").read_text())["pictures"]]
    assert names == [picture_name(step) for step in (10, 20, 30, 20)]


@pytest.mark.slow
@pytest.mark.usefixtures("stores")
def test_a_step_may_have_several_rows_that_are_written_at_different_times(tmp_path: Path) -> None:
    """Training and validation log rows at one step; a push or a crash between them loses no value."""
    run_dir = tmp_path / "a"
    run_dir.mkdir()
    file = run_dir / "metrics.jsonl"
    sink = Sink(run_dir, default_uri(run_dir), "test")
    rows = [{"train/loss": 3.0}, {"validation/loss": 4.0}, {"validation/top1": 0.5}]
    for i, row in enumerate(rows):
        with file.open("a") as open_file:
            open_file.write(json.dumps({"step": 7, "time": 1.0, **row}) + "\n")
        sink.push()
        if i == 1:
            sink = Sink(run_dir, default_uri(run_dir), "test")  # as after a crash: it reads the file from the start
            sink.push()
    run = only_run(default_uri(run_dir))
    client = MlflowClient(default_uri(run_dir))
    for name, value in {"train/loss": 3.0, "validation/loss": 4.0, "validation/top1": 0.5}.items():
        assert [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)] == [(7, value)]


def test_an_incomplete_last_line_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    assert read_rows(tmp_path / "none") == []


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError, "FAILED"), (KeyboardInterrupt, "KILLED")])
@pytest.mark.usefixtures("in_thread")
def test_an_exception_decides_the_status(
    tmp_path: Path, error: type[BaseException], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.tracking.tracker.STOP_TIMEOUT_SECONDS", 600.0)  # the machine may be busy
    with pytest.raises(error), start_tracker(tmp_path / "runs" / "a"):
        raise error
    assert only_run(default_uri(tmp_path / "runs" / "a")).info.status == status


@pytest.mark.slow
@pytest.mark.parametrize("status", ["KILLED", "RUNNING"])
@pytest.mark.usefixtures("in_thread")
def test_mlflow_shows_the_status_with_which_a_run_finished(tmp_path: Path, status: str) -> None:
    """A run that is about to roll back finishes as RUNNING, which is not the end of the MLflow run."""
    run = only_run(track(tmp_path / "runs" / "a", steps=(1,), status=status))
    assert (run.info.status, run.info.end_time is None) == (status, status == "RUNNING")


@pytest.mark.processes
@pytest.mark.usefixtures("stores")
def test_a_run_whose_process_died_has_failed_and_can_still_be_tagged(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    tracker = start_tracker(run_dir)
    tracker.log({"train/loss": 1.0}, 1)
    assert tracker.sink is not None
    tracker.sink.communicate(timeout=600)  # its input ends without a final status, as when the process is killed
    assert only_run(default_uri(run_dir)).info.status == "FAILED"
    tag_run(run_dir, {"exported_folder": "/x"})
    run = only_run(default_uri(run_dir))
    assert (run.info.status, run.data.tags["exported_folder"]) == ("FAILED", "/x")
    tag_run(tmp_path / "runs" / "untracked", {"a": "b"})


@pytest.mark.processes
def test_concurrent_or_killed_runs_leave_no_incomplete_store(tmp_path: Path) -> None:
    """Three runs create the store at the same time, and one of them is killed while it does."""
    run_dirs = [tmp_path / "runs" / name for name in "abc"]
    trackers = [start_tracker(folder) for folder in run_dirs]
    killed = trackers[0].sink
    assert killed is not None
    partial = tmp_path / "runs" / f"mlflow.db.{killed.pid}.partial"
    wait_for(lambda: partial.exists() and partial.stat().st_size > 0)
    killed.kill()
    for tracker in trackers[1:]:
        tracker.finish("FINISHED")
    track(run_dirs[0], steps=(1,))
    client = MlflowClient(default_uri(run_dirs[0]))
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == ["a", "b", "c"]
    assert list((tmp_path / "runs").glob("*.partial")) == [partial]


@pytest.mark.processes
@pytest.mark.usefixtures("stores")
def test_the_store_of_an_older_mlflow_is_not_changed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    track(tmp_path / "a")
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        store.execute("UPDATE alembic_version SET version_num = '75868b020152'")
    before = (tmp_path / "mlflow.db").read_bytes()
    track(tmp_path / "b", steps=(1,))
    printed = capfd.readouterr().err
    assert printed.count("cannot be reached (Detected out-of-date database schema") == 1
    assert "Traceback" not in printed
    assert (tmp_path / "mlflow.db").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("in_thread")
def test_a_new_run_in_an_old_folder_is_a_new_mlflow_run(tmp_path: Path) -> None:
    uri = track(tmp_path / "runs" / "a", steps=(10, 20))
    track(tmp_path / "runs" / "a", steps=(5,))
    assert [row["step"] for row in read_rows(tmp_path / "runs" / "a" / "metrics.jsonl")] == [5]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    histories = [
        [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        for run in client.search_runs([experiment.experiment_id])
    ]
    assert sorted(histories) == [[5], [10, 20]]


def histories(uri: str, experiment: str = "test") -> dict[str, list[int]]:
    """Return the steps of each run of an experiment, by the name of the run."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return {
        f"{run.info.run_name} {run.info.run_id}": [
            point.step for point in client.get_metric_history(run.info.run_id, "train/loss")
        ]
        for run in client.search_runs([found.experiment_id])
    }


@pytest.mark.slow
@pytest.mark.usefixtures("in_thread")
def test_a_changed_uri_or_experiment_counts_on_resume(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are sent to the other place, where the run is a new one."""
    run_dir = tmp_path / "runs" / "a"
    first = track(run_dir, steps=(10, 20))
    shutil.copy(empty_store, tmp_path / "team.db")
    second = f"sqlite:///{tmp_path}/team.db"
    track(run_dir, uri=second, resume_step=20, steps=(30,))
    assert [*histories(second).values()] == [[10, 20, 30]]
    assert [*histories(first).values()] == [[10, 20]]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the team")
    with Tracker(run_dir, TrackingConfig(uri=second), DESCRIPTION, resume_step=30) as tracker:
        tracker.log({"train/loss": 0.1}, 40)
        tracker.finish("FINISHED")
    assert [*histories(second, "of the team").values()] == [[10, 20, 30, 40]]
    assert json.loads((run_dir / "mlflow.json").read_text())["uri"] == second


@pytest.mark.slow
@pytest.mark.usefixtures("in_thread")
def test_a_moved_run_goes_on_in_the_store_that_moved_with_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    track(tmp_path / "runs" / "a", steps=(10, 20), grayscale=1)
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    run_dir = tmp_path / "moved" / "a"
    tag_run(run_dir, {"exported_folder": "/x"})
    uri = track(run_dir, resume_step=20, steps=(30,), grayscale=2)
    assert uri == f"sqlite:///{tmp_path}/moved/mlflow.db"
    assert [*histories(uri).values()] == [[10, 20, 30]]
    assert only_run(uri).data.tags["exported_folder"] == "/x"
    assert not (tmp_path / "runs").exists()
    gone = f"does not accept pictures (the store keeps them in {tmp_path}/runs/mlartifacts/"
    assert gone in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("in_thread")
def test_a_copied_run_is_another_mlflow_run(tmp_path: Path) -> None:
    uri = track(tmp_path / "runs" / "a", steps=(10, 20))
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    track(tmp_path / "runs" / "b", resume_step=20, steps=(30,))
    track(tmp_path / "runs" / "b", resume_step=30, steps=(40,))
    track(tmp_path / "runs" / "a", resume_step=20, steps=(25,))
    found = {name.split()[0]: steps for name, steps in histories(uri).items()}
    assert found == {"a": [10, 20, 25], "b": [10, 20, 30, 40]}
    assert len(histories(uri)) == 2


@pytest.mark.usefixtures("in_thread")
def test_variables_that_mlflow_would_obey_are_not_ignored_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    track(tmp_path / "runs" / "a", steps=(1,))
    assert (
        "MLFLOW_RUN_ID is set but not used; MLflow's run and experiment come from mlflow.json in the run folder, "
        "tracking.experiment and MLFLOW_EXPERIMENT_NAME\n"
    ) in capfd.readouterr().err


@pytest.mark.processes
@pytest.mark.timeout(120)  # MLflow's own client would wait 245.7 s for the first of these rows
def test_a_dead_server_costs_no_time_and_no_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tracker = start_tracker(tmp_path / "a", f"http://127.0.0.1:{port}")
    for step in range(200):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish("FINISHED")
    assert len(read_rows(tmp_path / "a" / "metrics.jsonl")) == 200
    assert capfd.readouterr().err.count("cannot be reached") == 1


@pytest.mark.processes
def test_a_sink_that_is_too_slow_is_killed_after_the_timeout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = start_tracker(tmp_path / "a")
    tracker.finish("FINISHED", timeout_seconds=0)
    assert tracker.sink is not None
    assert tracker.sink.wait(timeout=600) == -9
    path = tmp_path / "a" / "metrics.jsonl"
    assert f"MLflow: not all metrics arrived in time; every row is in {path}" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("in_thread")
def test_a_store_that_cannot_store_pictures_gets_everything_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no folder").touch()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(uri).create_experiment("test", (tmp_path / "no folder").as_uri())
    capfd.readouterr()
    track(tmp_path / "a", uri=uri, steps=(1, 2), grayscale=1)
    run = only_run(uri)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == 0.5
    printed = capfd.readouterr().err
    assert printed.count("does not accept pictures") == 1
    assert "cannot be reached" not in printed


@pytest.mark.processes
def test_mlflow_can_be_turned_off(tmp_path: Path) -> None:
    track(tmp_path / "off" / "a", uri="off", steps=(1,))
    assert sorted(path.name for path in (tmp_path / "off").iterdir()) == ["a"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with start_tracker(tmp_path / "b", enabled=False) as tracker:
        tracker.log({"train/loss": 1.0}, 1)
        tracker.tag({"a": "b"})
        assert tracker.mlflow_run_id() is None
        tracker.finish("FINISHED")
    assert not (tmp_path / "b").exists()


def test_git_commit_is_the_head_of_this_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert git_commit().removesuffix("-dirty") == head.stdout.strip()


def test_a_full_disk_before_the_first_step_is_named(tmp_path: Path) -> None:
    sentence = rf"^{tmp_path}/run: cannot be written \(File too large\); free disk space or choose another run_dir$"
    with full_disk(3), pytest.raises(MachineError, match=sentence):
        start_tracker(tmp_path / "run", "off")
