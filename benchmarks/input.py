"""The input stage beside webdataset, Pillow and torch's DataLoader over a folder, all measured in one run.

    python benchmarks/input.py                    # made from scikit-learn's photos, about three minutes

Times are CPU seconds of the process that works, methods in turn, the median of the rounds; ratios are of one run.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader, Dataset

from pretrain.config import AugmentConfig
from pretrain.data.augment import TrainView, crop_box, resize
from pretrain.data.decode import decode
from pretrain.data.index import DatasetInfo
from pretrain.data.loader import training_batches
from pretrain.data.order import Order, Part, micro_batches
from pretrain.data.samples import BadSampleError, Samples
from pretrain.data.sets import open_samples
from pretrain.data.shards.check import check_set
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import Recipe
from pretrain.data.sources import list_folder

SIZE = 224
TUNED_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TOP_PAD_": "16777216",
}
Table = list[tuple[str, str, str]]


def make_photos(folder: Path, count: int) -> None:
    """Write JPEGs of 500 x 375 pixels, pieces of two real photos, in two classes."""
    random = np.random.default_rng(0)
    for name in ("china", "flower"):
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (folder / name).mkdir(parents=True)
        for i in range(count // 2):
            share = random.uniform(0.6, 1.0)
            width, height = int(photo.width * share), int(photo.width * share * 0.66)
            left, top = random.integers(photo.width - width + 1), random.integers(photo.height - height + 1)
            piece = photo.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.LANCZOS)
            piece.save(folder / name / f"{i:05d}.jpg", quality=int(random.integers(90, 96)))


def in_turn(methods: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Return CPU seconds a sample of each method: the median over rounds in which all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            started = time.process_time()
            count = method()
            seconds[name].append((time.process_time() - started) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def reading(samples: Samples, tars: list[Path], rounds: int) -> Table:
    """Raw bytes, before any decoding."""
    total = sum(samples.shard_sizes)
    order = samples.order(0, 64)
    places = [order.locate(position) for position in range(total)]

    def ours() -> int:
        return sum(1 for _, shard, row in places if samples.fetch(shard, row).data)

    def theirs() -> int:
        return sum(1 for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False) if sample)

    def by_tarfile() -> int:
        return sum(1 for tar in tars for data in _tar_members(tar) if data) // 3

    took = in_turn({"ours": ours, "webdataset": theirs, "tarfile": by_tarfile}, rounds)
    rows: Table = [("read a sample, random order", f"{took['ours'] * 1e6:.1f} us", "bar: 25 us")]
    for name in ("webdataset", "tarfile"):
        ratio = took[name] / took["ours"]
        rows.append((f"  {name}, front to back", f"{took[name] * 1e6:.0f} us", f"ours {ratio:.1f}x as fast"))
    return rows


def _tar_members(tar: Path) -> Iterator[bytes]:
    with tarfile.open(tar, "r|") as archive:
        for member in archive:
            file = archive.extractfile(member)
            yield file.read() if file else b""


def crops(count: int) -> list[tuple[int, int, int, int]]:
    """The same random crops for everyone."""
    random = np.random.default_rng(1)
    return [crop_box(375, 500, (0.08, 1.0), (3 / 4, 4 / 3), random) for _ in range(count)]


def by_pillow(encoded: list[bytes]) -> list[np.ndarray]:
    """Decode, crop and resize as most loaders do."""
    out = []
    for data, (top, left, bottom, right) in zip(encoded, crops(len(encoded)), strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, right, bottom))
        out.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return out


def by_us(encoded: list[bytes]) -> list[torch.Tensor]:
    """Decode, crop and resize as the loader's workers do."""
    boxes = crops(len(encoded))
    return [resize(decode(data)[t:b, le:r], SIZE) for data, (t, le, b, r) in zip(encoded, boxes, strict=True)]


def decoding(folder: Path, rounds: int) -> Table:
    """JPEG bytes to a crop of 224, one core; Pillow in processes of its own, with glibc's malloc as it is and tuned.

    All take turns, and a ratio is the median of the rounds' own: the machine may be faster in one than in another.
    """
    encoded = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:300]]
    error = statistics.mean(
        float(np.abs(theirs.astype(int).transpose(2, 0, 1) - ours.numpy().astype(int)).mean())
        for theirs, ours in zip(by_pillow(encoded), by_us(encoded), strict=True)
    )
    tunings = {"Pillow": {}, "Pillow, malloc tuned": TUNED_MALLOC}
    command = [sys.executable, __file__, "--pillow-only", str(folder), "--rounds", "1"]
    took: dict[str, list[float]] = {name: [] for name in ("ours", *tunings)}
    for _ in range(2 * rounds):
        took["ours"].append(in_turn({"ours": lambda: len(by_us(encoded))}, 1)["ours"])
        for name, tuning in tunings.items():
            answer = subprocess.run(command, env={**os.environ, **tuning}, capture_output=True, text=True, check=True)
            took[name].append(float(answer.stdout))
    speeds = {name: f"{1 / statistics.median(seconds):.0f} images/s a core" for name, seconds in took.items()}
    rows: Table = [("decode and crop 500x375 to 224", speeds["ours"], f"error {error:.3f} of 255")]
    for name in tunings:
        ratio = statistics.median(theirs / ours for theirs, ours in zip(took[name], took["ours"], strict=True))
        rows.append((f"  {name}", speeds[name], f"ours {ratio:.2f}x as fast"))
    return rows


class _Folder(Dataset[tuple[torch.Tensor, int]]):
    """What a user writes without a library: Pillow over a folder of files."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.jpg"))
        self.boxes = crops(len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        top, left, bottom, right = self.boxes[i]
        image = Image.open(self.paths[i]).convert("RGB").crop((left, top, right, bottom))
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        return torch.from_numpy(pixels.copy()), 0


def whole_loaders(samples: Samples, tars: list[Path], folder: Path, num_workers: int, rounds: int) -> Table:
    """From the disk to batches of 64 crops in the training process, by the clock: the workers' time counts."""
    total = sum(samples.shard_sizes) // 64 * 64

    def ours() -> int:
        view = TrainView(AugmentConfig(), SIZE)
        loading = training_batches(
            samples,
            view,
            seed=0,
            window=64,
            start=0,
            stop=total,
            global_batch_size=64,
            accumulation_steps=1,
            rank=0,
            world_size=1,
            num_workers=num_workers,
        )
        return sum(len(loaded.tensors["label"]) for loaded in loading)

    def theirs() -> int:
        data = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False)
        data = data.decode("pil").map(_pillow_crop)
        return sum(len(batch) for batch in DataLoader(data, batch_size=64, num_workers=num_workers))

    def folders() -> int:
        loader = DataLoader(_Folder(folder), batch_size=64, num_workers=num_workers, shuffle=True)
        return sum(len(images) for images, _ in loader)

    speeds: dict[str, list[float]] = {}
    methods = {"ours": ours, "webdataset": theirs, "torch DataLoader over a folder": folders}
    for _ in range(rounds):
        for name, method in methods.items():
            started = time.perf_counter()
            count = method()
            speeds.setdefault(name, []).append(count / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    rows: Table = [(f"whole loader, {num_workers} workers", f"{medians['ours']:.0f} images/s", "")]
    for name in list(methods)[1:]:
        rows.append((f"  {name}", f"{medians[name]:.0f} images/s", f"ours {medians['ours'] / medians[name]:.2f}x"))
    return rows


def _pillow_crop(sample: dict[str, object]) -> torch.Tensor:
    image = sample["jpg"]
    assert isinstance(image, Image.Image)
    box = crop_box(image.height, image.width, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng())
    top, left, bottom, right = box
    pixels = np.asarray(image.crop((left, top, right, bottom)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def seeking() -> Table:
    """A billion samples in 100,000 shards: three sets, mixed by weight."""
    parts = [Part(name, [10_000] * count) for name, count in {"a": 50_000, "b": 30_000, "c": 20_000}.items()]
    started = time.perf_counter()
    order = Order(parts, 0, 64, [3.0, 2.0, 1.0])
    built = time.perf_counter()
    order.locate(5 * 10**8)
    sought = time.perf_counter()
    for position in range(5 * 10**8, 5 * 10**8 + 4096):
        order.locate(position)
    walked = (time.perf_counter() - sought) / 4096
    return [
        ("build the order of 10^9 samples", f"{built - started:.3f} s", ""),
        ("seek to the middle", f"{sought - built:.3f} s", "bar: 0.2 s"),
        ("  each position after it", f"{walked * 1e6:.1f} us", "a new window's permutation included"),
    ]


def starting(work: Path) -> Table:
    """From nothing to the first batch, 100,000 shards: the whole `dataset.json` is read, one window's indexes are."""
    info = DatasetInfo.load(work / "shards" / "train")
    folder = work / "many"
    folder.mkdir()
    many = [info.shards[i % len(info.shards)] for i in range(100_000)]
    DatasetInfo(info.class_names, info.class_counts, many).save(folder)
    for path in (work / "shards" / "train").glob("shard-*"):
        (folder / path.name).hardlink_to(path)
    started = time.perf_counter()
    samples = open_samples(folder)
    loading = training_batches(
        samples,
        TrainView(AugmentConfig(), SIZE),
        seed=0,
        window=64,
        start=64 * 1000,
        stop=64 * 2000,
        global_batch_size=64,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        num_workers=1,
    )
    next(loading)
    took = time.perf_counter() - started
    loading.close()
    return [("first batch of 64 at 100,000 shards", f"{took:.2f} s", "bar: 2 s")]


def losing(work: Path) -> Table:
    """One flipped byte in the header of a tar's middle member, and one in its image: who notices?"""
    rows: Table = []
    whole = work / "shards" / "train"
    tar = min(whole.glob("*.tar"))
    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")]
    middle = members[len(members) // 2]
    places = {"header": middle.offset + 5, "image": middle.offset_data + middle.size // 2}
    for what, place in places.items():
        folder = work / f"broken-{what}"
        shutil.copytree(whole, folder)
        data = bytearray(tar.read_bytes())
        data[place] ^= 0x55
        (folder / tar.name).write_bytes(data)
        reader = webdataset.WebDataset(str(folder / tar.name), shardshuffle=False, handler=webdataset.reraise_exception)
        seen = sum(1 for _ in reader)
        unusable = _count_unusable(open_samples(folder), 0)
        findings = list(check_set(folder))
        ours = f"{unusable} of {len(members)} replaced and named; `shards check` lists {len(findings)}"
        rows.append((f"a flipped byte in a tar's {what}", ours, f"webdataset: {len(members) - seen} lost, no error"))
    return rows


def _count_unusable(samples: Samples, shard: int) -> int:
    count = 0
    for row in range(samples.shard_sizes[shard]):
        try:
            samples.read(shard, row)
        except BadSampleError:
            count += 1
    return count


def even_steps(work: Path) -> Table:
    """Ten uneven shards on four ranks, batches of 16 a rank: steps an epoch. Both are counted, not computed."""
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
    return [("steps on 4 ranks, 10 uneven shards", str(ours), f"webdataset, split by shard: {theirs}")]


def _every_fourth(rank: int, source: Iterator[object]) -> Iterator[object]:
    return islice(source, rank, None, 4)


def shuffling() -> Table:
    """Classes in a batch of 256 from 1,280 class-sorted shards of 1,000 samples over 1,000 classes."""
    labels = np.repeat(np.arange(1000), 1280)
    order = Order([Part("sorted", [1000] * 1280)], 0, 64)
    random = np.random.default_rng(0)
    counts = []
    for start in random.integers(0, 1_280_000 - 256, 30).tolist():
        places = [order.locate(position) for position in range(start, start + 256)]
        counts.append(len({int(labels[shard * 1000 + row]) for _, shard, row in places}))
    buffered = []
    for size in (1000, 5000):
        stream = webdataset.filters._shuffle(iter(labels[: size * 3].tolist()), size, size)
        values = list(stream)[: 256 * 4]
        buffered.append(statistics.mean(len(set(values[i : i + 256])) for i in range(0, 1024, 256)))
    theirs = f"webdataset, buffer 1000 and 5000: {buffered[0]:.1f} and {buffered[1]:.1f}"
    return [("classes in a batch of 256, window 64", f"{statistics.mean(counts):.0f} of 226", theirs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="photos to make")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the whole loaders")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--pillow-only", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.pillow_only:
        encoded = [path.read_bytes() for path in sorted(arguments.pillow_only.rglob("*.jpg"))[:300]]
        print(in_turn({"pillow": lambda: len(by_pillow(encoded))}, arguments.rounds)["pillow"])
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_photos(work / "photos", arguments.images)
        source = list_folder(work / "photos")
        make_shards(source, work / "shards", Recipe(validation=0.0, shard_bytes=10**7, seed=0))
        samples = open_samples(work / "shards" / "train")
        tars = sorted((work / "shards" / "train").glob("*.tar"))
        rows = [
            *reading(samples, tars, arguments.rounds),
            *decoding(work / "photos", arguments.rounds),
            *whole_loaders(samples, tars, work / "photos", arguments.workers, arguments.rounds),
            *seeking(),
            *starting(work),
            *losing(work),
            *even_steps(work),
            *shuffling(),
        ]
    print("| | Tessera | beside it |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
