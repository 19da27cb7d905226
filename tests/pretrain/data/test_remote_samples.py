"""A set that stands on a server trains as if it stood on the disk."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config import AugmentConfig, DataConfig
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.index import DataError, DatasetInfo
from pretrain.data.loader import evaluation_batches, training_batches
from pretrain.data.remote import StalledFetchError
from pretrain.data.samples import Samples
from pretrain.data.sets import open_cache, open_samples
from tests.servers import Hostile, serve, serve_s3


def opened(place: str, cache_dir: Path, **settings: object) -> Samples:
    config = DataConfig(train=place, cache_dir=cache_dir, **settings)  # type: ignore[arg-type]
    return open_samples(config.train, cache=open_cache(config))


def epochs(samples: Samples, num_workers: int = 2) -> dict[int, bytes]:
    """Two epochs' pixels by position; no fault may occur."""
    seen = {}
    for loaded in training_batches(
        samples,
        TrainView(AugmentConfig(), 8),
        seed=0,
        window=3,
        start=0,
        stop=2 * sum(samples.shard_sizes) // 16 * 16,
        global_batch_size=16,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        num_workers=num_workers,
    ):
        assert not loaded.faults
        for i, position in enumerate(loaded.tensors["position"].tolist()):
            seen[position] = loaded.tensors["image"][i].numpy().tobytes()
    return seen


def test_a_hostile_server_changes_nothing_and_each_shard_is_sent_once(digits: Path, tmp_path: Path) -> None:
    expected = epochs(open_samples(digits / "train"), 0)
    total = sum(path.stat().st_size for path in (digits / "train").iterdir())
    with serve(Hostile(digits / "train", unavailable=0.05, reset=0.02, slow=0.1)) as server:
        samples = opened(server.url, tmp_path / "cache")
        assert epochs(samples) == expected
        assert server.sent <= 1.05 * total
        batches = evaluation_batches(samples, EvalView(8), batch_size=16, rank=0, world_size=1, num_workers=1)
        assert sum(int(loaded.tensors["weight"].sum()) for loaded in batches) == sum(samples.shard_sizes)
        assert server.sent <= 1.05 * total


def test_a_small_cache_holds_its_limit_and_a_smaller_one_is_refused(digits: Path, tmp_path: Path) -> None:
    info = DatasetInfo.load(digits / "train")
    per_shard = max(shard.num_bytes + shard.index_bytes for shard in info.shards)
    with serve(Hostile(digits / "train")) as server:
        samples = opened(server.url, tmp_path / "cache", cache_bytes=6 * per_shard)
        samples.check_room(window=3)
        assert epochs(samples) == epochs(open_samples(digits / "train"), 0)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 6 * per_shard
        with pytest.raises(
            DataError, match=r"data.cache_bytes: \d+ bytes cannot hold two windows of 4 shards, \d+ byt"
        ):
            opened(server.url, tmp_path / "cache", cache_bytes=6 * per_shard).check_room(window=4)


def test_a_stalled_shard_ends_the_run_and_is_named(digits: Path, tmp_path: Path) -> None:
    with serve(Hostile(digits / "train", stalled={"shard-000001.tar"})) as server:
        samples = opened(server.url, tmp_path / "cache", stall_seconds=1.0)
        with pytest.raises(DataError, match=r"shard-000001.tar: nothing from 127.0.0.1:\d+ for \d+ seconds"):
            epochs(samples)
        with pytest.raises(StalledFetchError):
            samples.fetch(1, 0)


def test_s3(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(digits / "validation", "bucket") as access:
        for name, value in access.items():
            monkeypatch.setenv(name, value)
        samples = opened("s3://bucket", tmp_path / "cache")
        assert epochs(samples, 1) == epochs(open_samples(digits / "validation"), 0)


@pytest.fixture
def tessera(tool: Callable[[str], str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [tool("tessera"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_remote_tars_are_indexed_where_they_stand(
    digits: Path, tmp_path: Path, tessera: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    with serve(Hostile(digits / "train", unavailable=0.05, reset=0.02)) as server:
        last = len(list((digits / "train").glob("*.tar"))) - 1
        url = f"{server.url}/shard-{{000000..{last:06d}}}.tar"
        assert "name one with --out" in tessera("shards", "index", url).stderr
        done = tessera("shards", "index", url, "--out", str(tmp_path / "indexed"))
        assert done.returncode == 0, done.stderr
        info, ours = DatasetInfo.load(tmp_path / "indexed"), DatasetInfo.load(digits / "train")
        assert [shard.sha256 for shard in info.shards] == [shard.sha256 for shard in ours.shards]
        server.sent = 0
        samples = opened(str(tmp_path / "indexed"), tmp_path / "cache")
        assert samples.fetch(1, 2).data == open_samples(digits / "train").fetch(1, 2).data
        assert server.sent <= 2 * ours.shards[1].num_bytes  # the index was at hand


def test_a_command_as_a_shard(
    digits: Path, tmp_path: Path, tessera: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    source = f"pipe:cat {digits}/validation/shard-000000.tar"
    refused = tessera("shards", "index", source, "--out", str(tmp_path / "indexed"))
    assert (refused.returncode, "allow it with" in refused.stderr) == (2, True)
    assert tessera("shards", "index", source, "--out", str(tmp_path / "indexed"), "--allow-pipe").returncode == 0
    with pytest.raises(DataError, match=r"data.allow_pipe"):
        opened(str(tmp_path / "indexed"), tmp_path / "cache").fetch(0, 0)
    samples = opened(str(tmp_path / "indexed"), tmp_path / "cache", allow_pipe=True)
    assert samples.fetch(0, 0).data == open_samples(digits / "validation").fetch(0, 0).data
