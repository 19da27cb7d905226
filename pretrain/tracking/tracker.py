"""Metrics go to `metrics.jsonl` in the run folder first. MLflow is fed from that file by a process of its own.

So a slow, dead or missing MLflow costs training nothing, and nothing of it is imported here.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import Self

from pretrain.journal import Journal

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
PICTURES_FOLDER = "pictures"  # step-*.png
STATE_FILE = "mlflow.json"  # written by the sink: where the run is tracked
SINK = "pretrain.tracking.mlflow_sink"
ROOT = Path(__file__).resolve().parents[2]


class Tracker:
    """Writes a run's rows. A rank other than the main one has none: it passes `enabled=False` and nothing happens."""

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str | None,
        experiment: str,
        config_text: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        resume_step: int = 0,
        enabled: bool = True,
    ) -> None:
        """Start tracking.

        Args:
            run_dir: the run's folder.
            uri: of the MLflow store; None for SQLite beside the run folder, "off" for no MLflow.
            experiment: MLflow's name for runs that belong together.
            config_text: the resolved config, saved beside the metrics.
            params: the config's values by dotted key, for MLflow.
            tags: what else MLflow should know, such as the stage and the git commit.
            resume_step: rows and pictures after this step are of a past that did not last; they are taken out.
            enabled: whether this process tracks at all.
        """
        self.enabled = enabled
        self.status = "FAILED"  # until the run says otherwise
        self.timeout_seconds = 60.0  # for MLflow to catch up when all is over
        if not enabled:
            return
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG_FILE).write_text(config_text, encoding="utf-8")
        self.journal = Journal(run_dir / METRICS_FILE, lambda row: row["step"] <= resume_step, writes=True)
        self.journal.path.touch()
        for picture in (run_dir / PICTURES_FOLDER).glob("step-*.png"):
            if picture.name > picture_name(resume_step):
                picture.unlink()
        if not resume_step:
            (run_dir / STATE_FILE).unlink(missing_ok=True)  # a new run, also where an older one was
        self.sink = None if uri == "off" else _start_sink(run_dir, uri or default_uri(run_dir), experiment)
        self._tell("status", "RUNNING")
        self._tell("params", {name: str(value) for name, value in params.items()})
        self._tell("tags", dict(tags))

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Append a row."""
        if self.enabled:
            self.journal.add([{"step": step, "time": round(time.time(), 3), **row}])

    def tag(self, **tags: str) -> None:
        """Tell MLflow something about the run as a whole."""
        if self.enabled:
            self._tell("tags", tags)

    def mlflow_run_id(self) -> str | None:
        """Return MLflow's name for the run, once it has given one."""
        return read_state(self.run_dir).get("run_id") if self.enabled else None

    def close(self) -> None:
        """Finish with `status` (FINISHED, KILLED or FAILED), giving MLflow some time to catch up."""
        if not self.enabled:
            return
        self.journal.add([])  # what has waited for room
        self._tell("status", self.status)
        if self.sink is None:
            return
        try:
            self.sink.communicate(timeout=self.timeout_seconds)
        except subprocess.TimeoutExpired:
            print(f"MLflow did not keep up; every row is in {self.journal.path}", file=sys.stderr)
            self.sink.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, what: str, content: str | dict[str, str]) -> None:
        if self.sink is not None:
            _tell(self.sink, what, content)


def tag_run(run_dir: Path, tags: Mapping[str, str], timeout_seconds: float = 60) -> None:
    """Tell MLflow something about a run that has ended; nothing happens if it was not tracked there."""
    if state := read_state(run_dir):
        sink = _start_sink(run_dir, state["uri"], state["experiment"])
        _tell(sink, "tags", dict(tags))
        with contextlib.suppress(subprocess.TimeoutExpired):
            sink.communicate(timeout=timeout_seconds)


def read_state(run_dir: Path) -> dict[str, Any]:
    """Return where a run is tracked: MLflow's "uri", "experiment" and "run_id"; empty if it is not."""
    path = run_dir / STATE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _tell(sink: "subprocess.Popen[str]", what: str, content: str | dict[str, str]) -> None:
    """Send the sink a message; a sink that died has said why itself, and the rows are safe."""
    assert sink.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        sink.stdin.write(json.dumps({what: content}) + "\n")
        sink.stdin.flush()


def _start_sink(run_dir: Path, uri: str, experiment: str) -> "subprocess.Popen[str]":
    """Start the process that feeds MLflow: it ends when it is told or its input does, not by a launcher's signal."""
    scheme, slashes, path = uri.partition(":///")
    if scheme == "sqlite":
        uri = scheme + slashes + str(Path(path).resolve())
    command = [sys.executable, "-m", SINK, str(run_dir.resolve()), uri, experiment]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_ignore_signals,  # noqa: PLW1509  # training has no Python threads that could be in its way
    )


def _ignore_signals() -> None:
    """Be deaf from the first moment on, in the new process: a program keeps the signals it was started to ignore."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def step_of(picture_name: str) -> int:
    """Return the step of a picture's name."""
    return int(picture_name.removeprefix("step-").removesuffix(".png"))


def picture_name(step: int) -> str:
    """Return the name of the picture of a step; names are in the order of the steps."""
    return f"step-{step:08d}.png"


def default_uri(run_dir: Path) -> str:
    """Return the SQLite store beside the run folder, by absolute path: where MLflow runs makes no difference."""
    return f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


def git_commit() -> str:
    """Return the commit of this code, marked when it was changed since; "unknown" outside of a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
