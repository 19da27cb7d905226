"""Send a run's `metrics.jsonl` and pictures to MLflow; the tracker starts this module as a separate process.

The sink stores the MLflow run id and the last step it sent in `mlflow.json`, so a resumed run continues the same MLflow
run and sends no step twice. The config decides where: if the store that it names does not have this run in its
experiment, everything is sent there as a new run. If the store cannot be reached, the sink reports it once and keeps
trying until training has ended.

The tracker writes JSON messages to the sink's standard input, one per line: "params" and "tags" to record, the current
"status", and a "final_status" as the last one.
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
from urllib.parse import unquote, urlsplit

from pretrain.errors import first_line
from pretrain.files import atomic_write, partial_path, publish
from pretrain.tracking.tracker import (
    METRICS_FILE,
    PICTURES_FOLDER,
    SINK_STATE_FILE,
    SQLITE,
    picture_step,
    read_sink_state,
)

# MLflow's own retries block a call to a dead server for 245.7 s. They are not needed, because the file is the queue.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from PIL import Image

POLL_SECONDS = 1.0
FINAL_TRIES = 3
RUNNING = "RUNNING"
MAX_METRICS_PER_CALL = 1000
MAX_PARAMS_PER_CALL = 100
MAX_ERROR_LENGTH = 200


class Sink:
    """One run in MLflow, and what has been sent of it.

    Args:
        run_dir: Run folder.
        uri: URI of the MLflow store or server.
        experiment: Name of the MLflow experiment, which is created if it does not exist.
    """

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        self.run_dir = run_dir
        self.params: dict[str, str] = {}  # to send with the next push
        self.tags: dict[str, str] = {}  # to send with the next push
        self.state: dict[str, Any] = {
            "run_dir": str(run_dir.resolve()),  # tells a run folder that was moved from a copy
            "uri": uri,
            "experiment": experiment,
            "run_id": None,
            "last_step": -1,
            "last_names": [],  # metrics of the last step that have been sent: a step may have several rows
            "pictures": [],  # name and modification time of each picture: one that was drawn again is sent again
        }
        self._nothing_sent = dict(self.state)
        stored = read_sink_state(run_dir)
        if not _is_copy(stored, run_dir):
            located = {name: self.state[name] for name in ("run_dir", "uri", "experiment")}
            self.state |= stored | located
        self._offset = 0  # bytes of the metrics file that have been sent
        self._client: MlflowClient | None = None
        self._is_new = False

    @property
    def client(self) -> MlflowClient:
        """The MLflow client; the first access creates the store, the experiment and the run if they do not exist."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def push(self) -> None:
        """Send parameters, tags and metrics that have not been sent; MLflow's errors pass through."""
        client = self.client
        if self._is_new:  # MLflow refuses to change a parameter, so a resumed run keeps those it started with
            params = [Param(name, value) for name, value in self.params.items()]
            for i in range(0, len(params), MAX_PARAMS_PER_CALL):
                client.log_batch(self.state["run_id"], params=params[i : i + MAX_PARAMS_PER_CALL])
            self._is_new = False
        if self.tags:
            client.log_batch(self.state["run_id"], tags=[RunTag(k, v) for k, v in self.tags.items()])
            self.tags = {}
        metrics: list[Metric] = []
        rows = list(_rows_from(self.run_dir / METRICS_FILE, self._offset))
        for _, row in rows:
            step, milliseconds = int(row.pop("step")), int(row.pop("time") * 1000)
            metrics += [
                Metric(name, value, milliseconds, step) for name, value in row.items() if self._is_unsent(step, name)
            ]
        for i in range(0, len(metrics), MAX_METRICS_PER_CALL):
            client.log_batch(self.state["run_id"], metrics=metrics[i : i + MAX_METRICS_PER_CALL])
        self._offset = rows[-1][0] if rows else self._offset
        if metrics:
            last_step = max(metric.step for metric in metrics)
            names = {metric.key for metric in metrics if metric.step == last_step}
            before = self.state["last_names"] if last_step == self.state["last_step"] else []
            self._save_state(last_step=last_step, last_names=sorted(names.union(before)))

    def push_pictures(self) -> None:
        """Send pictures that have not been sent; MLflow's errors pass through.

        This is separate from `push` because a store may keep artifacts in another place than metrics.
        """
        if self.state["pictures"]:
            self._check_artifacts()
        for picture in sorted((self.run_dir / PICTURES_FOLDER).glob("step-*.png")):
            modified_ns = picture.stat().st_mtime_ns
            if [picture.name, modified_ns] not in self.state["pictures"]:
                with Image.open(picture) as image:
                    self.client.log_image(
                        self.state["run_id"],
                        image,
                        key=PICTURES_FOLDER,
                        step=picture_step(picture.name),
                        timestamp=modified_ns // 1_000_000,
                        synchronous=True,
                    )
                self._save_state(pictures=[*self.state["pictures"], [picture.name, modified_ns]])

    def set_status(self, status: str) -> None:
        """Set the run's MLflow status: "RUNNING", or the status with which it ended."""
        if status == RUNNING:
            self.client.update_run(self.state["run_id"], status)
        else:
            self.client.set_terminated(self.state["run_id"], status)

    def _is_unsent(self, step: int, name: str) -> bool:
        last_step: int = self.state["last_step"]
        return step > last_step or (step == last_step and name not in self.state["last_names"])

    def _connect(self) -> MlflowClient:
        """Open the store; create it, the experiment and the run if they do not exist."""
        uri = self.state["uri"]
        if uri.startswith(SQLITE):
            _create_store(Path(uri.removeprefix(SQLITE)))
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(self.state["experiment"])
        if not self._is_run_of(client, experiment):
            self.state = self._nothing_sent
            if experiment is None:
                artifacts = (self.run_dir.parent / "mlartifacts").as_uri() if uri.startswith(SQLITE) else None
                experiment_id = client.create_experiment(self.state["experiment"], artifacts)
            else:
                experiment_id = experiment.experiment_id
            run = client.create_run(experiment_id, run_name=self.run_dir.name)
            self._save_state(run_id=run.info.run_id)
            self._is_new = True
        return client

    def _is_run_of(self, client: MlflowClient, experiment: Experiment | None) -> bool:
        """Return whether the store has the run, in the right experiment."""
        if self.state["run_id"] is None or experiment is None:
            return False
        try:
            run = client.get_run(self.state["run_id"])
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return False
            raise
        return bool(run.info.experiment_id == experiment.experiment_id and run.info.lifecycle_stage == "active")

    def _check_artifacts(self) -> None:
        """Check that the folder with the earlier pictures is still there; a store that was moved names the old one."""
        uri = self.client.get_run(self.state["run_id"]).info.artifact_uri
        if uri.startswith("file:") and not (folder := Path(unquote(urlsplit(uri).path))).exists():
            raise FileNotFoundError(f"the store keeps them in {folder}, which is gone")

    def _save_state(self, **state: Any) -> None:
        if any(self.state[name] != value for name, value in state.items()):
            self.state |= state
            atomic_write(self.run_dir / SINK_STATE_FILE, json.dumps(self.state), durable=False)


def main(run_dir: str, uri: str, experiment: str) -> None:
    """Send what the tracker that started this process writes."""
    serve(Sink(Path(run_dir), uri, experiment), io.FileIO(sys.stdin.fileno(), closefd=False))


def serve(sink: Sink, messages: io.FileIO) -> None:
    """Send new rows and pictures every second, and a last time after the tracker has finished or died.

    Args:
        sink: Run to send.
        messages: The tracker's messages; unbuffered, so that `select` sees every line.
    """
    status: str | None = None  # stays None if only tags are sent
    status_in_mlflow: str | None = None
    reported: set[str] = set()
    is_open, tries_left = True, FINAL_TRIES
    while tries_left:
        for message in _read_messages(messages, POLL_SECONDS if is_open else 0):
            if message is None:  # the input was closed; without a final status the tracker has died
                status = "FAILED" if is_open and status == RUNNING else status
                is_open = False
            else:
                sink.params |= message.get("params", {})
                sink.tags |= message.get("tags", {})
                status = message.get("final_status", message.get("status", status))
                is_open = is_open and "final_status" not in message
        problem = "cannot be reached"
        try:
            sink.push()
            if status is not None and status != status_in_mlflow:
                sink.set_status(status)
                status_in_mlflow = status
            problem = "does not accept pictures"
            sink.push_pictures()
            if not is_open:
                return
        except Exception as error:  # training must survive any failure of the store; the run folder has all data
            if problem not in reported:
                reason = first_line(error)[:MAX_ERROR_LENGTH]
                where = f"MLflow at {sink.state['uri']} {problem}"
                print(f"{where} ({reason}); all data is kept in {sink.run_dir}", file=sys.stderr)
                reported.add(problem)
        tries_left -= 0 if is_open else 1


def _is_copy(state: dict[str, Any], run_dir: Path) -> bool:
    """Return whether a run folder is a copy of another one that still has the same MLflow run."""
    original = Path(state.get("run_dir", run_dir))
    is_elsewhere = original.exists() and not original.samefile(run_dir)
    return is_elsewhere and read_sink_state(original).get("run_id") == state["run_id"]


def _create_store(path: Path) -> None:
    """Create an SQLite store if there is none.

    The store is created under another name and linked into place once it is complete, because MLflow refuses a store
    whose creation was interrupted, and several runs may create it at the same time.
    """
    if path.exists():
        return
    partial = partial_path(path.with_name(f"{path.name}.{os.getpid()}"))
    MlflowClient(SQLITE + str(partial))
    try:
        os.link(partial, path)
    except FileExistsError:  # another run has created it in the meantime
        pass
    except OSError:  # the file system has no hard links
        publish(partial, path, durable=False)
    partial.unlink(missing_ok=True)


def _read_messages(file: io.FileIO, timeout_seconds: float) -> Iterator[dict[str, Any] | None]:
    """Yield the tracker's messages until the timeout; None once the tracker has closed the input or died."""
    deadline = time.monotonic() + timeout_seconds
    while (seconds_left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([file], [], [], seconds_left)
        if ready:
            line = file.readline()
            yield json.loads(line) if line else None
            if not line:
                return


def _rows_from(path: Path, offset: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield each complete line after byte `offset` as a row, with the byte offset of its end."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, json.loads(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
