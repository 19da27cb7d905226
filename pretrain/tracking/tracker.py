"""Write a run's metrics to `metrics.jsonl` in its run folder; a separate process sends them to MLflow.

Training never waits for MLflow: a slow, unreachable or missing server costs no time and no row, and this module does
not import mlflow.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from pretrain.config import TrackingConfig
from pretrain.errors import MachineError
from pretrain.journal import Journal, Row

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
PICTURES_FOLDER = "pictures"  # contains step-*.png
SINK_STATE_FILE = "mlflow.json"  # written by the sink: where the run is tracked and what has been sent
SQLITE = "sqlite:///"
DEFAULT_EXPERIMENT = "vitrail"
UNUSED_VARIABLES = {"MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"}  # MLflow's own functions would obey them
CHOICES = "mlflow.json in the run folder, tracking.experiment and MLFLOW_EXPERIMENT_NAME"
SINK_MODULE = "pretrain.tracking.mlflow_sink"
SINK_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 10.0  # a launcher waits 30 s for a process that it has asked to stop
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RunDescription:
    """What is recorded about a run as a whole.

    Args:
        stage: "pretrain" or "finetune".
        data_digest: Digest of the training set.
        config_text: Resolved config as YAML, saved next to the metrics.
        params: Config values by dotted key, recorded as MLflow parameters.
    """

    stage: str
    data_digest: str
    config_text: str
    params: Mapping[str, object]

    @property
    def tags(self) -> dict[str, str]:
        """MLflow tags of the run."""
        return {"stage": self.stage, "git_commit": git_commit(), "data_digest": self.data_digest}


class Tracker:
    """Log the metrics of a run.

    A run that leaves the `with` block without `finish` is recorded as failed, or as killed after a KeyboardInterrupt.

    Args:
        run_dir: Run folder.
        config: MLflow store and experiment; the uri "off" turns MLflow off, None selects SQLite next to the run folder.
        description: Facts about the run as a whole.
        resume_step: Step at which the run resumes. Rows and pictures of later steps are removed, because these steps
            will be repeated.
        enabled: Whether this process tracks the run; only the main rank does. Otherwise every method is a no-op.

    Raises:
        MachineError: If the run folder cannot be written, for example because the disk is full.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        description: RunDescription,
        *,
        resume_step: int = 0,
        enabled: bool = True,
    ) -> None:
        self.run_dir = run_dir
        self.enabled = enabled
        self.kept_rows: list[Row] = []  # logged before the run resumed
        self._finished = not enabled
        self.sink: subprocess.Popen[str] | None = None
        if not enabled:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / CONFIG_FILE).write_text(description.config_text, encoding="utf-8")
            self._journal = Journal(run_dir / METRICS_FILE, lambda row: row["step"] <= resume_step, writes=True)
            self._journal.path.touch()
        except OSError as error:
            raise MachineError(
                f"{run_dir}: cannot be written ({error.strerror}); free disk space or choose another run_dir"
            ) from None
        self.kept_rows = self._journal.kept
        _remove_pictures_after(run_dir, resume_step)
        if not resume_step:
            (run_dir / SINK_STATE_FILE).unlink(missing_ok=True)  # a new run, even if the folder contains an older one
        if config.uri != "off":
            self.sink = _start_sink(
                run_dir, config.uri or default_uri(run_dir), config.experiment or default_experiment()
            )
            for name in UNUSED_VARIABLES & os.environ.keys():
                print(f"{name} is set but not used; MLflow's run and experiment come from {CHOICES}", file=sys.stderr)
        self._send(status="RUNNING")
        self._send(params={name: str(value) for name, value in description.params.items()})
        self._send(tags=description.tags)

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Append a row of metrics."""
        if self.enabled:
            self._journal.add([{"step": step, "time": round(time.time(), 3), **row}])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set MLflow tags of the run."""
        self._send(tags=dict(tags))

    def mlflow_run_id(self) -> str | None:
        """Return the run's MLflow id, or None as long as MLflow has not assigned one."""
        return read_sink_state(self.run_dir).get("run_id") if self.enabled else None

    def finish(self, status: str, timeout_seconds: float | None = None) -> None:
        """Record how the run ended, and wait until MLflow has received all rows.

        Args:
            status: MLflow run status: "FINISHED", "KILLED", "FAILED", or "RUNNING" if the run is about to be resumed.
            timeout_seconds: Longest time to wait for MLflow; None waits 60 s.
        """
        if self._finished:
            return
        self._finished = True
        self._journal.add([])  # rows that are still waiting for disk space
        self._send(final_status=status)
        if self.sink is None:
            return
        try:
            self.sink.communicate(timeout=SINK_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds)
        except subprocess.TimeoutExpired:
            self.sink.kill()
            print(f"MLflow: not all metrics arrived in time; every row is in {self._journal.path}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is KeyboardInterrupt:
            self.finish("KILLED", STOP_TIMEOUT_SECONDS)
        else:
            self.finish("FAILED")

    def _send(self, **message: str | dict[str, str]) -> None:
        if self.sink is not None:
            _send(self.sink, message)


def tag_run(run_dir: Path, tags: Mapping[str, str], timeout_seconds: float = 60) -> None:
    """Set MLflow tags of a run that has ended; a no-op if the run was not tracked in MLflow."""
    if state := read_sink_state(run_dir):
        uri = state["uri"]
        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
            uri = local_uri(run_dir)  # the run folder was moved together with its store
        sink = _start_sink(run_dir, uri, state["experiment"])
        _send(sink, {"tags": dict(tags)})
        with contextlib.suppress(subprocess.TimeoutExpired):
            sink.communicate(timeout=timeout_seconds)


def read_sink_state(run_dir: Path) -> dict[str, Any]:
    """Return where a run is tracked: MLflow's "uri", "experiment" and "run_id"; empty if the run is not tracked."""
    path = run_dir / SINK_STATE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def picture_name(step: int) -> str:
    """Return the file name of a step's picture; the names sort in the order of the steps."""
    return f"step-{step:08d}.png"


def picture_step(name: str) -> int:
    """Return the step that a picture's file name contains."""
    return int(name.removeprefix("step-").removesuffix(".png"))


def default_uri(run_dir: Path) -> str:
    """Return MLFLOW_TRACKING_URI if it is set, else that of the SQLite store next to the run folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or local_uri(run_dir)


def local_uri(run_dir: Path) -> str:
    """Return the URI of the SQLite store next to the run folder."""
    return f"{SQLITE}{run_dir.resolve().parent / 'mlflow.db'}"


def default_experiment() -> str:
    """Return MLFLOW_EXPERIMENT_NAME if it is set, else the name that all runs share by default."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def records_of(run_dir: Path, config: TrackingConfig) -> dict[str, str]:
    """Return where to look at what a run has recorded: its files, and MLflow's address or the command that opens it."""
    records = {"metrics": str(run_dir / METRICS_FILE)}
    if (run_dir / PICTURES_FOLDER).exists():
        records["pictures"] = str(run_dir / PICTURES_FOLDER)
    uri = config.uri or default_uri(run_dir)
    if uri.startswith(("http://", "https://")):
        records["MLflow"] = uri
    elif uri != "off":
        records["MLflow"] = f"{shlex.join(['mlflow', 'ui', '--backend-store-uri', uri])}  # http://127.0.0.1:5000"
    return records


def git_commit() -> str:
    """Return the commit of this code, with "-dirty" if it was modified; "unknown" outside a git repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _remove_pictures_after(run_dir: Path, step: int) -> None:
    for picture in (run_dir / PICTURES_FOLDER).glob("step-*.png"):
        if picture_step(picture.name) > step:
            picture.unlink()


def _send(sink: "subprocess.Popen[str]", message: Mapping[str, str | dict[str, str]]) -> None:
    """Send the sink a message; a sink that has died has printed the reason itself, and no row is lost."""
    assert sink.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        sink.stdin.write(json.dumps(message) + "\n")
        sink.stdin.flush()


def _start_sink(run_dir: Path, uri: str, experiment: str) -> "subprocess.Popen[str]":
    """Start the process that sends metrics to MLflow; it ends with its input, not by a launcher's signal."""
    scheme, slashes, path = uri.partition(":///")
    if scheme == "sqlite":
        uri = scheme + slashes + str(Path(path).resolve())
    command = [sys.executable, "-m", SINK_MODULE, str(run_dir.resolve()), uri, experiment]
    # The new process inherits the mask, so it never receives these signals. A `preexec_fn` would need a fork of this
    # process, which can deadlock because other threads are running.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
