"""Pretrain Vision Transformers on sharded images under DeepSpeed ZeRO."""

EXIT_MISTAKE = 2  # of every command that a UserError ends
EXIT_RESUMABLE = 75  # stopped from outside; the same command goes on where it was


class UserError(Exception):
    """What a user can mend: the message is one sentence that names the thing and the fix, and needs no traceback."""
