"""What every verb shares at the terminal: errors as one sentence, sizes typed by a person."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from pretrain.errors import MachineError, UserError
from pretrain.outcome import EXIT_FAILED, EXIT_INTERRUPTED, outcome_of

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


@contextmanager
def report_errors() -> Iterator[None]:
    """Print an expected error as one sentence and exit; any other exception keeps its traceback.

    The exit code is 2 for a mistake of the user, 130 for Ctrl-C, and 1 for a failure of the machine, such as a full
    disk or a host that does not respond.
    """
    try:
        yield
    except (UserError, MachineError) as error:
        print(error, file=sys.stderr)
        sys.exit(outcome_of(error).exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        print(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), file=sys.stderr)
        sys.exit(EXIT_FAILED)


def parse_size(text: str, option: str) -> int:
    """Return the number of bytes in a size such as 256MB; a plain number is bytes.

    Args:
        text: Size as typed.
        option: Name of the option, for the error message.

    Raises:
        BadParameter: If the text is not a whole number with an optional unit kB, MB or GB.
    """
    for unit, factor in UNITS.items():
        if text.endswith(unit) and text.removesuffix(unit).isdigit():
            return int(text.removesuffix(unit)) * factor
    if text.isdigit():
        return int(text)
    raise typer.BadParameter(f"expected a size such as 256MB, got {text!r}", param_hint=option)
