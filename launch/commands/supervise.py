"""`vitrail supervise`: keep a run going through crashes and hangs."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import report_errors


def supervise(
    command: Annotated[
        list[str], typer.Argument(help="Command that starts the run, with a double dash in front of it.")
    ],
    max_failures: Annotated[
        int,
        typer.Option(min=0, help="Number of consecutive failures to tolerate; a new checkpoint restarts the count."),
    ] = 5,
    fewer_after: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of consecutive failures after which the run continues with one rank fewer; every further "
            "multiple removes another. The global batch size stays the same. 0 always keeps the number of ranks.",
        ),
    ] = 2,
) -> None:
    """Restart a run from its last checkpoint after every crash or hang, and report where the time went.

    SIGTERM, SIGUSR1 and Ctrl-C make the run save a checkpoint and stop with exit code 75; the same command resumes it.
    A mistake in the config or a diverged run is not restarted. goodput.json in the run folder has the time of each
    attempt.

    Example: vitrail supervise -- vitrail pretrain my.yaml

    Example: vitrail supervise -- deepspeed launch/pretrain.py --config configs/quickstart/pretrain.yaml
    """
    from launch.supervisor.supervisor import Supervisor
    from pretrain.tracking.tracker import tag_run

    with report_errors():
        supervisor = Supervisor(launcher_command(command), max_failures, fewer_after, report=print_line)
    code = supervisor.run()
    shares = {f"goodput.{name}": f"{seconds:.1f} s" for name, seconds in supervisor.goodput.shares().items()}
    tag_run(supervisor.run_dir, shares)
    sys.exit(code)


def launcher_command(command: Sequence[str]) -> list[str]:
    """Return the launcher's command for `vitrail pretrain`; any other command is returned as it is."""
    names = [Path(word).name for word in command[:4]]
    if ("vitrail", "pretrain") not in pairwise(names):  # also python -m vitrail pretrain
        return list(command)
    printed = subprocess.run([*command, "--print-command"], stdout=subprocess.PIPE, text=True, check=False)
    if printed.returncode:
        sys.exit(printed.returncode)
    return shlex.split(printed.stdout)


def print_line(sentence: str) -> None:
    """Print a line of the supervisor to stderr."""
    print(f"supervise: {sentence}", file=sys.stderr, flush=True)
