"""The cache: one download per object, a limit that always holds, and only verified files under final names."""

import fcntl
import hashlib
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.data.storage.cache import Cache, CacheError, RemoteObject
from pretrain.data.storage.remote import FetchPolicy, StalledFetchError
from pretrain.errors import DataError
from tests.support.disk import folder_size

POLICY = FetchPolicy(request_seconds=5, stall_seconds=20, piece_bytes=50_000)
SIZE = 200_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[UnreliableServer]:
    (tmp_path / "served").mkdir()
    for i in range(30):
        (tmp_path / "served" / f"{i:02d}.bin").write_bytes(np.random.default_rng(i).bytes(SIZE))
    with serve(UnreliableServer(tmp_path / "served")) as running:
        yield running


def objects(server: UnreliableServer) -> list[RemoteObject]:
    paths = sorted(server.folder.iterdir())
    return [
        RemoteObject(f"{server.url}/{p.name}", hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_size)
        for p in paths
    ]


def check_names(folder: Path) -> None:
    """Check that each file with a final name has the content that its name promises."""
    for path in folder.iterdir():
        if not path.suffix and path.name != "lock":
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            assert hashlib.sha256(data).hexdigest() == path.name


def read_all(cache: Cache, wanted: list[RemoteObject], contents: Path, seed: int, passes: int) -> None:
    """Read every object at random offsets, in an order of this process's own."""
    chance = random.Random(seed)
    for _ in range(passes):
        for one in chance.sample(wanted, len(wanted)):
            offset = chance.randrange(one.num_bytes)
            whole = (contents / one.url.rpartition("/")[2]).read_bytes()
            assert cache.read_range(one, offset, 1000) == whole[offset : offset + 1000]


def run_processes(cache: Cache, server: UnreliableServer, passes: int) -> None:
    """Read in four processes while checking the folder."""
    context = multiprocessing.get_context("fork")
    wanted = objects(server)
    processes = [
        context.Process(target=read_all, args=(cache, wanted, server.folder, seed, passes)) for seed in range(4)
    ]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            assert folder_size(cache.folder) <= cache.limit_bytes
            if cache.folder.exists():
                check_names(cache.folder)
            time.sleep(0.002)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * 4


@pytest.mark.processes
def test_all_processes_share_one_download_per_object(server: UnreliableServer, tmp_path: Path) -> None:
    server.unavailable, server.reset, server.slow = 0.05, 0.02, 0.1
    run_processes(Cache(tmp_path / "cache", 10**9, POLICY), server, passes=2)
    assert server.sent <= 1.05 * 30 * SIZE
    assert len([path for path in (tmp_path / "cache").iterdir() if path.name != "lock"]) == 30


@pytest.mark.processes
def test_size_limit_holds_under_concurrency_and_failures(server: UnreliableServer, tmp_path: Path) -> None:
    server.unavailable, server.reset = 0.05, 0.02
    run_processes(Cache(tmp_path / "cache", 6 * SIZE, POLICY), server, passes=1)


def test_object_needed_last_is_evicted_first(server: UnreliableServer, tmp_path: Path) -> None:
    wanted = objects(server)
    cache = Cache(tmp_path / "cache", 4 * SIZE, POLICY)
    order = {one.sha256: i for i, one in enumerate(wanted)}
    now = 0
    cache.set_schedule(lambda sha256: (order[sha256] - now) % 30)
    for i in (0, 20, 2, 10):
        now = i
        cache.read_range(wanted[i], 0, 1)
    now = 1
    cache.read_range(wanted[1], 0, 1)
    kept = {wanted.index(one) for one in wanted if (tmp_path / "cache" / one.sha256).exists()}
    assert kept == {20, 2, 10, 1}  # object 0 is needed last, in 29 steps
    assert cache.take_counts() == {"hits": 0, "downloads": 5, "downloaded_bytes": 5 * SIZE, "retries": 0}
    assert cache.take_counts()["downloads"] == 0


def test_open_objects_are_not_evicted(server: UnreliableServer, tmp_path: Path) -> None:
    wanted = objects(server)
    impatient = FetchPolicy(stall_seconds=0.5)
    reader, other = (Cache(tmp_path / "cache", 2 * SIZE, impatient) for _ in range(2))
    reader.set_schedule(lambda sha256: 0.0)  # everything is needed now
    reader.read_range(wanted[0], 0, 1)
    reader.read_range(wanted[1], 0, 1)
    with pytest.raises(
        DataError, match=r"no room for .*02.bin \(200000 bytes\) because all 400000 bytes are in use; inc"
    ):
        other.read_range(wanted[2], 0, 1)
    with pytest.raises(DataError, match=r"more than the whole cache; increase data\.cache_bytes"):
        Cache(tmp_path / "tiny", SIZE - 1, POLICY).read_range(wanted[0], 0, 1)


def test_a_cache_folder_that_cannot_be_used_is_named(server: UnreliableServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, reason in ((Path("~/.cache/vitrail"), "HOME is not set"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(CacheError, match=rf"{reason}.*; set data.cache_dir to a folder that you can write to"):
            Cache(folder, 10**9, POLICY).read_range(objects(server)[0], 0, 1)


def test_a_download_by_another_process_that_stalls_is_not_called_a_lack_of_room(
    server: UnreliableServer, tmp_path: Path
) -> None:
    [wanted, *_] = objects(server)
    cache = Cache(tmp_path / "cache", 10**9, FetchPolicy(stall_seconds=0.2))
    cache.folder.mkdir()
    with (cache.folder / f"{wanted.sha256}.partial").open("w") as partial:
        fcntl.flock(partial, fcntl.LOCK_EX)  # what another process does for its whole download
        with pytest.raises(StalledFetchError, match=r"00.bin: another process downloads it, but has received nothing"):
            cache.read_range(wanted, 0, 1)


@pytest.mark.processes
def test_another_process_takes_over_when_a_downloader_is_killed(server: UnreliableServer, tmp_path: Path) -> None:
    server.slow = 1.0  # 0.2 seconds per piece: enough time to be killed
    [wanted, *_] = objects(server)
    cache = Cache(tmp_path / "cache", 10**9, POLICY)
    victim = multiprocessing.get_context("fork").Process(target=cache.read_range, args=(wanted, 0, 1))
    victim.start()
    partial = tmp_path / "cache" / f"{wanted.sha256}.partial"
    while not partial.exists():
        time.sleep(0.005)
    threading.Timer(0.3, victim.kill).start()
    assert cache.read_range(wanted, 7, 3) == (server.folder / "00.bin").read_bytes()[7:10]
    victim.join()
    assert not partial.exists()


def test_download_with_wrong_checksum_is_refused(server: UnreliableServer, tmp_path: Path) -> None:
    [wanted, *_] = objects(server)
    cache = Cache(tmp_path / "cache", 10**9, POLICY)
    with pytest.raises(DataError, match=rf"00.bin: SHA-256 is {wanted.sha256}, but the index says 0000"):
        cache.read_range(wanted._replace(sha256="0" * 64), 0, 1)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["lock"]


def test_upcoming_objects_are_prefetched(server: UnreliableServer, tmp_path: Path) -> None:
    wanted = objects(server)
    cache = Cache(tmp_path / "cache", 10**9, POLICY)
    cache.set_schedule(lambda sha256: 0.0, lambda: wanted[:5])
    deadline = time.monotonic() + 20
    while cache.counts.downloads < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    cache.read_range(wanted[3], 0, 1)
    assert (cache.counts.downloads, cache.counts.hits) == (5, 1)


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_is_reported(server: UnreliableServer, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=100k tmpfs {small}"):
        pytest.skip("this machine cannot mount a file system")
    try:
        with pytest.raises(
            DataError, match=r"small: No space left on device; move data.cache_dir to a larger disk, or"
        ):
            Cache(small, 10**9, POLICY).read_range(objects(server)[0], 0, 1)
        assert [path.name for path in small.iterdir()] == ["lock"]
    finally:
        os.system(f"umount {small}")
