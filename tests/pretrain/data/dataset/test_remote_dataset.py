"""Remote shard sets give the same samples as local ones, and each shard is downloaded once."""

import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import evaluation_batches
from pretrain.data.loading.workers import CONTEXT, start_server
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.data.storage.cache import CacheError
from pretrain.data.storage.index import DatasetInfo
from pretrain.data.storage.remote import StalledFetchError
from pretrain.data.transforms.views import EvalView
from pretrain.errors import DataError
from tests.support.disk import folder_size
from tests.support.launching import ROOT, Shell, Vitrail
from tests.support.reading import opened, pixels_of_two_epochs
from tests.support.servers import serve_gs, serve_hub, serve_s3


@contextmanager
def watched(folder: Path, limit_bytes: int) -> Iterator[None]:
    """Check a cache while the block runs: it never exceeds its limit, and files with a final name are complete."""
    done = threading.Event()
    wrong: list[str] = []

    def watch() -> None:
        seen: set[str] = set()
        while not done.wait(0.01):
            if folder.exists() and folder_size(folder) > limit_bytes:
                wrong.append(f"{folder_size(folder)} bytes")
            for path in folder.iterdir() if folder.exists() else []:
                if not path.suffix and path.name not in {"lock", *seen}:
                    with suppress(FileNotFoundError):
                        if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
                            wrong.append(path.name)
                    seen.add(path.name)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not wrong


@pytest.mark.processes
def test_two_runs_share_a_cache_and_each_shard_is_sent_once(digits: Path, tmp_path: Path) -> None:
    """A fast and a slow run with different sets and schedules; the cache holds two windows of both."""
    served, window = tmp_path / "served", 3
    shutil.copytree(digits / "train", served / "a")
    source = keep_classes(list_digits(), ["3", "4", "5"])
    make_shards(source, tmp_path / "made", ShardOptions(validation_fraction=0.0, shard_bytes=50_000))
    (tmp_path / "made" / "train").rename(served / "b")
    totals = {name: DatasetInfo.load(served / name) for name in ("a", "b")}
    limit = sum(
        sum(sorted(shard.num_bytes + shard.index_bytes for shard in info.shards)[-2 * window :])
        for info in totals.values()
    )
    start_server()  # the two runs, and all data workers of the tests below, find torch imported
    everything = sum(shard.num_bytes + shard.index_bytes for info in totals.values() for shard in info.shards)
    with serve(UnreliableServer(served)) as server, watched(tmp_path / "cache", limit):
        runs = [
            CONTEXT.Process(
                target=read_some, args=(f"{server.url}/{name}", tmp_path / "cache", limit, window, samples, seconds)
            )
            for name, samples, seconds in (("a", 400, 0.005), ("b", 100, 0.02))
        ]
        for run in runs:
            run.start()
        try:
            for run in runs:
                run.join(60)
            assert [run.exitcode for run in runs] == [0, 0]
        finally:
            for run in runs:
                run.kill()
        sent = {name: count for name, count in server.requests.items() if name.endswith((".tar", ".index.json"))}
        assert set(sent.values()) == {1}
        assert server.sent <= 1.05 * everything


def read_some(place: str, cache_dir: Path, cache_bytes: int, window: int, count: int, seconds: float) -> None:
    """Read fewer samples than an epoch, so that the next epoch is not prefetched, and wait after each."""
    samples = opened(place, cache_dir, cache_bytes=cache_bytes)
    order = samples.order(seed=0, window=window)
    position = 0
    samples.set_read_schedule(lambda shard: order.distance(shard, position), lambda: order.upcoming(position))
    for position in range(count):
        _, shard, row = order.locate(position)
        samples.fetch(shard, row)
        time.sleep(seconds)


@pytest.mark.processes
def test_unreliable_server_gives_the_same_samples_and_sends_each_shard_once(digits: Path, tmp_path: Path) -> None:
    expected = pixels_of_two_epochs(open_dataset(digits / "train"), 0)
    total = sum(path.stat().st_size for path in (digits / "train").iterdir())
    with serve(UnreliableServer(digits / "train", unavailable=0.05, reset=0.02, slow=0.1)) as server:
        samples = opened(server.url, tmp_path / "cache")
        assert pixels_of_two_epochs(samples) == expected
        assert server.sent <= 1.05 * total
        batches = evaluation_batches(samples, EvalView(8), batch_size=16, rank=0, world_size=1, num_workers=1)
        assert sum(int(loaded.tensors["weight"].sum()) for loaded in batches) == sum(samples.shard_sizes)
        assert server.sent <= 1.05 * total


@pytest.mark.processes
@pytest.mark.parametrize("ranges", [True, False])
def test_sparse_reads_fetch_only_the_bytes_of_the_samples(digits: Path, tmp_path: Path, ranges: bool) -> None:
    """A probe reads samples in this way. Cached shards are used."""

    def few(samples: Dataset) -> list[bytes]:
        batches = evaluation_batches(
            samples, EvalView(8), batch_size=4, rank=0, world_size=1, num_workers=1, max_samples=12
        )
        return [loaded.tensors["image"].numpy().tobytes() for loaded in batches]

    info = DatasetInfo.load(digits / "train")
    indexes = sum(shard.index_bytes for shard in info.shards) + (digits / "train" / "dataset.json").stat().st_size
    expected = few(open_dataset(digits / "train"))
    with serve(UnreliableServer(digits / "train", ranges=ranges, unavailable=0.1)) as server:
        samples = opened(server.url, tmp_path / "cache")
        assert few(samples) == expected
        asked = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
        assert [*asked.values()] == [1] * 12  # of 36 shards
        if ranges:
            assert server.sent < indexes + 12 * 1000
        pixels_of_two_epochs(samples)
        sent = server.sent
        assert few(samples) == expected
        assert server.sent == sent


@pytest.mark.processes
def test_small_cache_keeps_its_limit_and_too_small_a_cache_is_an_error(digits: Path, tmp_path: Path) -> None:
    info = DatasetInfo.load(digits / "train")
    per_shard = max(shard.num_bytes + shard.index_bytes for shard in info.shards)
    with serve(UnreliableServer(digits / "train")) as server:
        samples = opened(server.url, tmp_path / "cache", cache_bytes=6 * per_shard)
        samples.check_cache_size(window=3)
        assert pixels_of_two_epochs(samples) == pixels_of_two_epochs(open_dataset(digits / "train"), 0)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 6 * per_shard
        with pytest.raises(
            DataError, match=r"data.cache_bytes: \d+ bytes cannot hold two windows of 4 shards, \d+ byt"
        ):
            opened(server.url, tmp_path / "cache", cache_bytes=6 * per_shard).check_cache_size(window=4)


def test_a_cache_without_room_for_an_index_is_not_a_bad_sample(digits: Path, tmp_path: Path) -> None:
    with serve(UnreliableServer(digits / "train")) as server:
        samples = opened(server.url, tmp_path / "cache", cache_bytes=100)
        with pytest.raises(
            CacheError, match=r"index.json: \d+ bytes, more than the whole cache; increase data.cache_byt"
        ):
            samples.fetch(0, 0)


@pytest.mark.processes
def test_stalled_shard_ends_the_run_with_its_name(digits: Path, tmp_path: Path) -> None:
    with serve(UnreliableServer(digits / "train", stalled={"shard-000001.tar"})) as server:
        samples = opened(server.url, tmp_path / "cache", stall_seconds=1.0)
        with pytest.raises(DataError, match=r"shard-000001.tar: no data from 127.0.0.1:\d+ for \d+ seconds"):
            pixels_of_two_epochs(samples)
        with pytest.raises(StalledFetchError):
            samples.fetch(1, 0)


@pytest.mark.processes
def test_unreliable_s3_gives_the_same_samples_and_sends_each_shard_once(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(path.stat().st_size for path in (digits / "train").iterdir())
    per_shard = max(shard.num_bytes + shard.index_bytes for shard in DatasetInfo.load(digits / "train").shards)
    server = UnreliableServer(tmp_path, unavailable=0.05, reset=0.02, slow=0.1)
    with serve_s3(digits / "train", "bucket", server) as access:
        for name, value in access.items():
            monkeypatch.setenv(name, value)
        samples = opened("s3://bucket", tmp_path / "cache", cache_bytes=total + per_shard)
        with watched(tmp_path / "cache", total + per_shard):
            assert pixels_of_two_epochs(samples) == pixels_of_two_epochs(open_dataset(digits / "train"), 0)
        assert server.sent <= 1.05 * total


@pytest.mark.processes
def test_google_storage_gives_the_same_samples(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_gs(digits / "train", "bucket") as access:
        for name, value in access.items():
            monkeypatch.setenv(name, value)
        assert pixels_of_two_epochs(opened("gs://bucket", tmp_path / "cache")) == pixels_of_two_epochs(
            open_dataset(digits / "train"), 0
        )


def test_hugging_face_hub_gives_the_same_samples(digits: Path, tmp_path: Path, shell: Shell) -> None:
    with serve_hub(digits / "train") as url:
        program = (
            "import sys; from pathlib import Path\n"
            "from tests.support.reading import opened, pixels_of_two_epochs\n"
            "from pretrain.data.dataset.open import open_dataset\n"
            "seen = pixels_of_two_epochs(opened('hf://datasets/user/set', Path(sys.argv[2])))\n"
            "assert seen == pixels_of_two_epochs(open_dataset(Path(sys.argv[1])), 0)"
        )
        command = [sys.executable, "-c", program, str(digits / "train"), str(tmp_path / "cache")]
        # huggingface_hub reads its environment variables when it is imported.
        done = shell(command, PYTHONPATH=str(ROOT), HF_ENDPOINT=url, HF_HUB_OFFLINE="0")
        assert done.code == 0, done.err


def test_remote_tars_can_be_indexed(digits: Path, tmp_path: Path, vitrail: Vitrail) -> None:
    with serve(UnreliableServer(digits / "train", unavailable=0.05, reset=0.02)) as server:
        last = len(list((digits / "train").glob("*.tar"))) - 1
        url = f"{server.url}/shard-{{000000..{last:06d}}}.tar"
        assert "choose a local folder with --out" in vitrail("shards", "index", url).err
        done = vitrail("shards", "index", url, "--out", str(tmp_path / "indexed"))
        assert done.code == 0, done.err
        info, ours = DatasetInfo.load(tmp_path / "indexed"), DatasetInfo.load(digits / "train")
        assert [shard.sha256 for shard in info.shards] == [shard.sha256 for shard in ours.shards]
        server.sent = 0
        samples = opened(str(tmp_path / "indexed"), tmp_path / "cache")
        assert samples.fetch(1, 2).data == open_dataset(digits / "train").fetch(1, 2).data
        assert server.sent <= 2 * ours.shards[1].num_bytes  # the index was at hand


def test_check_stats_and_simulate_work_on_a_remote_set(
    digits: Path, tmp_path: Path, vitrail: Vitrail, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where the cache goes
    shutil.copytree(digits / "validation", tmp_path / "served")
    with serve(UnreliableServer(tmp_path / "served", unavailable=0.05)) as server:
        sound = vitrail("shards", "check", server.url)
        assert sound.code == 0, sound.err
        assert "no faults" in sound.out
        counted = vitrail("shards", "stats", server.url, "--json")
        assert json.loads(counted.out)["samples"] == DatasetInfo.load(digits / "validation").num_samples
        assert "steps per epoch" in vitrail("shards", "simulate", server.url, "--global-batch-size", "8").out
        (tmp_path / "served" / "shard-000001.tar").unlink()
        broken = vitrail("shards", "check", server.url)
        assert (broken.code, broken.out) == (1, "shard-000001.tar  does not exist\n")


def test_pipe_as_a_shard(digits: Path, tmp_path: Path, vitrail: Vitrail) -> None:
    source = f"pipe:cat {digits}/validation/shard-000000.tar"
    refused = vitrail("shards", "index", source, "--out", str(tmp_path / "indexed"))
    assert (refused.code, "allow it with" in refused.err) == (2, True)
    assert vitrail("shards", "index", source, "--out", str(tmp_path / "indexed"), "--allow-pipe").code == 0
    with pytest.raises(DataError, match=r"data.allow_pipe"):
        opened(str(tmp_path / "indexed"), tmp_path / "cache").fetch(0, 0)
    samples = opened(str(tmp_path / "indexed"), tmp_path / "cache", allow_pipe=True)
    assert samples.fetch(0, 0).data == open_dataset(digits / "validation").fetch(0, 0).data
