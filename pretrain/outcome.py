"""How a run ends, or a stretch of it."""

from enum import Enum

from pretrain.errors import DivergedError, MachineError, UserError

EXIT_MISTAKE = 2  # of every command that a UserError ends
EXIT_RESUMABLE = 75  # stopped from outside; the same command goes on where it was


class Outcome(str, Enum):
    """How a run has ended. Only what has failed is worth starting again as it was."""

    DONE = "done"
    STOPPED = "stopped"  # as somebody asked
    MISTAKE = "mistake"  # of the user
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def exit_code(self) -> int:
        """Return the exit code of a process that ends so."""
        return {Outcome.DONE: 0, Outcome.STOPPED: EXIT_RESUMABLE, Outcome.MISTAKE: EXIT_MISTAKE}.get(self, 1)


def outcome_of(error: BaseException) -> Outcome:
    """Say how a run has ended that raised an error."""
    if isinstance(error, UserError) and not isinstance(error, MachineError):
        return Outcome.MISTAKE
    return Outcome.DIVERGED if isinstance(error, DivergedError) else Outcome.FAILED
