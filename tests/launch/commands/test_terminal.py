"""Errors as one sentence with an exit code, sizes typed by a person, progress bars."""

import errno

import pytest
import typer

from launch.commands.terminal import parse_size, report_errors
from pretrain.errors import DataError, MachineError
from pretrain.tracking.progress import progress_bar


class StalledError(DataError, MachineError):
    """An error that names the user's data but may not occur again, as when a host stalls."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("x.tar: not a tar file; remove it"), 2, "x.tar: not a tar file; remove it"),
        (MachineError("node-1: no space left"), 1, "node-1: no space left"),
        (StalledError("http://x: no data for 60 s"), 1, "http://x: no data for 60 s"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/a.tar"), 1, "/out/a.tar: No space left on device"),
        (OSError("no name"), 1, "no name"),
    ],
)
def test_expected_error_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    with pytest.raises(SystemExit) as exit_info, report_errors():
        raise error
    assert exit_info.value.code == code
    assert capsys.readouterr().err == f"{line}\n"


def test_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), report_errors():
        raise ZeroDivisionError


def test_parse_size() -> None:
    sizes = [parse_size(text, "--x") for text in ("7", "3kB", "256MB", "100GB")]
    assert sizes == [7, 3_000, 256_000_000, 100_000_000_000]
    for text in ("", "MB", "1.5MB", "-1", "1 MB", "256mb"):
        with pytest.raises(typer.BadParameter, match="expected a size such as 256MB, got "):
            parse_size(text, "--x")


@pytest.mark.parametrize(("unit", "shown"), [("images", "3/4"), ("bytes", "/s")])
def test_progress_bar_writes_its_final_state_to_stderr(
    capsys: pytest.CaptureFixture[str], unit: str, shown: str
) -> None:
    with progress_bar("reading", None, unit) as advance:
        advance(1, 4)
        advance(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "reading" in captured.err
    assert shown in captured.err
