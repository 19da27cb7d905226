"""The errors that one package raises and another handles.

A command prints the message of a `UserError` without a traceback and exits with code 2, because only the user can fix
the cause. A `MachineError` exits with code 1, because the same command may succeed later.
"""


class UserError(Exception):
    """A mistake that the user can fix; the message is one sentence that names the thing, the problem and the fix."""


class MachineError(Exception):
    """A failure of the environment, such as a full disk or an unreachable host; a retry may succeed."""


class RankError(MachineError):
    """A failure of one rank alone, such as a GPU without enough memory. The rank itself has to print it."""


class StartupError(RankError):
    """A rank that cannot join the others, because there is no group of ranks yet."""


class DataError(UserError):
    """A dataset, index or image that cannot be used as it is."""

    @property
    def summary(self) -> str:
        """The message without the traceback that a PyTorch DataLoader puts before an error from a worker.

        PyTorch re-raises errors that have a `message` attribute in another way, so this one has another name.
        """
        return str(self).rpartition(f"{type(self).__name__}: ")[2].strip()


class BadSampleError(DataError):
    """One sample that cannot be used; the rest of its dataset can.

    Args:
        shard: Name of the shard.
        key: Key of the sample within its shard.
        reason: Description of the fault.
    """

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return BadSampleError, (self.shard, self.key, self.reason)


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit the run or model that should load it."""


class VersionError(UserError):
    """A checkpoint that another version of Vitrail wrote.

    It is not a `CheckpointError`: the checkpoint is intact, so an older one must not be used in its place.
    """


class DivergedError(Exception):
    """A run whose steps are skipped again and again, even after it rolled back to a checkpoint."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
