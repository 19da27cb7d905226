"""Images become shards: plain WebDataset tars, an index beside each, `dataset.json` over each split.

What goes into which shard is planned before anything is written, from the source's list alone. So a shard is a unit of
work by itself: any number of workers writes the same bytes, and a command that was stopped goes on where it was. All of
it happens in OUT.partial; its `out` becomes OUT last.
"""

import fcntl
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.data.shards.encoding import Encoding, Stored
from pretrain.data.shards.plan import PLAN_FILE, READERS, UNUSABLE, Recipe, plan_shards
from pretrain.data.shards.units import run_units
from pretrain.data.shards.writer import ShardWriter
from pretrain.data.sources.source import NAMES_SHOWN, Content, Integers, Source, SourceImage
from pretrain.data.storage.index import NO_LABEL, DatasetInfo, ShardEntry, index_name, write_json
from pretrain.errors import DataError

READ_AHEAD = 32
LEFT_OUT_FILE = "left_out.txt"

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Unit:
    """One shard to write."""

    tar: Path
    record: Path
    images: list[SourceImage]
    class_names: list[str]
    encoding: Encoding


@dataclass(frozen=True)
class Record:
    """What is known of a shard that is written: for `dataset.json`, and for the person."""

    entry: ShardEntry
    class_counts: dict[int, int]
    left_out: list[str]


Engine = Callable[[Callable[[Unit], Record], Iterable[Unit]], Generator[Record, None, None]]


@dataclass(frozen=True)
class Made:
    """What `make_shards` wrote."""

    splits: dict[str, DatasetInfo]
    left_out: list[str]


def make_shards(
    source: Source,
    out: Path,
    recipe: Recipe,
    *,
    skip_bad: bool = False,
    engine: Engine = run_units,
    progress: Progress = lambda _: None,
) -> Made:
    """Write `out/train` and `out/validation`.

    Args:
        source: the images.
        out: a folder that does not exist yet.
        recipe: how they are split, ordered, encoded and cut into shards.
        skip_bad: leave out what cannot be used, instead of stopping.
        engine: runs the units of work; where that is on several machines, all must see `out` and the source.
        progress: called with the number of images just done, those of an earlier call of the same command first.

    Raises:
        DataError: an image is unreadable or a class is empty, and `skip_bad` is not set; or `out` is in use.
    """
    refuse_used(out)
    if source.faults and not skip_bad:
        faults = "\n".join(f"  {fault}" for fault in source.faults)
        raise DataError(f"going on would lose data:\n{faults}\nmend this, or leave it all out with --skip-bad")
    if not len(source):
        raise DataError("the source has no images")
    partial_folder = out.with_name(out.name + ".partial")
    with _claim(partial_folder):
        shards = plan_shards(source, recipe, partial_folder)
        records = _write(source, recipe.encoding, shards, partial_folder, skip_bad, engine, progress)
        made = _describe(source.class_names, records)
        _report(made, skip_bad)
        for name, info in made.splits.items():
            info.save(partial_folder / "out" / name)
        if made.left_out:
            (partial_folder / "out" / LEFT_OUT_FILE).write_text("\n".join(made.left_out) + "\n")
        (partial_folder / "out").rename(out)
        shutil.rmtree(partial_folder)
    return made


def refuse_used(out: Path) -> None:
    """Make sure that nothing is where shards shall be.

    Raises:
        DataError: something is.
    """
    if out.exists():
        raise DataError(f"{out}: is there already; choose another folder or remove it")


def write_unit(unit: Unit) -> Record:
    """Write one shard, its index and its record."""
    left_out: list[str] = []
    writer = ShardWriter(unit.tar)
    try:
        for image, content, stored in _read(unit.images, unit.encoding, left_out):
            name = {} if image.label == NO_LABEL else {"class": unit.class_names[image.label]}
            metadata = {**name, "source": image.origin, **content.metadata, **name}
            text = json.dumps(metadata, ensure_ascii=False, default=str).encode()
            writer.add(image.key, stored, image.label, {"json": text, **content.members})
    except BaseException:
        writer.abandon()
        raise
    index = writer.close()
    record = Record(index.save(unit.tar.parent), dict(Counter(index.label)), left_out)
    write_json(unit.record, asdict(record))
    return record


def _read(
    images: Sequence[SourceImage], encoding: Encoding, left_out: list[str]
) -> Iterator[tuple[SourceImage, Content, Stored]]:
    """Read images some way ahead, in their order; prove and encode each."""
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[tuple[SourceImage, Future[Content]]] = deque()
        for i in range(len(images) + READ_AHEAD):
            if i < len(images):
                ahead.append((images[i], pool.submit(images[i].read)))
            if i >= READ_AHEAD and ahead:
                image, future = ahead.popleft()
                try:
                    content = future.result()
                    yield image, content, encoding(content.image)
                except UNUSABLE as error:
                    left_out.append(f"{image.origin}: {error}")


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Hold a folder that only one command may write to, and that must not be anyone else's.

    Raises:
        DataError: another command holds it, or it holds other things.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not {path.name for path in folder.iterdir()} <= {"lock", PLAN_FILE, f"{PLAN_FILE}.partial", "done", "out"}:
        raise DataError(f"{folder}: is where shards are put together, and holds other things; move them away")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another command is writing it; wait for that, or stop it") from None
        yield


def _write(
    source: Source,
    encoding: Encoding,
    shards: dict[str, list[Integers]],
    folder: Path,
    skip_bad: bool,
    engine: Engine,
    progress: Progress,
) -> dict[str, list[Record]]:
    """Write every shard that is not there yet; return the record of each, by split."""
    (folder / "done").mkdir(exist_ok=True)
    records: dict[str, list[Record | None]] = {}
    missing = []
    for name, rows_of_shards in shards.items():
        (folder / "out" / name).mkdir(parents=True, exist_ok=True)
        records[name] = [_load_record(folder, name, number) for number in range(len(rows_of_shards))]
        for number, (rows, record) in enumerate(zip(rows_of_shards, records[name], strict=True)):
            if record is None or (record.left_out and not skip_bad):
                missing.append((name, number, rows))
            else:
                progress(len(rows))

    def unit(name: str, number: int, rows: Integers) -> Unit:
        tar, images = folder / "out" / name / f"shard-{number:06d}.tar", [source.image(int(row)) for row in rows]
        return Unit(tar, _record_path(folder, name, number), images, source.class_names, encoding)

    with closing(engine(write_unit, (unit(*which) for which in missing))) as results:
        for (name, number, rows), record in zip(missing, results, strict=True):
            records[name][number] = record
            progress(len(rows))
    return {name: [record for record in known if record] for name, known in records.items()}


def _record_path(folder: Path, name: str, number: int) -> Path:
    return folder / "done" / f"{name}-{number:06d}.json"


def _load_record(folder: Path, name: str, number: int) -> Record | None:
    """Return a shard's record if tar and index are there, whole: a power cut may have taken what it promises."""
    try:
        content = json.loads(_record_path(folder, name, number).read_bytes())
        record = Record(
            ShardEntry(**content["entry"]),
            {int(label): count for label, count in content["class_counts"].items()},
            content["left_out"],
        )
        written = folder / "out" / name
        sizes = [(written / file).stat().st_size for file in (record.entry.name, index_name(record.entry.name))]
    except (OSError, ValueError):
        return None
    return record if sizes == [record.entry.num_bytes, record.entry.index_bytes] else None


def _describe(class_names: list[str], records: dict[str, list[Record]]) -> Made:
    """Sum up the shards of each split."""
    splits = {}
    for name, shards in records.items():
        counts: Counter[int] = Counter()
        for record in shards:
            counts.update(record.class_counts)
        class_counts = [counts[label] for label in range(len(class_names))]
        splits[name] = DatasetInfo(class_names, class_counts, [record.entry for record in shards])
    return Made(splits, [line for shards in records.values() for record in shards for line in record.left_out])


def _report(made: Made, skip_bad: bool) -> None:
    """Refuse what would lose data."""
    left_out = made.left_out
    if left_out and not skip_bad:
        more = ["..."] if len(left_out) > NAMES_SHOWN else []
        shown = "\n".join(f"  {line}" for line in [*left_out[:NAMES_SHOWN], *more])
        raise DataError(
            f"{len(left_out)} unreadable {'file' if len(left_out) == 1 else 'files'}:\n{shown}\n"
            "mend or remove them, or leave them out with --skip-bad; what is written is kept for the next try"
        )
    if "train" not in made.splits or not made.splits["train"].num_samples:
        raise DataError("no image to train on is readable")
