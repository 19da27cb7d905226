"""Bytes from http(s), s3, gs and hf through fsspec: in ranged pieces, retried, resumed at the byte reached.

A library call that never returns must not block a run, so each request has a thread of its own, which is left behind
when its time is up.
"""

import io
import queue
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pretrain.errors import DataError, MachineError

PIPE = "pipe:"
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.1, 5.0
LASTING = {400, 401, 403, 404, 405, 410}  # HTTP's answers that the next try will not change


# fsspec forgets its file systems in a forked process. Collected there, aiohttp's connections would take themselves off
# the epoll that the parent still waits on, and the parent's next request would hang: so they are kept.
_file_systems: dict[int, Any] = {}


@dataclass(frozen=True)
class FetchPolicy:
    """How patient to be: with one request, and with a host that sends nothing."""

    request_seconds: float = 30.0
    stall_seconds: float = 60.0
    piece_bytes: int = 4 << 20
    allow_pipe: bool = False


class MissingObjectError(DataError):
    """An object that is not there, or may not be read: asking again would not help."""


class StalledFetchError(DataError, MachineError):
    """A host that has sent nothing for longer than the policy allows."""


def is_remote(name: str) -> bool:
    """Say whether a shard's or a set's name is a URL or a pipe."""
    return "://" in name or name.startswith(PIPE)


def expand_braces(name: str) -> list[str]:
    """Expand `{000000..001023}` (as wide as its first number) and `{a,b}`, as a shell does."""
    pieces = [_choices(piece) for piece in re.split(r"(\{[^{}]*\})", name)]
    return ["".join(chosen) for chosen in product(*pieces)]


def _choices(piece: str) -> list[str]:
    if found := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece):
        first, last = found.groups()
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if piece.startswith("{") and "," in piece:
        return piece[1:-1].split(",")
    return [piece]


def fetch_bytes(url: str, policy: FetchPolicy) -> bytes:
    """Read a small object whole."""
    return b"".join(read_pieces(url, policy))


def fetch_range(
    url: str, offset: int, size: int, policy: FetchPolicy, on_retry: Callable[[], None] = lambda: None
) -> bytes:
    """Read `size` bytes of an object from `offset`; fewer come back where it ends sooner.

    Raises:
        StalledFetchError: the host sent nothing for too long.
        MissingObjectError: it is not there, or may not be read.
        DataError: it is a pipe, which is read from its beginning only; or a package is missing.
    """
    if url.startswith(PIPE):
        raise DataError(f"{url}: what a command prints cannot be read in any order; write it to a file first")
    files, path = _file_system(url)
    data: bytes = _insist(partial(files.cat_file, path, start=offset, end=offset + size), url, policy, on_retry)
    return data[offset : offset + size] if len(data) > size else data  # a server that knows no ranges sends all


def open_stream(url: str, policy: FetchPolicy) -> BinaryIO:
    """Open an object to be read once, from front to back."""
    return io.BufferedReader(_Stream(read_pieces(url, policy)), policy.piece_bytes)


def read_pieces(
    url: str, policy: FetchPolicy, num_bytes: int | None = None, on_retry: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """Yield an object's bytes from front to back.

    Args:
        url: of the object, or `pipe:` and a command that prints it.
        policy: how patient to be.
        num_bytes: of the whole object, if known.
        on_retry: called before a request is made again.

    Raises:
        StalledFetchError: the host sent nothing for too long.
        MissingObjectError: it is not there, or may not be read.
        DataError: it needs a package that is not installed, or a permission for pipes.
    """
    if url.startswith(PIPE):
        yield from _read_pipe(url, policy)
        return
    files, path = _file_system(url)
    if num_bytes is None:
        num_bytes = _insist(lambda: files.info(path)["size"], url, policy, on_retry)
    position = 0
    while num_bytes is None or position < num_bytes:
        end = None if num_bytes is None else min(position + policy.piece_bytes, num_bytes)
        piece = _insist(partial(files.cat_file, path, start=position, end=end), url, policy, on_retry)
        if end is None or len(piece) > end - position:  # a server that knows no ranges sends all
            yield piece[position:]
            return
        if not piece:
            raise MissingObjectError(f"{url}: ends at byte {position}, {num_bytes} were promised")
        yield piece
        position += len(piece)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(url.partition("://")[0])
        cure = f"pip install 'vitrail[{extra}]'" if extra else "check its beginning"
        raise DataError(f"{url}: cannot be opened ({error}); {cure}") from None
    _file_systems[id(files)] = files
    return files, path


def _insist(request: Callable[[], Any], url: str, policy: FetchPolicy, on_retry: Callable[[], None]) -> Any:
    """Make a request until it succeeds, with growing pauses, or nothing has come for too long."""
    started, delay = time.monotonic(), FIRST_DELAY_SECONDS
    while True:
        try:
            return _within(policy.request_seconds, request)
        except Exception as error:  # every library has its own
            if isinstance(error, FileNotFoundError) and _is_lasting(error.__cause__):
                raise MissingObjectError(f"{url}: not there") from None
            if isinstance(error, PermissionError) or getattr(error, "status", None) in LASTING:
                raise MissingObjectError(f"{url}: may not be read ({error})") from None
            waited = time.monotonic() - started
            if waited + delay > policy.stall_seconds:
                host = urlsplit(url).netloc or url
                reason = str(error) or type(error).__name__
                raise StalledFetchError(f"{url}: nothing from {host} for {waited:.0f} seconds ({reason})") from None
        on_retry()
        time.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(2 * delay, LONGEST_DELAY_SECONDS)


def _is_lasting(cause: BaseException | None) -> bool:
    """Say whether "not found" means that; fsspec says it of any failure to learn a size, and names the cause."""
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in LASTING


def _within(seconds: float, request: Callable[[], Any]) -> Any:
    """Return what a request returns, or raise what it raises, but wait no longer than so many seconds."""
    answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def ask() -> None:
        try:
            answers.put((True, request()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        succeeded, answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if not succeeded:
        raise answer
    return answer


def _read_pipe(url: str, policy: FetchPolicy) -> Iterator[bytes]:
    """Run a command and yield what it prints."""
    if not policy.allow_pipe:
        raise DataError(f"{url}: runs a command of the data's; allow it with data.allow_pipe=true or --allow-pipe")
    command = url.removeprefix(PIPE)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(policy.piece_bytes):
            yield piece
    if process.returncode:
        raise DataError(f"{url}: ended with exit code {process.returncode}")


class _Stream(io.RawIOBase):
    """Pieces as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.rest:
            self.rest = memoryview(next(self.pieces, b""))
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count
