"""Feeds MLflow from a run's `metrics.jsonl`; started by the tracker as a process of its own.

It remembers the run's id and the last step it sent in `mlflow.json`, so a restarted run goes on as the same MLflow
run with no step doubled. When the store cannot be reached it says so once and keeps trying until training has ended.
"""

import io
import json
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.tracking.tracker import METRICS_FILE, PICTURES_FOLDER, STATE_FILE, step_of

# MLflow's own retries block a call to a dead server for 245.7 s; here the file is the queue, so none is needed.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from PIL import Image

POLL_SECONDS = 1.0
LAST_TRIES = 3
RUNNING = "RUNNING"
SQLITE = "sqlite:///"
MAX_METRICS = 1000
MAX_PARAMS = 100


class Sink:
    """One run in MLflow."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        self.run_dir = run_dir
        self.state: dict[str, Any] = {"uri": uri, "experiment": experiment, "run_id": None}
        self.state |= {"last_step": -1, "last_names": []}  # what was sent last: a step may have several rows
        self.state |= {"pictures": []}  # name and time of each that was sent; one that is drawn anew is sent anew
        if (run_dir / STATE_FILE).exists():
            self.state |= json.loads((run_dir / STATE_FILE).read_text(encoding="utf-8"))
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.offset = 0
        self.started = False
        self.is_new = False

    def push(self) -> None:
        """Send what is new; raises what MLflow raises."""
        if not self.started:
            self._start()
        if self.is_new:  # MLflow refuses a parameter that changes, so a continued run keeps those it began with
            params = [Param(name, value) for name, value in self.params.items()]
            for i in range(0, len(params), MAX_PARAMS):
                self.client.log_batch(self.state["run_id"], params=params[i : i + MAX_PARAMS])
            self.is_new = False
        if self.tags:
            self.client.log_batch(self.state["run_id"], tags=[RunTag(k, v) for k, v in self.tags.items()])
            self.tags = {}
        metrics: list[Metric] = []
        rows = list(_rows(self.run_dir / METRICS_FILE, self.offset))
        for _, row in rows:
            step, at = int(row.pop("step")), int(row.pop("time") * 1000)
            metrics += [Metric(name, value, at, step) for name, value in row.items() if self._is_unsent(step, name)]
        for i in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(self.state["run_id"], metrics=metrics[i : i + MAX_METRICS])
        self.offset = rows[-1][0] if rows else self.offset
        if metrics:
            last_step = max(metric.step for metric in metrics)
            names = {metric.key for metric in metrics if metric.step == last_step}
            before = self.state["last_names"] if last_step == self.state["last_step"] else []
            self._remember(last_step=last_step, last_names=sorted(names.union(before)))

    def push_pictures(self) -> None:
        """Send what was drawn; raises what MLflow raises. Artifacts may be kept elsewhere than metrics are."""
        for picture in sorted((self.run_dir / PICTURES_FOLDER).glob("step-*.png")):
            drawn_at = picture.stat().st_mtime_ns
            if [picture.name, drawn_at] not in self.state["pictures"]:
                with Image.open(picture) as image:
                    self.client.log_image(
                        self.state["run_id"],
                        image,
                        key=PICTURES_FOLDER,
                        step=step_of(picture.name),
                        timestamp=drawn_at // 1_000_000,
                        synchronous=True,
                    )
                self._remember(pictures=[*self.state["pictures"], [picture.name, drawn_at]])

    def _is_unsent(self, step: int, name: str) -> bool:
        last_step: int = self.state["last_step"]
        return step > last_step or (step == last_step and name not in self.state["last_names"])

    def set_status(self, status: str) -> None:
        """Say whether the run is RUNNING, or how it ended."""
        if status == RUNNING:
            self.client.update_run(self.state["run_id"], status)
        else:
            self.client.set_terminated(self.state["run_id"], status)

    def _start(self) -> None:
        """Find or make the store, the experiment and the run."""
        uri = self.state["uri"]
        if uri.startswith(SQLITE):
            _make_store(Path(uri.removeprefix(SQLITE)))
        self.client = MlflowClient(uri)
        if self.state["run_id"] is None:
            experiment = self.client.get_experiment_by_name(self.state["experiment"])
            if experiment is None:
                artifacts = (self.run_dir.parent / "mlartifacts").as_uri() if uri.startswith(SQLITE) else None
                experiment_id = self.client.create_experiment(self.state["experiment"], artifacts)
            else:
                experiment_id = experiment.experiment_id
            run = self.client.create_run(experiment_id, run_name=self.run_dir.name)
            self._remember(run_id=run.info.run_id)
            self.is_new = True
        self.started = True

    def _remember(self, **state: Any) -> None:
        if any(self.state[name] != value for name, value in state.items()):
            self.state |= state
            aside = self.run_dir / (STATE_FILE + ".partial")
            aside.write_text(json.dumps(self.state), encoding="utf-8")
            aside.replace(self.run_dir / STATE_FILE)


def main(run_dir: str, uri: str, experiment: str) -> None:
    """Push once a second until the tracker has closed our input, then a last time."""
    sink = Sink(Path(run_dir), uri, experiment)
    messages = io.FileIO(sys.stdin.fileno(), closefd=False)  # unbuffered: select must see every line
    status: str | None = None  # what is to be said of the run; nothing when only tags are sent
    said: str | None = None
    complaints: set[str] = set()
    open_input, tries = True, LAST_TRIES
    while tries:
        for message in _messages(messages, POLL_SECONDS if open_input else 0):
            if message is None:
                open_input = False
                status = "FAILED" if status == RUNNING else status  # the tracker died without a word
            else:
                sink.params |= message.get("params", {})
                sink.tags |= message.get("tags", {})
                status = message.get("status", status)
                open_input = open_input and status in (None, RUNNING)
        problem = "does not answer"
        try:
            sink.push()
            if status != said:
                sink.set_status(str(status))
                said = status
            problem = "takes no pictures"
            sink.push_pictures()
            if not open_input:
                return
        except Exception as error:  # any failure of a store is survivable: the run's folder has everything
            if problem not in complaints:
                print(f"MLflow at {uri} {problem} ({_first_line(error)}); all is kept in {run_dir}", file=sys.stderr)
                complaints.add(problem)
        tries -= 0 if open_input else 1


def _make_store(path: Path) -> None:
    """Make an SQLite store, if there is none, whole or not at all: MLflow refuses one that was killed in its making."""
    if path.exists():
        return
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    MlflowClient(SQLITE + str(aside))
    try:
        os.link(aside, path)
    except FileExistsError:  # another run has made it meanwhile
        pass
    except OSError:  # a file system without hard links
        aside.replace(path)
    aside.unlink(missing_ok=True)


def _messages(file: io.FileIO, timeout: float) -> Iterator[dict[str, Any] | None]:
    """Yield what the tracker says within the timeout; None once it has closed or died."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([file], [], [], left)
        if ready:
            line = file.readline()
            yield json.loads(line) if line else None
            if not line:
                return


def _rows(path: Path, offset: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the whole lines after `offset`, each with the offset of its end."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, json.loads(line)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


if __name__ == "__main__":
    main(*sys.argv[1:])
