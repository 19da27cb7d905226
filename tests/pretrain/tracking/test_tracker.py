"""Tracking: the file first, MLflow after; resumed runs stay one run; a dead server costs nothing."""

import json
import socket
import sqlite3
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pretrain.journal import read_rows
from pretrain.tracking.mlflow_sink import Sink
from pretrain.tracking.progress import ProgressLine, duration
from pretrain.tracking.tracker import ROOT, Tracker, default_uri, git_commit, picture_name, tag_run
from tests.support.launching import wait_for


def track(
    run_dir: Path,
    uri: str | None = None,
    resume_step: int = 0,
    steps: tuple[int, ...] = (),
    grayscale: int | None = None,
) -> str:
    tracker = Tracker(
        run_dir,
        uri=uri,
        experiment="test",
        config_text="seed: 1\n",
        params={"seed": 1, "model.hidden_size": 32},
        tags={"stage": "pretrain"},
        resume_step=resume_step,
    )
    with tracker:
        for step in steps:
            tracker.log({"train/loss": 1.0 / step}, step)
            if grayscale is not None:
                path = run_dir / "pictures" / picture_name(step)
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (4, 4), (grayscale,) * 3).save(path)
        tracker.status = "FINISHED"
    return default_uri(run_dir)


def only_run(uri: str) -> Run:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    return run


def test_a_resumed_run_is_one_run_with_no_step_doubled(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    uri = track(run_dir, steps=(10, 20, 30))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    track(run_dir, steps=(30, 40), resume_step=20)  # it had died after 30 and continues from a checkpoint at 20

    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [10, 20, 30, 40]
    run = only_run(uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert run.data.params == {"seed": "1", "model.hidden_size": "32"}
    assert run.data.tags["stage"] == "pretrain"
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in (10, 20, 30, 40)]


def test_each_picture_is_sent_once_at_its_step(tmp_path: Path) -> None:
    """Also one that is drawn anew, since its first time did not last; what did not last and is not is gone."""
    run_dir = tmp_path / "runs" / "a"
    track(run_dir, steps=(10, 20, 30), grayscale=1)
    (run_dir / "pictures" / "step-00000020.partial").write_bytes(b"half")
    uri = track(run_dir, steps=(20,), resume_step=10, grayscale=2)
    run, client = only_run(uri), MlflowClient(uri)
    assert run.data.tags["mlflow.loggedImages"] == "True"  # so its interface shows them, with a slider over the steps
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


def test_a_step_may_have_two_rows_that_come_apart(tmp_path: Path) -> None:
    """Training and validation at one step: what was sent in between, or before a crash, costs neither a point."""
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
            sink = Sink(run_dir, default_uri(run_dir), "test")  # as after a crash: it reads the file anew
            sink.push()
    run = only_run(default_uri(run_dir))
    client = MlflowClient(default_uri(run_dir))
    for name, value in {"train/loss": 3.0, "validation/loss": 4.0, "validation/top1": 0.5}.items():
        assert [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)] == [(7, value)]


def test_a_row_of_a_crash_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    assert read_rows(tmp_path / "none") == []


def test_an_exception_marks_the_run_as_failed(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "r" / "a", uri=None, experiment="test", config_text="", params={}, tags={})
    with pytest.raises(ZeroDivisionError), tracker:
        raise ZeroDivisionError
    assert only_run(default_uri(tmp_path / "r" / "a")).info.status == "FAILED"


def test_a_killed_run_has_failed_and_tags_can_follow(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    tracker = Tracker(run_dir, uri=None, experiment="test", config_text="", params={}, tags={})
    tracker.log({"train/loss": 1.0}, 1)
    assert tracker.sink is not None
    tracker.sink.communicate(timeout=60)  # its input ends without a status, as when the process is killed
    assert only_run(default_uri(run_dir)).info.status == "FAILED"
    tag_run(run_dir, {"exported_folder": "/x"})
    run = only_run(default_uri(run_dir))
    assert (run.info.status, run.data.tags["exported_folder"]) == ("FAILED", "/x")
    tag_run(tmp_path / "runs" / "untracked", {"a": "b"})


def test_a_store_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """Runs begin at the same moment, where there is no store yet; one is killed while it makes it."""
    run_dirs = [tmp_path / "runs" / name for name in "abc"]
    trackers = [Tracker(folder, uri=None, experiment="test", config_text="", params={}, tags={}) for folder in run_dirs]
    killed = trackers[0].sink
    assert killed is not None
    aside = tmp_path / "runs" / f"mlflow.db.{killed.pid}.partial"
    wait_for(lambda: aside.exists() and aside.stat().st_size > 0)
    killed.kill()
    for tracker in trackers[1:]:
        tracker.close()
    track(run_dirs[0], steps=(1,))
    client = MlflowClient(default_uri(run_dirs[0]))
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == ["a", "b", "c"]
    assert list((tmp_path / "runs").glob("*.partial")) == [aside]


def test_an_older_mlflows_store_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    track(tmp_path / "a")
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        store.execute("UPDATE alembic_version SET version_num = '75868b020152'")
    before = (tmp_path / "mlflow.db").read_bytes()
    track(tmp_path / "b", steps=(1,))
    said = capfd.readouterr().err
    assert said.count("does not answer (Detected out-of-date database schema") == 1
    assert "Traceback" not in said
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_a_new_run_in_an_old_folder_is_a_new_run(tmp_path: Path) -> None:
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


@pytest.mark.timeout(120)  # MLflow's own client would wait 245.7 s for the first of these rows
def test_a_dead_server_costs_no_time_and_no_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tracker = Tracker(
        tmp_path / "a", uri=f"http://127.0.0.1:{port}", experiment="test", config_text="", params={}, tags={}
    )
    for step in range(200):
        tracker.log({"train/loss": 1.0}, step)
    tracker.close()
    assert len(read_rows(tmp_path / "a" / "metrics.jsonl")) == 200
    assert capfd.readouterr().err.count("does not answer") == 1


def test_a_store_without_room_for_pictures_has_everything_else(
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
    said = capfd.readouterr().err
    assert said.count("takes no pictures") == 1
    assert "does not answer" not in said


def test_mlflow_can_be_off_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    track(tmp_path / "off" / "a", uri="off", steps=(1,))
    assert sorted(path.name for path in (tmp_path / "off").iterdir()) == ["a"]
    other = Tracker(tmp_path / "b", uri=None, experiment="x", config_text="", params={}, tags={}, enabled=False)
    with other:
        other.log({"train/loss": 1.0}, 1)
        other.tag(a="b")
    assert not (tmp_path / "b").exists()


def test_the_commit_is_named() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert git_commit().removesuffix("-dirty") == head.stdout.strip()


def test_the_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(100, 10, enabled=True)
    line.show({"train/loss": 0.51234, "speed/images_per_second": 812.4, "data/wait_fraction": 0.034}, 100)
    assert capsys.readouterr().out == ("step 100/100  loss 0.5123  812 images/s  waiting for data 3%  ETA 0:00:00\n")
    ProgressLine(100, 10, enabled=False).note("silent")
    assert capsys.readouterr().out == ""
    assert duration(3_725.4) == "1:02:05"
    assert duration(90_000.0) == "1 day, 1:00:00"
