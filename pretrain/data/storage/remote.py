"""Read objects from http(s), s3, gs and hf through fsspec, in ranged requests that are retried and resumed.

A library call that never returns must not block a run, so each request runs in its own thread, which is abandoned when
the request times out.
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
EXTRA_BY_SCHEME = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.1, 5.0
PERMANENT_STATUS = {400, 401, 403, 404, 405, 410}  # HTTP status codes that a retry will not change


# fsspec drops its file systems in a forked process. If they were garbage-collected there, aiohttp's connections would
# remove themselves from the epoll that the parent still waits on, and its next request would hang. So they are kept.
_file_systems: dict[int, Any] = {}


@dataclass(frozen=True)
class FetchPolicy:
    """Timeouts, request size and permissions for remote reads.

    Attributes:
        request_seconds: Time limit of one request.
        stall_seconds: Time without any data after which a host counts as stalled.
        piece_bytes: Bytes per request.
        allow_pipe: Whether a `pipe:` URL may run its command.
    """

    request_seconds: float = 30.0
    stall_seconds: float = 60.0
    piece_bytes: int = 4 << 20
    allow_pipe: bool = False


class MissingObjectError(DataError):
    """An object that does not exist or must not be read, so that a retry would not help."""


class StalledFetchError(DataError, MachineError):
    """A host that has sent nothing for longer than `FetchPolicy.stall_seconds`."""


def is_remote(name: str) -> bool:
    """Return whether the name of a shard or shard set is a URL or a `pipe:` command."""
    return "://" in name or name.startswith(PIPE)


def expand_braces(name: str) -> list[str]:
    """Expand `{000000..001023}` (zero-padded like its first number) and `{a,b}` as a shell does."""
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
    """Read a whole object into memory.

    Args:
        url: URL of the object, or `pipe:` and a command that prints it.
        policy: Timeouts and permissions.
    """
    return b"".join(read_pieces(url, policy))


def fetch_range(
    url: str, offset: int, size: int, policy: FetchPolicy, on_retry: Callable[[], None] = lambda: None
) -> bytes:
    """Read up to `size` bytes of an object, starting at byte `offset`; fewer if the object ends before.

    Args:
        url: URL of the object.
        offset: Position of the first byte.
        size: Number of bytes.
        policy: Timeouts and permissions.
        on_retry: Function called before each retry.

    Raises:
        DataError: If the URL is a pipe, which can be read only from its start.
    """
    if url.startswith(PIPE):
        raise DataError(f"{url}: the output of a command has no random access; write it to a file first")
    files, path = _file_system(url)
    data: bytes = _retry(partial(files.cat_file, path, start=offset, end=offset + size), url, policy, on_retry)
    return data[offset : offset + size] if len(data) > size else data  # a server without ranges sends everything


def open_stream(url: str, policy: FetchPolicy) -> BinaryIO:
    """Open an object to read it once from start to end."""
    return io.BufferedReader(_Stream(read_pieces(url, policy)), policy.piece_bytes)


def read_pieces(
    url: str, policy: FetchPolicy, num_bytes: int | None = None, on_retry: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """Yield the bytes of an object from start to end.

    Args:
        url: URL of the object, or `pipe:` and a command that prints it.
        policy: Timeouts and permissions.
        num_bytes: Size of the whole object, if known.
        on_retry: Function called before each retry.

    Raises:
        MissingObjectError: If the object ends before `num_bytes`.
    """
    if url.startswith(PIPE):
        yield from _read_pipe(url, policy)
        return
    files, path = _file_system(url)
    if num_bytes is None:
        num_bytes = _retry(lambda: files.info(path)["size"], url, policy, on_retry)
    position = 0
    while num_bytes is None or position < num_bytes:
        end = None if num_bytes is None else min(position + policy.piece_bytes, num_bytes)
        piece = _retry(partial(files.cat_file, path, start=position, end=end), url, policy, on_retry)
        if end is None or len(piece) > end - position:  # a server without ranges sends everything
            yield piece[position:]
            return
        if not piece:
            raise MissingObjectError(f"{url}: ends at byte {position}, but {num_bytes} bytes were expected")
        yield piece
        position += len(piece)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        extra = EXTRA_BY_SCHEME.get(url.partition("://")[0])
        fix = f"pip install 'vitrail[{extra}]'" if extra else "check the part before ://"
        raise DataError(f"{url}: cannot be opened ({error}); {fix}") from None
    _file_systems[id(files)] = files
    return files, path


def _retry(request: Callable[[], Any], url: str, policy: FetchPolicy, on_retry: Callable[[], None]) -> Any:
    """Repeat a request with growing pauses until it succeeds or the host counts as stalled."""
    started, delay = time.monotonic(), FIRST_DELAY_SECONDS
    while True:
        try:
            return _run_with_timeout(request, policy.request_seconds)
        except Exception as error:  # each library behind fsspec raises its own types
            if isinstance(error, FileNotFoundError) and _is_permanent(error.__cause__):
                raise MissingObjectError(f"{url}: does not exist") from None
            if isinstance(error, PermissionError) or getattr(error, "status", None) in PERMANENT_STATUS:
                raise MissingObjectError(f"{url}: access denied ({error}); check the credentials") from None
            waited = time.monotonic() - started
            if waited + delay > policy.stall_seconds:
                host = urlsplit(url).netloc or url
                reason = str(error) or type(error).__name__
                raise StalledFetchError(
                    f"{url}: no data from {host} for {waited:.0f} seconds ({reason}); check the network and the host, "
                    "or increase data.stall_seconds"
                ) from None
        on_retry()
        time.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(2 * delay, MAX_DELAY_SECONDS)


def _is_permanent(cause: BaseException | None) -> bool:
    """Return whether FileNotFoundError means a missing object.

    fsspec raises it whenever it cannot get an object's size, and chains the actual error as the cause.
    """
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in PERMANENT_STATUS


def _run_with_timeout(request: Callable[[], Any], seconds: float) -> Any:
    """Return the result of a request, or raise its error; raise TimeoutError after `seconds`."""
    outcomes: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def run() -> None:
        try:
            outcomes.put((True, request()))
        except BaseException as error:
            outcomes.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        succeeded, outcome = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no response within {seconds:g} seconds") from None
    if not succeeded:
        raise outcome
    return outcome


def _read_pipe(url: str, policy: FetchPolicy) -> Iterator[bytes]:
    """Run a command and yield its output."""
    if not policy.allow_pipe:
        raise DataError(f"{url}: would run a command; allow it with data.allow_pipe=true or --allow-pipe")
    command = url.removeprefix(PIPE)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(policy.piece_bytes):
            yield piece
    if process.returncode:
        raise DataError(f"{url}: the command failed with exit code {process.returncode}")


class _Stream(io.RawIOBase):
    """A file over an iterator of pieces."""

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
