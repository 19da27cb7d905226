"""How a run or a command ends, and the exit codes that report it."""

import os
import sys
from enum import Enum
from pathlib import Path
from typing import NoReturn

from pretrain.errors import DivergedError, MachineError, UserError

EXIT_DONE = 0
EXIT_FAILED = 1  # a retry may succeed, except for a run that diverged
EXIT_USER_ERROR = 2  # a retry fails in the same way until the user fixes the cause
EXIT_RESUMABLE = 75  # stopped by a signal; the same command continues
EXIT_INTERRUPTED = 130  # Ctrl-C in a command that cannot be resumed: 128 + SIGINT, as in shells
EXIT_CODES = (EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_RESUMABLE, EXIT_INTERRUPTED)
EXIT_CODE_FILE = "VITRAIL_EXIT_CODE_FILE"  # environment variable, set by `vitrail pretrain` and `vitrail finetune`


class Outcome(str, Enum):
    """How a run, or a part of it, ended. Only a run that FAILED is worth restarting without changes."""

    DONE = "done"
    STOPPED = "stopped"  # by a signal
    USER_ERROR = "user error"
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def exit_code(self) -> int:
        """The exit code of a process that ends with this outcome."""
        return {
            Outcome.DONE: EXIT_DONE,
            Outcome.STOPPED: EXIT_RESUMABLE,
            Outcome.USER_ERROR: EXIT_USER_ERROR,
        }.get(self, EXIT_FAILED)


def outcome_of(error: BaseException) -> Outcome:
    """Return the outcome of a run that ended with an error."""
    if isinstance(error, UserError) and not isinstance(error, MachineError):
        return Outcome.USER_ERROR
    return Outcome.DIVERGED if isinstance(error, DivergedError) else Outcome.FAILED


def exit_rank(code: int) -> NoReturn:
    """End the process of a rank.

    Under `vitrail pretrain` and `vitrail finetune`, a stop is written to a file and ends with exit code 0, because
    launchers answer every other code with a traceback.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file and code in (EXIT_RESUMABLE, EXIT_INTERRUPTED):
        Path(file).write_text(str(code), encoding="utf-8")
        code = EXIT_DONE
    sys.exit(code)
