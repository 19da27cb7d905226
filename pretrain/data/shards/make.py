"""Turn images into shards: plain WebDataset tars, an index next to each, and one `dataset.json` per split.

The content of every shard is planned before any is written. Each shard is therefore an independent task: any number of
workers writes the same bytes, and a command that was stopped continues where it was. All work happens in OUT.partial,
whose `out` is renamed to OUT at the end.
"""

import fcntl
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.data.shards.encoding import Encoding, StoredImage
from pretrain.data.shards.plan import (
    NUM_READERS,
    PLAN_FILE,
    SAMPLE_ERRORS,
    ShardOptions,
    leave_out_unusable_classes,
    plan_shards,
)
from pretrain.data.shards.tasks import Executor, run_tasks
from pretrain.data.shards.writer import ShardWriter
from pretrain.data.sources.source import MAX_NAMES_SHOWN, Content, Integers, Source, SourceImage, summarize
from pretrain.data.storage.index import LEFT_OUT_FILE, NO_LABEL, DatasetInfo, ShardEntry, index_name, write_json
from pretrain.errors import DataError
from pretrain.files import partial_path, publish

READ_AHEAD = 32

Progress = Callable[[int], None]


@dataclass(frozen=True)
class ShardTask:
    """The task of writing one shard.

    Attributes:
        tar: Path of the tar.
        result_file: Path of the JSON file that marks the shard as written.
        images: Images of the shard, in order.
        class_names: Name of each class, in the order of the labels.
        encoding: Conversion of images before they are stored.
    """

    tar: Path
    result_file: Path
    images: list[SourceImage]
    class_names: list[str]
    encoding: Encoding


@dataclass(frozen=True)
class WrittenShard:
    """The result of a `ShardTask`.

    Attributes:
        entry: The shard's entry in `dataset.json`.
        class_counts: Number of samples by label.
        left_out: Images that could not be used, with the reason, one line each.
        scaled_from: Number of 16-bit images that were scaled to 8 bits, by the bits that their values used.
    """

    entry: ShardEntry
    class_counts: dict[int, int]
    left_out: list[str]
    scaled_from: dict[int, int]


@dataclass(frozen=True)
class MadeShards:
    """The result of `make_shards`.

    Attributes:
        splits: Content of `dataset.json` by the name of the split.
        left_out: Images that could not be used, with the reason, one line each.
        scaled_from: Number of 16-bit images that were scaled to 8 bits, by the bits that their values used.
    """

    splits: dict[str, DatasetInfo]
    left_out: list[str]
    scaled_from: dict[int, int]

    @property
    def notes(self) -> list[str]:
        """Remarks for the user: classes that a model cannot learn."""
        info = self.splits["train"]
        empty = [name for name, count in zip(info.class_names, info.class_counts, strict=True) if not count]
        return summarize(empty, "class without training images", "classes without training images")


def make_shards(
    source: Source,
    out: Path,
    options: ShardOptions,
    *,
    skip_bad: bool = False,
    executor: Executor[ShardTask, WrittenShard] = run_tasks,
    progress: Progress = lambda _: None,
) -> MadeShards:
    """Write the shards of `out/train` and `out/validation`.

    Args:
        source: Images.
        out: Output folder, which must not exist yet.
        options: Options for the split, the order, the encoding and the size of shards.
        skip_bad: Whether to leave out images that cannot be used, instead of raising an error.
        executor: Function that runs the tasks; if it uses several machines, all must see `out` and the source.
        progress: Function called with the number of images finished since the last call. Images that an earlier,
            interrupted call has finished are reported first.

    Raises:
        DataError: If `out` exists, the source has no images, or images would be lost and `skip_bad` is not set.
    """
    refuse_existing(out)
    if source.problems and not skip_bad:
        problems = "\n".join(f"  {problem}" for problem in source.problems)
        unreadable = _describe_unreadable(_find_unreadable(source, options.encoding, progress))
        raise DataError(f"some data would be lost:\n{problems}\n{unreadable}fix this, or leave it out with --skip-bad")
    if not len(source):
        raise DataError("the source has no images; check its path")
    work_folder = partial_path(out)
    with _claim(work_folder):
        whole = source
        source, lost = leave_out_unusable_classes(source, options) if skip_bad else (source, [])
        if not len(source):
            raise DataError(f"no training image is readable; check the source. The first fault: {lost[1]}")
        shards = plan_shards(source, options, work_folder, replaced=whole)
        written = _write_missing(source, options.encoding, shards, work_folder, skip_bad, executor, progress)
        made = _summarize(source.class_names, written, lost)
        _check(made, skip_bad)
        for name, info in made.splits.items():
            info.save(work_folder / "out" / name)
        if made.left_out:
            (work_folder / "out" / LEFT_OUT_FILE).write_text("\n".join(made.left_out) + "\n")
        publish(work_folder / "out", out)
        shutil.rmtree(work_folder)
    return made


def refuse_existing(out: Path) -> None:
    """Check that the output folder does not exist.

    Raises:
        DataError: If it exists.
    """
    if out.exists():
        raise DataError(f"{out}: already exists; choose another folder or remove it")


def write_shard(task: ShardTask) -> WrittenShard:
    """Write one shard, its index and its result file."""
    left_out, scaled_from = list[str](), Counter[int]()
    writer = ShardWriter(task.tar)
    try:
        for image, content, stored in _read_encoded(task.images, task.encoding, left_out):
            name = {} if image.label == NO_LABEL else {"class": task.class_names[image.label]}
            metadata = {**name, "source": image.origin, **content.metadata, **name}
            text = json.dumps(metadata, ensure_ascii=False, default=str).encode()
            writer.add(image.key, stored, image.label, {"json": text, **content.members})
            scaled_from.update([stored.scaled_from] if stored.scaled_from else [])
    except BaseException:
        writer.abandon()
        raise
    index = writer.close()
    written = WrittenShard(index.save(task.tar.parent), dict(Counter(index.label)), left_out, dict(scaled_from))
    write_json(task.result_file, asdict(written))
    return written


def _read_encoded(
    images: Sequence[SourceImage], encoding: Encoding, left_out: list[str]
) -> Iterator[tuple[SourceImage, Content, StoredImage]]:
    """Yield each image with its content and its stored form, in order; threads read ahead."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        ahead: deque[tuple[SourceImage, Future[Content]]] = deque()
        for i in range(len(images) + READ_AHEAD):
            if i < len(images):
                ahead.append((images[i], pool.submit(images[i].read)))
            if i >= READ_AHEAD and ahead:
                image, future = ahead.popleft()
                try:
                    content = future.result()
                    yield image, content, encoding(content.image)
                except SAMPLE_ERRORS as error:
                    left_out.append(f"{image.origin}: {error}")


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Lock the working folder, so that only one command writes to it.

    Raises:
        DataError: If another command holds the lock, or the folder contains other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = {"lock", PLAN_FILE, partial_path(Path(PLAN_FILE)).name, "done", "out"}
    if not {path.name for path in folder.iterdir()} <= ours:
        raise DataError(f"{folder}: shards are written in this folder, but it contains other files; move them away")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another command is writing to this folder; wait for it or stop it") from None
        yield


def _write_missing(
    source: Source,
    encoding: Encoding,
    shards: dict[str, list[Integers]],
    folder: Path,
    skip_bad: bool,
    executor: Executor[ShardTask, WrittenShard],
    progress: Progress,
) -> dict[str, list[WrittenShard]]:
    """Write every shard that is not written yet; return all of them by split."""
    (folder / "done").mkdir(exist_ok=True)
    written: dict[str, list[WrittenShard | None]] = {}
    missing = []
    for name, rows_of_shards in shards.items():
        (folder / "out" / name).mkdir(parents=True, exist_ok=True)
        written[name] = [_load_written(folder, name, number) for number in range(len(rows_of_shards))]
        for number, (rows, shard) in enumerate(zip(rows_of_shards, written[name], strict=True)):
            if shard is None or (shard.left_out and not skip_bad):
                missing.append((name, number, rows))
            else:
                progress(len(rows))

    def task(name: str, number: int, rows: Integers) -> ShardTask:
        tar, images = folder / "out" / name / f"shard-{number:06d}.tar", [source.image(int(row)) for row in rows]
        return ShardTask(tar, _result_file(folder, name, number), images, source.class_names, encoding)

    with closing(executor(write_shard, (task(*which) for which in missing))) as results:
        for (name, number, rows), shard in zip(missing, results, strict=True):
            written[name][number] = shard
            progress(len(rows))
    return {name: [shard for shard in known if shard] for name, known in written.items()}


def _result_file(folder: Path, name: str, number: int) -> Path:
    return folder / "done" / f"{name}-{number:06d}.json"


def _load_written(folder: Path, name: str, number: int) -> WrittenShard | None:
    """Return the result for a shard if its tar and index are complete: a power failure may have truncated them."""
    try:
        content = json.loads(_result_file(folder, name, number).read_bytes())
        shard = WrittenShard(
            ShardEntry(**content["entry"]),
            {int(label): count for label, count in content["class_counts"].items()},
            content["left_out"],
            {int(bits): count for bits, count in content["scaled_from"].items()},
        )
        out = folder / "out" / name
        sizes = [(out / file).stat().st_size for file in (shard.entry.name, index_name(shard.entry.name))]
    except (OSError, ValueError, KeyError):
        return None
    return shard if sizes == [shard.entry.num_bytes, shard.entry.index_bytes] else None


def _summarize(class_names: list[str], written: dict[str, list[WrittenShard]], lost: list[str]) -> MadeShards:
    """Combine the shards of each split, and what was left out of them with the classes that were lost before."""
    splits = {}
    for name, shards in written.items():
        counts: Counter[int] = Counter()
        for shard in shards:
            counts.update(shard.class_counts)
        class_counts = [counts[label] for label in range(len(class_names))]
        splits[name] = DatasetInfo(class_names, class_counts, [shard.entry for shard in shards])
    every = [shard for shards in written.values() for shard in shards]
    scaled_from: Counter[int] = Counter()
    for shard in every:
        scaled_from.update(shard.scaled_from)
    return MadeShards(splits, [*lost, *(line for shard in every for line in shard.left_out)], dict(scaled_from))


def _find_unreadable(source: Source, encoding: Encoding, progress: Progress) -> list[str]:
    """Return a line about each image that cannot be read, so that all faults of a source can be mended at once."""
    unreadable: list[str] = []
    images = [source.image(row) for row in range(len(source))]
    for _ in _read_encoded(images, encoding, unreadable):
        progress(1)
    return unreadable


def _describe_unreadable(lines: list[str]) -> str:
    """Return the number of unreadable files and the first of them, line by line; nothing if there are none."""
    if not lines:
        return ""
    shown = [*lines[:MAX_NAMES_SHOWN], *(["..."] if len(lines) > MAX_NAMES_SHOWN else [])]
    title = f"{len(lines)} unreadable {'file' if len(lines) == 1 else 'files'}:"
    return "".join(f"{line}\n" for line in [title, *(f"  {line}" for line in shown)])


def _check(made: MadeShards, skip_bad: bool) -> None:
    """Refuse a result that has lost images, or has none to train on."""
    left_out = made.left_out
    if left_out and not skip_bad:
        raise DataError(
            f"{_describe_unreadable(left_out)}repair or remove them, or leave them out with --skip-bad; "
            "the next attempt reuses the finished shards"
        )
    if "train" not in made.splits or not made.splits["train"].num_samples:
        raise DataError("no training image is readable; check the source")
