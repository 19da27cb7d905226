"""Measure the input stage, compared with webdataset, Pillow and torch's DataLoader over a folder.

    python benchmarks/input.py                    # with crops of scikit-learn's photos, about two minutes

Times are CPU seconds of the working process, and elapsed time for whole loaders. Methods alternate within one run, and
the median of the rounds is reported.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.damage import epoch, make_small_set, trials, webdataset_images
from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.config import AugmentConfig
from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.open import open_dataset
from pretrain.data.dataset.order import Order, Part, micro_batches
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.loading.loader import BatchPlan, training_batches
from pretrain.data.shards.bench import IMAGE_SIZE, Line, compare, loader_rate
from pretrain.data.shards.check import check_set
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.folder import list_folder
from pretrain.data.storage.cache import Cache
from pretrain.data.storage.index import DatasetInfo
from pretrain.data.storage.remote import FetchPolicy
from pretrain.data.transforms.views import TrainView
from pretrain.errors import BadSampleError


def make_photos(folder: Path, count: int) -> None:
    """Write `count` JPEGs of 500 x 375 pixels in two classes, random crops of two photos."""
    generator = np.random.default_rng(0)
    for name in ("china", "flower"):
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (folder / name).mkdir(parents=True)
        for i in range(count // 2):
            share = generator.uniform(0.6, 1.0)
            width, height = int(photo.width * share), int(photo.width * share * 0.66)
            left, top = generator.integers(photo.width - width + 1), generator.integers(photo.height - height + 1)
            crop = photo.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.LANCZOS)
            crop.save(folder / name / f"{i:05d}.jpg", quality=int(generator.integers(90, 96)))


def measure_scaling(samples: Dataset, workers: int, seconds: float) -> list[Line]:
    """Measure the running loader with one and with all workers, and its CPU time in the training process."""
    rate_of_one, rate_of_all = (loader_rate(samples, IMAGE_SIZE, count, seconds) for count in (1, workers))
    started = time.process_time()
    loader_rate(samples, IMAGE_SIZE, workers, seconds)
    seconds_per_image = (time.process_time() - started) / (rate_of_all * seconds)
    return [
        Line(
            f"whole loader, 1 and {workers} workers",
            f"{rate_of_one:.0f} and {rate_of_all:.0f} images/s",
            "without start-up",
        ),
        Line(
            "  CPU time in the training process",
            f"{seconds_per_image * 1e6:.0f} us per image",
            f"{seconds_per_image * rate_of_all:.0%} of one core",
        ),
    ]


class SlowDataset(ShardDataset):
    """Shards of which each read takes 10 ms longer, as over a network."""

    def fetch(self, shard: int, row: int) -> EncodedSample:
        time.sleep(0.010)
        return super().fetch(shard, row)


def measure_slow_storage(folder: Path, seconds: float) -> list[Line]:
    """Measure one worker with one and with 16 threads when every read takes 10 ms, as over a network."""
    slow = SlowDataset([str(folder)])
    rates = [loader_rate(slow, IMAGE_SIZE, 1, seconds, num_threads) for num_threads in (1, 16)]
    return [Line("reads of 10 ms: 1 and 16 threads", f"{rates[0]:.0f} and {rates[1]:.0f} images/s", "one worker")]


def measure_seek() -> list[Line]:
    """Measure the order of 10^9 samples in 100,000 shards of three datasets that are mixed by weight."""
    parts = [Part(name, [10_000] * count) for name, count in {"a": 50_000, "b": 30_000, "c": 20_000}.items()]
    started = time.perf_counter()
    order = Order(parts, 0, 64, [3.0, 2.0, 1.0])
    built = time.perf_counter()
    order.locate(5 * 10**8)
    sought = time.perf_counter()
    for position in range(5 * 10**8, 5 * 10**8 + 4096):
        order.locate(position)
    seconds_per_position = (time.perf_counter() - sought) / 4096
    return [
        Line("build the order of 10^9 samples", f"{built - started:.3f} s", ""),
        Line("seek to the middle", f"{sought - built:.3f} s", "bar: 0.2 s"),
        Line(
            "  each position after that", f"{seconds_per_position * 1e6:.1f} us", "including a new window's permutation"
        ),
    ]


def measure_first_batch(work: Path) -> list[Line]:
    """Measure the time to the first batch of 100,000 shards; it reads `dataset.json` and the indexes of one window."""
    info = DatasetInfo.load(work / "shards" / "train")
    folder = work / "many"
    folder.mkdir()
    many = [info.shards[i % len(info.shards)] for i in range(100_000)]
    DatasetInfo(info.class_names, info.class_counts, many).save(folder)
    for path in (work / "shards" / "train").glob("shard-*"):
        (folder / path.name).hardlink_to(path)
    started = time.perf_counter()
    samples = open_dataset(folder)
    batches = training_batches(
        samples,
        TrainView(AugmentConfig(), IMAGE_SIZE),
        BatchPlan(seed=0, shuffle_window=64, global_batch_size=64, num_workers=1),
        start=64 * 1000,
        stop=64 * 2000,
    )
    next(batches)
    seconds = time.perf_counter() - started
    batches.close()
    return [Line("first batch of 64 at 100,000 shards", f"{seconds:.2f} s", "bar: 2 s")]


def flip_bytes(work: Path) -> list[Line]:
    """Flip one byte in the header of a tar's middle image, or in the image; count the samples that are lost."""
    rows = []
    whole = work / "shards" / "train"
    tar = min(whole.glob("*.tar"))
    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")]
    middle = members[len(members) // 2]
    offsets = {"header": middle.offset + 5, "image": middle.offset_data + middle.size // 2}
    for part, offset in offsets.items():
        folder = work / f"flipped-{part}"
        shutil.copytree(whole, folder)
        data = bytearray(tar.read_bytes())
        data[offset] ^= 0x55
        (folder / tar.name).write_bytes(data)
        reader = webdataset.WebDataset(str(folder / tar.name), shardshuffle=False, handler=webdataset.reraise_exception)
        seen = sum(1 for _ in reader)
        unusable = _count_unusable(open_dataset(folder), 0)
        findings = list(check_set(str(folder)))
        ours = f"{unusable} of {len(members)} replaced and reported; `shards check` reports {len(findings)}"
        rows.append(
            Line(f"a flipped byte in a tar's {part}", ours, f"webdataset: {len(members) - seen} lost without an error")
        )
    return rows


def damage_at_random(work: Path, count: int) -> list[Line]:
    """Damage tars and indexes at random in the ways of `DAMAGES`, and count what is lost without a report."""
    small = make_small_set(work / "small")
    (whole, _), images = epoch(small), webdataset_images(small)
    (work / "damaged").mkdir()
    affected = unreported = incomplete = tars = silent = 0
    for trial in trials(small, work / "damaged", count):
        changed = {position for position in whole if trial.seen.get(position) != whole[position]}
        affected += bool(trial.faults)
        incomplete += trial.seen.keys() != whole.keys()
        unreported += not changed <= {fault.position for fault in trial.faults}
        if trial.changed and trial.victim.suffix == ".tar" and trial.faults:
            tars += 1
            silent += webdataset_images(trial.victim.parent) not in (None, images)
        shutil.rmtree(trial.victim.parent)
    ours = f"{affected} affect samples: {unreported} not reported, {incomplete} incomplete epochs"
    return [
        Line(f"{count:,} random faults in tars and indexes", ours, f"webdataset: no error for {silent} of {tars} tars")
    ]


def read_from_unreliable_server(work: Path) -> list[Line]:
    """Read one epoch from a server with 5 % status 503, 2 % resets and 10 % slow responses; count the bytes sent."""
    whole = work / "shards" / "train"
    server = UnreliableServer(whole, unavailable=0.05, reset=0.02, slow=0.10)
    with serve(server):
        cache = Cache(work / "cache", 10**10, FetchPolicy(piece_bytes=1 << 20))
        samples = open_dataset(server.url, cache=cache)
        num_bytes = sum(shard.num_bytes + shard.index_bytes for shard in DatasetInfo.load(whole).shards)
        read = sum(
            1 for shard, size in enumerate(samples.shard_sizes) for row in range(size) if samples.read(shard, row)
        )
        ours = f"{read} of {sum(samples.shard_sizes)} samples, {server.sent / num_bytes:.3f} times the bytes"
        server.sent, server.generator = 0, random.Random(0)
        urls = [f"{server.url}/{path.name}" for path in sorted(whole.glob("*.tar"))]
        seen, error = 0, "no error"
        try:
            seen = sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))
        except Exception as raised:
            error = type(raised).__name__
    return [Line("reading from an unreliable server", ours, f"webdataset: {seen} samples, {error}")]


def _count_unusable(samples: Dataset, shard: int) -> int:
    count = 0
    for row in range(samples.shard_sizes[shard]):
        try:
            samples.read(shard, row)
        except BadSampleError:
            count += 1
    return count


def count_steps(work: Path) -> list[Line]:
    """Count the steps per epoch of four ranks with batches of 16 per rank, for ten shards of different sizes."""
    sizes, tars = [40, 120, 75, 200, 33, 90, 150, 61, 110, 121], []
    for i, size in enumerate(sizes):
        tars.append(str(work / f"uneven-{i}.tar"))
        with webdataset.TarWriter(tars[-1]) as writer:
            for row in range(size):
                writer.write({"__key__": f"{i}-{row}", "txt": "x"})
    theirs, ours = [], []
    for rank in range(4):
        split = partial(_every_fourth, rank)
        reader = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=split).batched(16, partial=False)
        theirs.append(sum(1 for _ in reader))
        shape = {"global_batch_size": 64, "accumulation_steps": 1, "rank": rank, "world_size": 4}
        ours.append(sum(1 for _ in micro_batches(0, sum(sizes) // 64 * 64, **shape)))
    return [Line("steps on 4 ranks, 10 shards of different sizes", str(ours), f"webdataset, split by shard: {theirs}")]


def _every_fourth(rank: int, source: Iterator[object]) -> Iterator[object]:
    return islice(source, rank, None, 4)


def count_classes() -> list[Line]:
    """Count the classes per batch of 256, from 1,280 shards of 1,000 samples that are sorted by their 1,000 classes."""
    labels = np.repeat(np.arange(1000), 1280)
    order = Order([Part("sorted", [1000] * 1280)], 0, 64)
    generator = np.random.default_rng(0)
    counts = []
    for start in generator.integers(0, 1_280_000 - 256, 30).tolist():
        places = [order.locate(position) for position in range(start, start + 256)]
        counts.append(len({int(labels[shard * 1000 + row]) for _, shard, row in places}))
    buffered = []
    for size in (1000, 5000):
        stream = webdataset.filters._shuffle(iter(labels[: size * 3].tolist()), size, size)
        values = list(stream)[: 256 * 4]
        buffered.append(statistics.mean(len(set(values[i : i + 256])) for i in range(0, 1024, 256)))
    theirs = f"webdataset, buffer 1000 and 5000: {buffered[0]:.1f} and {buffered[1]:.1f}"
    # 226: expected number in a uniformly shuffled set.
    return [Line("classes per batch of 256, window 64", f"{statistics.mean(counts):.0f} of 226", theirs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of photos to make")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="data workers of the loaders")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per method; the median is reported")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds for which each loader is timed")
    parser.add_argument("--faults", type=int, default=1000, help="number of damaged files to read")
    parser.add_argument("--json", type=Path, help="JSON file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_photos(work / "photos", arguments.images)
        shards = work / "shards" / "train"
        make_shards(
            list_folder(work / "photos"), work / "shards", ShardOptions(validation_fraction=0.0, shard_bytes=10**7)
        )
        rows = [
            *compare(shards, arguments.images, arguments.workers, arguments.rounds),
            *measure_scaling(open_dataset(shards), arguments.workers, arguments.seconds),
            *measure_slow_storage(shards, arguments.seconds),
            *measure_seek(),
            *measure_first_batch(work),
            *flip_bytes(work),
            *damage_at_random(work, arguments.faults),
            *read_from_unreliable_server(work),
            *count_steps(work),
            *count_classes(),
        ]
    print("| | Vitrail | compared with |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    from benchmarks import input as this_file  # data workers import it only if they need it, as they do in a run

    sys.modules["__main__"] = ModuleType("__main__")
    this_file.main()
