"""Index existing tars in WebDataset format: members that share a key form one sample."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from pretrain.data.shards.keys import Digests, digest_keys, find_repeated
from pretrain.data.shards.tasks import Executor, run_tasks
from pretrain.data.sources.source import summarize, summarize_faults
from pretrain.data.storage.archive import TarReader, open_tar
from pretrain.data.storage.index import NO_LABEL, DatasetInfo, ShardEntry, ShardIndex, index_name
from pretrain.data.storage.remote import FetchPolicy, is_remote
from pretrain.data.storage.webdataset import image_of, label_of, metadata_of, name_classes, samples_of
from pretrain.data.transforms.decode import DecodeError, decode
from pretrain.errors import DataError

CURE = "remove it, or make new shards without it with `vitrail shards make --skip-bad`"


@dataclass
class IndexedShards:
    """The result of `index_shards`.

    Attributes:
        info: Content of the `dataset.json` that was written.
        notes: Remarks for the user, one sentence each.
    """

    info: DatasetInfo
    notes: list[str] = field(default_factory=list)


@dataclass
class IndexedTar:
    """The result for one tar.

    Attributes:
        entry: The tar's entry in `dataset.json`.
        keys: Digests of the sample keys.
        class_counts: Number of samples by label.
        class_names: Class names found in the samples' JSON, by label.
        ignored: Number of members that are not used, by kind.
        faults: Reasons why samples cannot be used, one sentence each.
    """

    entry: ShardEntry
    keys: Digests
    class_counts: Counter[int]
    class_names: dict[int, str]
    ignored: Counter[str]
    faults: list[str]


def index_shards(
    tars: Sequence[str],
    out: Path,
    class_names: Sequence[str] | None = None,
    label_key: str | None = "label",
    policy: FetchPolicy | None = None,
    executor: Executor[str, IndexedTar] = run_tasks,
    progress: Callable[[int], None] = lambda _: None,
    *,
    tar_folder: Path | None = None,
) -> IndexedShards:
    """Write an index of each tar, and `dataset.json` last.

    Args:
        tars: Tars of one split as `dataset.json` will name them: by file name or by URL.
        out: Folder for the indexes.
        class_names: Names of the classes in the order of the labels. None takes them from "class" in the samples' JSON,
            or uses the labels.
        label_key: JSON key of the label for samples without .cls; None if the samples have no labels.
        policy: Timeouts and permissions for remote tars.
        executor: Function that runs the tasks, one per tar.
        progress: Function called with 1 after each tar.
        tar_folder: Folder of the local tars, if it is not `out`.

    Raises:
        DataError: If the tars have no samples, some cannot be used, or a key occurs twice.
    """
    entries: list[ShardEntry] = []
    keys: list[Digests] = []
    counts: Counter[int] = Counter()
    names_found: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    faults: list[str] = []
    work = partial(_index_tar, tar_folder or out, out, label_key, policy or FetchPolicy())
    with closing(executor(work, tars)) as results:
        for indexed in results:
            entries.append(indexed.entry)
            keys.append(indexed.keys)
            counts.update(indexed.class_counts)
            names_found |= indexed.class_names
            ignored.update(indexed.ignored)
            faults += indexed.faults
            progress(1)
    if faults:
        raise DataError("\n".join(summarize_faults(faults)))
    if not counts:
        raise DataError(
            f"{tar_folder or out}: the tars contain no samples; expected members like 0001.jpg and 0001.cls"
        )
    _refuse_repeated(out, entries, keys)
    names = name_classes(max(counts), class_names, names_found) if label_key else []
    info = DatasetInfo(names, [counts[label] for label in range(len(names))], entries)
    info.save(out)
    notes = [f"{count} {kind}, ignored" for kind, count in ignored.items()]
    empty = [name for name, count in zip(info.class_names, info.class_counts, strict=True) if not count]
    notes += summarize(empty, "class without samples", "classes without samples")
    return IndexedShards(info, notes)


def _refuse_repeated(out: Path, entries: Sequence[ShardEntry], keys: Sequence[Digests]) -> None:
    for (shard, row), (first, _) in find_repeated(keys):
        path = out / index_name(entries[shard].name)
        key = ShardIndex.parse(path.read_bytes(), path, entries[shard].index_sha256).key[row]
        raise DataError(
            f"{entries[shard].name}: the key {key} is also in {entries[first].name}, but keys must be unique in a "
            "split; remove one of the two samples"
        )


def _index_tar(tar_folder: Path, out: Path, label_key: str | None, policy: FetchPolicy, name: str) -> IndexedTar:
    """Read a tar from start to end and write its index."""
    index, ignored, names_found, faults = ShardIndex(name), Counter[str](), dict[int, str](), list[str]()
    path = name if is_remote(name) else str(tar_folder / name)
    with open_tar(path, policy) as stream:
        tar = TarReader(path, stream)
        for key, members in samples_of(tar, ignored):
            try:
                extension, image = image_of(path, key, members)
                height, width = _size(path, key, image.data)
                metadata = metadata_of(path, key, members.get("json"))
                label = label_of(path, key, members.get("cls"), metadata, label_key) if label_key else NO_LABEL
            except DataError as error:
                faults.append(str(error))
                continue
            if isinstance(metadata.get("class"), str):
                names_found[label] = metadata["class"]
            index.append(key, extension, image.offset, image.size, crc32(image.data), label, width, height)
            ignored.update(f"members .{other}" for other in members.keys() - {extension, "cls", "json"})
    index.describe_tar(tar.num_bytes, tar.sha256)
    return IndexedTar(index.save(out), digest_keys(index.key), Counter(index.label), names_found, ignored, faults)


def _size(tar: str, key: str, data: bytes) -> tuple[int, int]:
    """Return the height and width of an image in pixels, after decoding it to verify it."""
    try:
        height, width, _ = decode(data).shape
    except DecodeError as error:
        raise DataError(f"{tar}: sample {key} is not a usable image: {error}; {CURE}") from None
    return height, width
