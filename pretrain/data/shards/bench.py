"""Compare our input pipeline with webdataset, Pillow and torch's DataLoader on the user's own shards.

Reading, decoding and writing are measured in CPU seconds of one process, whole loaders in elapsed time. All methods are
measured in turn, and a ratio is the median of the ratios of all rounds, because a machine's speed varies over time.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from pretrain.config import AugmentConfig, SourceConfig
from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.open import open_cache, open_dataset
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.loading.loader import BatchPlan, LoadedBatch, training_batches
from pretrain.data.loading.stream import TarStreamBatches, open_tar_stream
from pretrain.data.loading.workers import CONTEXT
from pretrain.data.shards.encoding import StoredImage
from pretrain.data.shards.writer import ShardWriter
from pretrain.data.storage.remote import FetchPolicy
from pretrain.data.storage.webdataset import IMAGE_EXTENSIONS
from pretrain.data.transforms.decode import ImageArray, decode, to_rgb
from pretrain.data.transforms.views import TrainView, crop_box, resize
from pretrain.errors import DataError

IMAGE_SIZE, BATCH_SIZE = 224, 64
NUM_DECODED_IMAGES = 300
NUM_ROWS = 12
STREAM_BUFFER = 100  # samples; webdataset is measured without a buffer
WARM_UP_BATCHES, MAX_BATCHES = 4, 10**6
TUNED_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TOP_PAD_": "16777216",
}
Method = Callable[[], int]  # does the work and returns the number of samples


class Line(NamedTuple):
    """One line of the comparison.

    Attributes:
        what: Name of the measurement.
        value: The measured value.
        comparison: Line with our value, or a remark.
    """

    what: str
    value: str
    comparison: str


def compare(folder: Path, num_samples: int, num_workers: int, rounds: int) -> Iterator[Line]:
    """Yield the comparison line by line.

    Args:
        folder: Folder of a split, with its tars and `dataset.json`.
        num_samples: Maximum number of samples to read.
        num_workers: Number of loader workers.
        rounds: Number of rounds in which all methods are measured.

    Raises:
        DataError: If the folder holds images instead of shards.
    """
    dataset = _open(folder)
    if not isinstance(dataset, ShardDataset):
        raise DataError(f"{folder}: is a folder of images; create shards from it with `vitrail shards make`")
    tars = [Path(tar) for tar in dataset.tars]
    locations = _locations(dataset, min(num_samples, NUM_DECODED_IMAGES))
    encoded = [dataset.fetch(shard, row) for _, shard, row in locations]
    yield from reading(dataset, tars, num_samples, rounds)
    yield from decoding(folder, [one.data for one in encoded], rounds)
    yield from writing(encoded, rounds)
    yield from whole_loaders(dataset, tars, num_samples, num_workers, rounds)


def _open(folder: Path) -> Dataset:
    """Open a local split with the cache folder that a run uses by default, which may have its index."""
    return open_dataset(folder, cache=open_cache(SourceConfig(train=str(folder))), labeled=False)


def reading(dataset: Dataset, tars: Sequence[Path], num_samples: int, rounds: int) -> Iterator[Line]:
    """Compare reading encoded samples: ours in random order, the others from start to end of each tar."""
    locations = _locations(dataset, num_samples)

    def ours() -> int:
        return sum(1 for _, shard, row in locations if dataset.fetch(shard, row).data)

    def theirs() -> int:
        return sum(1 for sample, _ in zip(_webdataset(tars), range(num_samples), strict=False) if sample)

    def by_tarfile() -> int:
        return sum(1 for key, _ in zip(_tar_keys(tars), range(num_samples), strict=False) if key)

    seconds = in_turn({"ours": ours, "webdataset": theirs, "tarfile": by_tarfile}, rounds)
    yield Line("read a sample, random order", f"{statistics.median(seconds['ours']) * 1e6:.1f} us", "")
    for name in ("webdataset", "tarfile"):
        value = f"{statistics.median(seconds[name]) * 1e6:.0f} us"
        yield Line(f"  {name}, sequential", value, f"ours is {_ratio(seconds, name):.1f}x as fast")


def decoding(folder: Path, encoded: list[bytes], rounds: int) -> Iterator[Line]:
    """Compare decoding and cropping on one core; Pillow with glibc's default and with tuned malloc settings."""
    errors = [
        float(np.abs(theirs.astype(int).transpose(2, 0, 1) - ours.numpy().astype(int)).mean())
        for theirs, ours in zip(by_pillow(encoded), by_us(encoded), strict=True)
    ]
    tunings = {"Pillow": {}, "Pillow, malloc tuned": TUNED_MALLOC}
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *tunings)}
    with ExitStack() as stack:
        pillows = {name: stack.enter_context(_pillow(folder, len(encoded), tuning)) for name, tuning in tunings.items()}
        for _ in range(2 * rounds):
            seconds["ours"] += in_turn({"ours": lambda: len(by_us(encoded))}, 1)["ours"]
            for name, pillow in pillows.items():
                seconds[name].append(pillow())
    speeds = {name: f"{1 / statistics.median(all_):.0f} images/s per core" for name, all_ in seconds.items()}
    difference = f"mean difference {statistics.mean(errors):.3f} of 255"
    yield Line(f"decode and crop to {IMAGE_SIZE}", speeds["ours"], difference)
    for name in tunings:
        yield Line(f"  {name}", speeds[name], f"ours is {_ratio(seconds, name):.2f}x as fast")


def writing(encoded: Sequence[EncodedSample], rounds: int) -> Iterator[Line]:
    """Compare writing a tar; ours includes the checksums of all images and of the tar, and the index."""
    images = [Image.open(io.BytesIO(one.data)) for one in encoded]
    stored = [
        StoredImage(one.data, (image.format or "png").lower().replace("jpeg", "jpg"), image.width, image.height)
        for one, image in zip(encoded, images, strict=True)
    ]
    with tempfile.TemporaryDirectory() as name:

        def ours() -> int:
            writer = ShardWriter(Path(name) / "ours.tar")
            for one, image in zip(encoded, stored, strict=True):
                writer.add(one.key, image, max(one.label, 0), {"json": json.dumps({"source": one.key}).encode()})
            writer.close().save(Path(name))
            return len(encoded)

        def theirs() -> int:
            with webdataset.TarWriter(f"{name}/theirs.tar") as writer:
                for one, image in zip(encoded, stored, strict=True):
                    content = {image.extension: image.data, "cls": max(one.label, 0), "json": {"source": one.key}}
                    writer.write({"__key__": one.key, **content})
            return len(encoded)

        seconds = in_turn({"ours": ours, "theirs": theirs}, 3 * rounds)
    num_bytes = statistics.mean(len(one.data) for one in encoded)
    speeds = {
        name: f"{1 / statistics.median(all_):.0f} samples/s, {num_bytes / statistics.median(all_) / 1e6:.0f} MB/s"
        for name, all_ in seconds.items()
    }
    yield Line("write a tar, checksums and index", speeds["ours"], "")
    yield Line("  webdataset.TarWriter", speeds["theirs"], f"ours is {_ratio(seconds, 'theirs'):.2f}x as fast")


def whole_loaders(
    dataset: Dataset, tars: Sequence[Path], num_samples: int, num_workers: int, rounds: int
) -> Iterator[Line]:
    """Compare loading batches of 64 crops from the disk into the training process, in elapsed time."""
    count = min(num_samples, sum(dataset.shard_sizes))
    stop = count // BATCH_SIZE * BATCH_SIZE or count

    def ours() -> int:
        loading = _batches(dataset, IMAGE_SIZE, min(BATCH_SIZE, count), stop, num_workers)
        return sum(len(loaded.tensors["label"]) for loaded in loading)

    some_tars, held = [], 0
    for tar, size in zip(tars, dataset.shard_sizes, strict=True):
        if held < count:
            some_tars.append(tar)
            held += size

    def streamed() -> int:
        stream = open_tar_stream([str(tar) for tar in some_tars], [], STREAM_BUFFER, FetchPolicy())
        plan = BatchPlan(seed=0, shuffle_window=1, global_batch_size=min(BATCH_SIZE, count), num_workers=num_workers)
        loading = TarStreamBatches(stream, plan, first_tar=0).load(TrainView(AugmentConfig(), IMAGE_SIZE), 0, stop)
        return sum(len(loaded.tensors["label"]) for loaded in loading)

    def theirs() -> int:
        data = _webdataset(some_tars).decode("pil").map(_crop_of_sample)
        return sum(len(batch) for batch in _torch_loader(data, num_workers))

    with tempfile.TemporaryDirectory() as name:
        for i, (_, shard, row) in enumerate(_locations(dataset, count)):
            (Path(name) / f"{i:08d}").write_bytes(dataset.fetch(shard, row).data)

        def folder() -> int:
            return sum(len(batch) for batch in _torch_loader(_Folder(Path(name)), num_workers, shuffle=True))

        methods = {
            "ours": ours,
            "ours as a stream": streamed,
            "webdataset": theirs,
            "torch DataLoader over a folder": folder,
        }
        seconds = in_turn(methods, rounds, time.perf_counter)
    speeds = {name: f"{1 / statistics.median(all_):.0f} images/s" for name, all_ in seconds.items()}
    yield Line(f"whole loader, {num_workers} workers", speeds["ours"], "")
    for other in list(methods)[1:]:
        yield Line(f"  {other}", speeds[other], f"ours is {_ratio(seconds, other):.2f}x as fast")


def _torch_loader(data: Any, num_workers: int, **options: Any) -> "DataLoader[Any]":
    """Return torch's DataLoader with workers that are started in the same way as ours."""
    context = CONTEXT if num_workers else None
    return DataLoader(data, batch_size=BATCH_SIZE, num_workers=num_workers, multiprocessing_context=context, **options)


def loader_rate(dataset: Dataset, image_size: int, num_workers: int, seconds: float, num_threads: int = 1) -> float:
    """Measure the images per second of a loader with the default crop, after its workers have started.

    Args:
        dataset: Images.
        image_size: Side length of the crops in pixels.
        num_workers: Number of loader workers.
        seconds: Duration of the measurement.
        num_threads: Number of reader threads per worker.
    """
    batch = min(BATCH_SIZE, sum(dataset.shard_sizes))
    loading = _batches(dataset, image_size, batch, MAX_BATCHES * batch, num_workers, num_threads)
    with closing(loading):
        for _ in islice(loading, WARM_UP_BATCHES * num_workers):
            pass
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            count += len(next(loading).tensors["label"])
        return count / (time.perf_counter() - started)


def _batches(
    dataset: Dataset, image_size: int, batch: int, stop: int, num_workers: int, num_threads: int = 1
) -> Generator[LoadedBatch, None, None]:
    return training_batches(
        dataset,
        TrainView(AugmentConfig(), image_size),
        BatchPlan(
            seed=0,
            shuffle_window=64,
            global_batch_size=batch,
            num_workers=num_workers,
            num_threads=num_threads,
        ),
        start=0,
        stop=stop,
    )


def in_turn(
    methods: dict[str, Method], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Measure each method once per round; return its seconds per sample in each round.

    Args:
        methods: Methods by name.
        rounds: Number of rounds.
        clock: Function that returns the time in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            started = clock()
            count = method()
            seconds[name].append((clock() - started) / count)
    return seconds


def by_pillow(encoded: Sequence[bytes]) -> list[ImageArray]:
    """Decode, crop and resize with Pillow, as most loaders do [H, W, 3]."""
    random = np.random.default_rng(1)
    return [_crop(to_rgb(Image.open(io.BytesIO(data))), random) for data in encoded]


def by_us(encoded: Sequence[bytes]) -> list[torch.Tensor]:
    """Decode, crop and resize as our loader workers do, with the same crops [3, H, W]."""
    random, out = np.random.default_rng(1), []
    for data in encoded:
        pixels = decode(data)
        height, width, _ = pixels.shape
        top, left, bottom, right = crop_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), random)
        out.append(resize(pixels[top:bottom, left:right], IMAGE_SIZE))
    return out


def _ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True))


def _locations(dataset: Dataset, count: int) -> list[tuple[int, int, int]]:
    """Return (epoch, shard, row) of the first samples of a run."""
    order = dataset.order(0, 64)
    return [order.locate(position) for position in range(min(count, sum(dataset.shard_sizes)))]


def _webdataset(tars: Sequence[Path]) -> Any:
    return webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False)


def _tar_keys(tars: Sequence[Path]) -> Iterator[str]:
    """Yield the key of each sample after reading all its members, as a reader without an index does."""
    for tar in tars:
        key = ""
        with tarfile.open(tar, "r|") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file:
                    file.read()
                if (found := member.name.partition(".")[0]) != key:
                    key = found
                    yield key


def _crop(image: Image.Image, random: np.random.Generator) -> ImageArray:
    top, left, bottom, right = crop_box(image.height, image.width, (0.08, 1.0), (3 / 4, 4 / 3), random)
    return np.asarray(image.crop((left, top, right, bottom)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def _crop_of_sample(sample: dict[str, Any]) -> npt.NDArray[np.uint8]:
    image = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
    return _crop(image.convert("RGB"), np.random.default_rng()).transpose(2, 0, 1).copy()


class _Folder(TorchDataset[npt.NDArray[np.uint8]]):
    """A dataset as users write it without a library: Pillow over a folder of files."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> npt.NDArray[np.uint8]:
        return _crop(to_rgb(Image.open(self.paths[i])), np.random.default_rng(i)).transpose(2, 0, 1).copy()


@contextmanager
def _pillow(folder: Path, count: int, tuning: dict[str, str]) -> Iterator[Callable[[], float]]:
    """Start a process with its own malloc settings; yield a function that returns its seconds per image with Pillow."""
    command = [sys.executable, "-m", "pretrain.data.shards.bench", str(folder.resolve()), str(count)]
    root, pipe = str(Path(__file__).parents[3]), subprocess.PIPE
    with subprocess.Popen(
        command, cwd=root, env={**os.environ, **tuning}, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def measure() -> float:
            print(file=process.stdin, flush=True)
            return float(process.stdout.readline())  # type: ignore[union-attr]

        try:
            yield measure
        finally:
            process.kill()


def _serve_measurements(folder: Path, count: int) -> None:
    """Measure Pillow and print the result each time that a line is read from stdin."""
    dataset = _open(folder)
    encoded = [dataset.fetch(shard, row).data for _, shard, row in _locations(dataset, count)]
    for _ in sys.stdin:
        print(in_turn({"pillow": lambda: len(by_pillow(encoded))}, 1)["pillow"][0], flush=True)


if __name__ == "__main__":
    _serve_measurements(Path(sys.argv[1]), int(sys.argv[2]))
