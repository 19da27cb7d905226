"""Exit codes and sentences of launch/pretrain.py under plain python."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.launching import Shell
from tests.support.runs import PRETRAIN, logged, losses

Tool = Callable[[str], str]


def test_exit_codes_with_plain_python(shell: Shell, tiny: Path, tool: Tool, tmp_path: Path) -> None:
    """With and without a supervisor: Ctrl-C, which a terminal sends to both, and errors that no restart fixes."""
    run = [sys.executable, "-u", PRETRAIN, "--config", tiny, "tracking.uri=off", "schedule.total_steps=5000"]
    supervise, no_workers = [tool("vitrail"), "supervise", "--"], "data.num_workers=0"
    with shell.start([*supervise, *run, f"run_dir={tmp_path}/stopped"]) as running:
        running.wait_until(lambda: len(losses(tmp_path / "stopped")) >= 2)
        running.process.send_signal(signal.SIGINT)
        done = running.finish()
    assert done.code == 75, done.err[-3000:]

    steps = len(losses(tmp_path / "stopped"))
    shorter = [*run[:-1], f"schedule.total_steps={steps}", "schedule.warmup_steps=0", no_workers]
    assert (
        f"from step {steps}" in shell([*shorter, f"run_dir={tmp_path}/stopped"]).out
    )  # only the final evaluation is left
    assert len(logged(tmp_path / "stopped", "validation/loss")) == 1
    refused = shell([*run, f"run_dir={tmp_path}/stopped", "seed=4"])
    assert refused.code == 2
    assert "seed was 3, is 4" in refused.err
    begun = [*run[:-1], "schedule.total_steps=1", "schedule.warmup_steps=0", no_workers]
    begun += [f"run_dir={tmp_path}/new", f"init_from={tmp_path}/stopped", "engine.zero_stage=3"]
    assert f"started from {tmp_path}/stopped" in shell(begun).out
    diverging = ["optimizer.learning_rate=1e30", "logging.every_steps=2", no_workers]
    diverged = shell([*supervise, *run, f"run_dir={tmp_path}/nan", *diverging])
    assert diverged.code == 1
    assert "steps in a row were skipped (the loss is nan), and there is no checkpoint to roll back to" in diverged.err
    assert "0 restarts" in diverged.err  # a restart would diverge again
    assert "Traceback" not in diverged.err
