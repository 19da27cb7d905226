"""Our input stage beside webdataset, Pillow and torch's DataLoader, on a user's own shards, in one run.

Reading, decoding and writing are measured in CPU seconds of one process, whole loaders by the clock. All methods take
turns, and a ratio is the median of the rounds' own: a machine may be faster in one round than in the next.
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

from pretrain.config import AugmentConfig
from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.open import open_dataset
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.loading.loader import BatchPlan, LoadedBatch, training_batches
from pretrain.data.shards.encoding import Stored
from pretrain.data.shards.writer import ShardWriter
from pretrain.data.storage.webdataset import IMAGE_EXTENSIONS
from pretrain.data.transforms.decode import ImageArray, decode, to_rgb
from pretrain.data.transforms.views import TrainView, crop_box, resize
from pretrain.errors import DataError

SIZE, BATCH = 224, 64
IMAGES_DECODED = 300
ROWS = 11
WARM_UP, FOREVER = 4, 10**6  # batches
TUNED_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TOP_PAD_": "16777216",
}
Method = Callable[[], int]  # does the work, returns how many samples it was


class Row(NamedTuple):
    """A line of the comparison: what, our figure, and what stands beside it."""

    what: str
    ours: str
    beside: str


def compare(folder: Path, num_samples: int, num_workers: int, rounds: int) -> Iterator[Row]:
    """Yield the whole comparison, line by line.

    Args:
        folder: a split with a `dataset.json`, its tars beside it.
        num_samples: read at most so many.
        num_workers: of the whole loaders.
        rounds: in which all methods take turns.

    Raises:
        DataError: it is no shard set of this machine.
    """
    samples = open_dataset(folder)
    if not isinstance(samples, ShardDataset):
        raise DataError(f"{folder}: a plain folder; make shards of it first, with `vitrail shards make`")
    tars = [folder / entry.name for entry in samples.entries]
    encoded = [samples.fetch(*place[1:]) for place in _places(samples, min(num_samples, IMAGES_DECODED))]
    yield from reading(samples, tars, num_samples, rounds)
    yield from decoding(folder, [one.data for one in encoded], rounds)
    yield from writing(encoded, rounds)
    yield from whole_loaders(samples, tars, num_samples, num_workers, rounds)


def reading(samples: Dataset, tars: Sequence[Path], num_samples: int, rounds: int) -> Iterator[Row]:
    """Compare raw bytes, before any decoding: ours in random order, the others from front to back."""
    places = _places(samples, num_samples)

    def ours() -> int:
        return sum(1 for _, shard, row in places if samples.fetch(shard, row).data)

    def theirs() -> int:
        return sum(1 for sample, _ in zip(_webdataset(tars), range(num_samples), strict=False) if sample)

    def by_tarfile() -> int:
        return sum(1 for key, _ in zip(_tar_keys(tars), range(num_samples), strict=False) if key)

    took = in_turn({"ours": ours, "webdataset": theirs, "tarfile": by_tarfile}, rounds)
    yield Row("read a sample, random order", f"{statistics.median(took['ours']) * 1e6:.1f} us", "")
    for name in ("webdataset", "tarfile"):
        what = f"{statistics.median(took[name]) * 1e6:.0f} us"
        yield Row(f"  {name}, front to back", what, f"ours {_ratio(took, name):.1f}x as fast")


def decoding(folder: Path, encoded: list[bytes], rounds: int) -> Iterator[Row]:
    """Compare an image's bytes to a crop of 224, one core; Pillow with glibc's malloc as it is, and tuned."""
    errors = [
        float(np.abs(theirs.astype(int).transpose(2, 0, 1) - ours.numpy().astype(int)).mean())
        for theirs, ours in zip(by_pillow(encoded), by_us(encoded), strict=True)
    ]
    tunings = {"Pillow": {}, "Pillow, malloc tuned": TUNED_MALLOC}
    took: dict[str, list[float]] = {name: [] for name in ("ours", *tunings)}
    with ExitStack() as stack:
        pillows = {name: stack.enter_context(_pillow(folder, len(encoded), tuning)) for name, tuning in tunings.items()}
        for _ in range(2 * rounds):
            took["ours"] += in_turn({"ours": lambda: len(by_us(encoded))}, 1)["ours"]
            for name, pillow in pillows.items():
                took[name].append(pillow())
    speeds = {name: f"{1 / statistics.median(seconds):.0f} images/s a core" for name, seconds in took.items()}
    yield Row(f"decode and crop to {SIZE}", speeds["ours"], f"error {statistics.mean(errors):.3f} of 255")
    for name in tunings:
        yield Row(f"  {name}", speeds[name], f"ours {_ratio(took, name):.2f}x as fast")


def writing(encoded: Sequence[EncodedSample], rounds: int) -> Iterator[Row]:
    """Compare images to a tar; ours with a checksum of every image and of the tar, and the index."""
    images = [Image.open(io.BytesIO(one.data)) for one in encoded]
    stored = [
        Stored(one.data, (image.format or "png").lower().replace("jpeg", "jpg"), image.width, image.height)
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

        took = in_turn({"ours": ours, "theirs": theirs}, 3 * rounds)
    num_bytes = statistics.mean(len(one.data) for one in encoded)
    speeds = {
        name: f"{1 / statistics.median(seconds):.0f} samples/s, {num_bytes / statistics.median(seconds) / 1e6:.0f} MB/s"
        for name, seconds in took.items()
    }
    yield Row("write a tar, checksums and index", speeds["ours"], "")
    yield Row("  webdataset.TarWriter", speeds["theirs"], f"ours {_ratio(took, 'theirs'):.2f}x as fast")


def whole_loaders(
    samples: Dataset, tars: Sequence[Path], num_samples: int, num_workers: int, rounds: int
) -> Iterator[Row]:
    """Compare the way from the disk to batches of 64 crops in the training process, by the clock."""
    count = min(num_samples, sum(samples.shard_sizes))

    def ours() -> int:
        loading = _batches(samples, SIZE, min(BATCH, count), count // BATCH * BATCH or count, num_workers)
        return sum(len(loaded.tensors["label"]) for loaded in loading)

    some_tars, held = [], 0
    for tar, size in zip(tars, samples.shard_sizes, strict=True):
        if held < count:
            some_tars.append(tar)
            held += size

    def theirs() -> int:
        data = _webdataset(some_tars).decode("pil").map(_crop_of_sample)
        return sum(len(batch) for batch in DataLoader(data, batch_size=BATCH, num_workers=num_workers))

    with tempfile.TemporaryDirectory() as name:
        for i, place in enumerate(_places(samples, count)):
            (Path(name) / f"{i:08d}").write_bytes(samples.fetch(*place[1:]).data)

        def folder() -> int:
            loader = DataLoader(_Folder(Path(name)), batch_size=BATCH, num_workers=num_workers, shuffle=True)
            return sum(len(batch) for batch in loader)

        methods = {"ours": ours, "webdataset": theirs, "torch DataLoader over a folder": folder}
        took = in_turn(methods, rounds, time.perf_counter)
    speeds = {name: f"{1 / statistics.median(seconds):.0f} images/s" for name, seconds in took.items()}
    yield Row(f"whole loader, {num_workers} workers", speeds["ours"], "")
    for other in list(methods)[1:]:
        yield Row(f"  {other}", speeds[other], f"ours {_ratio(took, other):.2f}x as fast")


def loader_rate(samples: Dataset, image_size: int, num_workers: int, seconds: float, num_threads: int = 1) -> float:
    """Return the images a second that a loader makes once its workers run, with the default crop."""
    batch = min(BATCH, sum(samples.shard_sizes))
    loading = _batches(samples, image_size, batch, FOREVER * batch, num_workers, num_threads)
    with closing(loading):
        for _ in islice(loading, WARM_UP * num_workers):
            pass
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            count += len(next(loading).tensors["label"])
        return count / (time.perf_counter() - started)


def _batches(
    samples: Dataset, image_size: int, batch: int, stop: int, num_workers: int, num_threads: int = 1
) -> Generator[LoadedBatch, None, None]:
    return training_batches(
        samples,
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
    """Return the seconds a sample of each method in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            started = clock()
            count = method()
            seconds[name].append((clock() - started) / count)
    return seconds


def by_pillow(encoded: Sequence[bytes]) -> list[ImageArray]:
    """Decode, crop and resize as most loaders do."""
    random = np.random.default_rng(1)
    return [_crop(to_rgb(Image.open(io.BytesIO(data))), random) for data in encoded]


def by_us(encoded: Sequence[bytes]) -> list[torch.Tensor]:
    """Decode, crop and resize as the loader's workers do, the same crops."""
    random, out = np.random.default_rng(1), []
    for data in encoded:
        pixels = decode(data)
        height, width, _ = pixels.shape
        top, left, bottom, right = crop_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), random)
        out.append(resize(pixels[top:bottom, left:right], SIZE))
    return out


def _ratio(took: dict[str, list[float]], name: str) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(took[name], took["ours"], strict=True))


def _places(samples: Dataset, count: int) -> list[tuple[int, int, int]]:
    order = samples.order(0, 64)
    return [order.locate(position) for position in range(min(count, sum(samples.shard_sizes)))]


def _webdataset(tars: Sequence[Path]) -> Any:
    return webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False)


def _tar_keys(tars: Sequence[Path]) -> Iterator[str]:
    """Yield each sample's key after reading all its members, as a reader of tars does who has no index."""
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
    return np.asarray(image.crop((left, top, right, bottom)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _crop_of_sample(sample: dict[str, Any]) -> npt.NDArray[np.uint8]:
    image = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
    return _crop(image.convert("RGB"), np.random.default_rng()).transpose(2, 0, 1).copy()


class _Folder(TorchDataset[npt.NDArray[np.uint8]]):
    """What a user writes without a library: Pillow over a folder of files."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> npt.NDArray[np.uint8]:
        return _crop(to_rgb(Image.open(self.paths[i])), np.random.default_rng(i)).transpose(2, 0, 1).copy()


@contextmanager
def _pillow(folder: Path, count: int, tuning: dict[str, str]) -> Iterator[Callable[[], float]]:
    """Start a process in which malloc can be tuned; what is yielded asks it for Pillow's seconds an image."""
    command = [sys.executable, "-m", "pretrain.data.shards.bench", str(folder.resolve()), str(count)]
    root, pipe = str(Path(__file__).parents[3]), subprocess.PIPE
    with subprocess.Popen(
        command, cwd=root, env={**os.environ, **tuning}, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> float:
            print(file=process.stdin, flush=True)
            return float(process.stdout.readline())  # type: ignore[union-attr]

        try:
            yield ask
        finally:
            process.kill()


def _answer(folder: Path, count: int) -> None:
    """Time Pillow each time that a line is read."""
    samples = open_dataset(folder)
    encoded = [samples.fetch(shard, row).data for _, shard, row in _places(samples, count)]
    for _ in sys.stdin:
        print(in_turn({"pillow": lambda: len(by_pillow(encoded))}, 1)["pillow"][0], flush=True)


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), int(sys.argv[2]))
