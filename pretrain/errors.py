"""Every error that one package raises and another handles."""


class UserError(Exception):
    """What a user can mend: the message is one sentence that names the thing and the fix, and needs no traceback."""


class MachineError(Exception):
    """What the machine is to blame for: a disk that is full, a host that sends nothing. Later it may go well."""


class DataError(UserError):
    """Data that cannot be used as it is: the message names it and the fix."""

    @property
    def sentence(self) -> str:
        """The message; a loader's worker has put its traceback before it."""
        return str(self).rpartition(f"{type(self).__name__}: ")[2].strip()


class BadSampleError(DataError):
    """A sample that cannot be used, though its set can: which one, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return BadSampleError, (self.shard, self.key, self.reason)


class CheckpointError(UserError):
    """A checkpoint that cannot be used here: the message names it and the fix."""


class VersionError(UserError):
    """A checkpoint of another version of Vitrail: it is not damaged, and nothing older may take its place."""


class DivergedError(Exception):
    """A run that cannot go on: its steps are not fit to be taken, and going back did not help."""
