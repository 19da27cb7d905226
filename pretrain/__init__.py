"""Pretrain Vision Transformers on sharded images under DeepSpeed ZeRO."""

EXIT_MISTAKE = 2  # of every command that a UserError ends
EXIT_RESUMABLE = 75  # stopped from outside; the same command goes on where it was


class MachineError(Exception):
    """What the machine is to blame for: a disk that is full, a host that sends nothing. Later it may go well."""


class UserError(Exception):
    """What a user can mend: the message is one sentence that names the thing and the fix, and needs no traceback."""
