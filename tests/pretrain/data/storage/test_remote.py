"""Reads from unreliable servers return every byte, or an error that names the object and the host."""

import gc
import io
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.data.storage.remote import (
    FetchPolicy,
    MissingObjectError,
    StalledFetchError,
    expand_braces,
    fetch_bytes,
    is_remote,
    open_stream,
    read_pieces,
)
from pretrain.errors import DataError

PATIENT = FetchPolicy(request_seconds=5, stall_seconds=20, piece_bytes=50_000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[UnreliableServer]:
    for i in range(8):
        (tmp_path / f"{i}.bin").write_bytes(np.random.default_rng(i).bytes(400_000 + i))
    (tmp_path / "empty.bin").write_bytes(b"")
    with serve(UnreliableServer(tmp_path)) as running:
        yield running


@pytest.mark.slow
def test_retries_return_every_byte_and_fetch_few_twice(server: UnreliableServer) -> None:
    server.unavailable, server.reset, server.slow = 0.05, 0.02, 0.1
    retries = []
    for path in sorted(server.folder.glob("*.bin")):
        pieces = read_pieces(f"{server.url}/{path.name}", PATIENT, path.stat().st_size, lambda: retries.append(1))
        assert b"".join(pieces) == path.read_bytes()
    assert retries
    assert server.sent <= 1.05 * sum(path.stat().st_size for path in server.folder.glob("*.bin"))


@pytest.mark.parametrize("ranges", [True, False])
def test_servers_without_ranges_and_unknown_sizes_work(server: UnreliableServer, ranges: bool) -> None:
    server.ranges = ranges
    for name in ("0.bin", "empty.bin"):
        assert fetch_bytes(f"{server.url}/{name}", PATIENT) == (server.folder / name).read_bytes()


def fetch_and_collect(url: str) -> None:
    fetch_bytes(url, PATIENT)
    gc.collect()


@pytest.mark.processes
def test_forked_process_does_not_disturb_connections_of_its_parent(server: UnreliableServer) -> None:
    hasty = FetchPolicy(request_seconds=3, stall_seconds=20)
    for i in range(3):
        retries: list[int] = []
        pieces = read_pieces(f"{server.url}/{i}.bin", hasty, on_retry=lambda: retries.append(1))  # noqa: B023
        assert b"".join(pieces) == (server.folder / f"{i}.bin").read_bytes()
        assert not retries
        child = multiprocessing.get_context("fork").Process(target=fetch_and_collect, args=(f"{server.url}/7.bin",))
        child.start()
        child.join(30)
        assert child.exitcode == 0


def test_stream_reads_like_a_file(server: UnreliableServer) -> None:
    with open_stream(f"{server.url}/1.bin", PATIENT) as stream:
        copy = io.BytesIO()
        while piece := stream.read(777):
            copy.write(piece)
    assert copy.getvalue() == (server.folder / "1.bin").read_bytes()


@pytest.mark.slow
def test_stalled_host_is_reported_in_time(server: UnreliableServer) -> None:
    server.stalled.add("2.bin")
    started = time.monotonic()
    host = server.url.removeprefix("http://")
    with pytest.raises(
        StalledFetchError, match=rf"/2.bin: no data from {host} for \d+ seconds \(no response within 1 "
    ):
        fetch_bytes(f"{server.url}/2.bin", FetchPolicy(request_seconds=1, stall_seconds=3))
    assert time.monotonic() - started < 10


def test_unreachable_host_is_reported(server: UnreliableServer) -> None:
    with pytest.raises(StalledFetchError, match=r"no data from 127.0.0.1:9 for"):
        fetch_bytes("http://127.0.0.1:9/x", FetchPolicy(stall_seconds=0.5))


def test_missing_object_is_not_retried(server: UnreliableServer) -> None:
    retries: list[int] = []
    with pytest.raises(MissingObjectError, match=r"nowhere.bin: does not exist"):
        list(read_pieces(f"{server.url}/nowhere.bin", PATIENT, 10, lambda: retries.append(1)))
    with pytest.raises(MissingObjectError, match=r"nowhere.bin: does not exist"):
        fetch_bytes(f"{server.url}/nowhere.bin", FetchPolicy(stall_seconds=0.1))
    assert not retries


def test_missing_package_is_reported_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gcs://bucket/x: cannot be opened .*; pip install 'vitrail\[gcs\]'"):
        fetch_bytes("gcs://bucket/x", PATIENT)  # not gs://, which other tests open: fsspec caches its file system
    with pytest.raises(DataError, match=r"nonsense://x: cannot be opened .*; check the part before"):
        fetch_bytes("nonsense://x", PATIENT)


@pytest.mark.processes
def test_pipe_command_runs_only_if_allowed(server: UnreliableServer) -> None:
    url = f"pipe:cat {server.folder}/3.bin"
    with pytest.raises(DataError, match=r"allow it with data.allow_pipe=true"):
        fetch_bytes(url, PATIENT)
    assert fetch_bytes(url, FetchPolicy(allow_pipe=True)) == (server.folder / "3.bin").read_bytes()
    with pytest.raises(DataError, match=r"pipe:exit 3: the command failed with exit code 3"):
        fetch_bytes("pipe:exit 3", FetchPolicy(allow_pipe=True))


def _fetch_in_child(url: str, sizes: "multiprocessing.Queue[int]") -> None:
    sizes.put(len(fetch_bytes(url, PATIENT)))


@pytest.mark.processes
def test_fetch_works_in_a_fork_of_a_process_that_has_fetched(server: UnreliableServer) -> None:
    url = f"{server.url}/4.bin"
    size = len(fetch_bytes(url, PATIENT))
    context = multiprocessing.get_context("fork")
    sizes: multiprocessing.Queue[int] = context.Queue()
    child = context.Process(target=_fetch_in_child, args=(url, sizes))
    child.start()
    try:
        assert sizes.get(timeout=600) == size
    finally:
        child.kill()
        child.join()


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("s3://b/train-{0008..0011}.tar") == [f"s3://b/train-{i:04d}.tar" for i in range(8, 12)]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("plain{}") == ["plain{}"]
    assert [is_remote(name) for name in ("s3://x", "pipe:cat x", "/data/x", "x.tar")] == [True, True, False, False]
