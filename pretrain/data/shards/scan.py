"""Index existing tars in WebDataset format: members that share a key form one sample."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from pretrain.data.shards.keys import Digests, digest_keys, find_repeated
from pretrain.data.shards.tasks import Executor, run_tasks
from pretrain.data.sources.source import summarize, summarize_faults
from pretrain.data.storage.archive import TarReader, open_tar
from pretrain.data.storage.index import LEFT_OUT_FILE, NO_LABEL, DatasetInfo, ShardEntry, ShardIndex, index_name
from pretrain.data.storage.remote import FetchPolicy, MissingObjectError, StalledFetchError, is_remote
from pretrain.data.storage.tar_set import describe_hidden
from pretrain.data.storage.webdataset import image_of, label_of, metadata_of, name_classes, samples_of
from pretrain.data.transforms.decode import DecodeError, decode
from pretrain.errors import DataError


@dataclass
class IndexedShards:
    """The result of `index_shards`.

    Attributes:
        info: Content of the `dataset.json` that was written.
        notes: Remarks for the user, one sentence each.
        left_out: Reasons why samples or tars were left out, one sentence each.
    """

    info: DatasetInfo
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class IndexedTar:
    """The result for one tar.

    Attributes:
        entry: The tar's entry in `dataset.json`; None if it cannot be opened.
        keys: Digests of the sample keys.
        class_counts: Number of samples by label.
        class_names: Class names found in the samples' JSON, by label.
        ignored: Number of members that are not used, by kind.
        faults: Reasons why samples cannot be used, one sentence each.
    """

    entry: ShardEntry | None
    keys: Digests
    class_counts: Counter[int] = field(default_factory=Counter)
    class_names: dict[int, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


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
    skip_bad: bool = False,
    way_out: str = "leave them out with --skip-bad",
) -> IndexedShards:
    """Write an index of each tar, and `dataset.json` last. Both tell where the tars are, if not next to them.

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
        skip_bad: Whether to leave out samples and tars that cannot be used, instead of raising an error.
        way_out: Advice about such samples, for the error.

    Raises:
        DataError: If the tars have no samples, or some cannot be used and `skip_bad` is not set.
    """
    for name, count in Counter(map(index_name, tars)).items():
        if count > 1:
            same = [tar for tar in tars if index_name(tar) == name]
            raise DataError(f"{same[0]} and {same[1]}: have the same file name; index each with its own --out")
    entries: list[ShardEntry] = []
    keys: list[Digests] = []
    counts: Counter[int] = Counter()
    names_found: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    faults: list[str] = []
    work = partial(_index_tar, tar_folder or out, out, label_key, policy or FetchPolicy())
    with closing(executor(work, tars)) as results:
        for indexed in results:
            if indexed.entry is not None:
                entries.append(indexed.entry)
                keys.append(indexed.keys)
            counts.update(indexed.class_counts)
            names_found |= indexed.class_names
            ignored.update(indexed.ignored)
            faults += indexed.faults
            progress(1)
    repeated = _drop_repeated(out, entries, keys, counts)
    faults += repeated
    if faults and not skip_bad:
        raise DataError("\n".join([*summarize_faults(faults), f"repair them, or {way_out}"]))
    if not counts:
        why = f"; the first of {len(faults)} faults: {faults[0]}" if faults else ""
        raise DataError(
            f"{tar_folder or out}: the tars contain no usable samples; expected members like 0001.jpg and 0001.cls{why}"
        )
    names = name_classes(max(counts), class_names, names_found) if label_key else []
    info = DatasetInfo(
        names, [counts[label] for label in range(len(names))], entries, _locate(tar_folder, out) if tar_folder else []
    )
    _list_left_out(out, faults)
    info.save(out)
    notes = describe_hidden(tar_folder) if tar_folder else []
    notes += [f"{count} {kind}, ignored" for kind, count in ignored.items()]
    empty = [name for name, count in zip(info.class_names, info.class_counts, strict=True) if not count]
    notes += summarize(empty, "class without samples", "classes without samples")
    return IndexedShards(info, notes, faults)


def _locate(tar_folder: Path, out: Path) -> list[str]:
    """Return the path of the tars relative to their index, and their absolute path; none if both are in one folder."""
    tars, index = tar_folder.resolve(), out.resolve()
    return [] if tars == index else [os.path.relpath(tars, index), str(tars)]


def _list_left_out(out: Path, faults: list[str]) -> None:
    """Write the list of what was left out next to the indexes, or remove that of an earlier index."""
    if faults:
        (out / LEFT_OUT_FILE).write_text("".join(f"{fault}\n" for fault in faults), encoding="utf-8")
    else:
        (out / LEFT_OUT_FILE).unlink(missing_ok=True)


def _drop_repeated(out: Path, entries: list[ShardEntry], keys: Sequence[Digests], counts: Counter[int]) -> list[str]:
    """Remove samples whose key an earlier sample has from the indexes and counts; return a sentence about each."""
    faults = []
    for shard, found in groupby(find_repeated(keys), key=lambda repeated: repeated[0][0]):
        name = entries[shard].name
        path = out / index_name(name)
        index, rows = ShardIndex.parse(path.read_bytes(), path, entries[shard].index_sha256), []
        for (_, row), (first, _) in found:
            faults.append(f"{name}: the key {index.key[row]} is also in {entries[first].name}; keys must be unique")
            counts[index.label[row]] -= 1
            rows.append(row)
        index.drop(rows)
        entries[shard] = index.save(out)
    return faults


def _index_tar(tar_folder: Path, out: Path, label_key: str | None, policy: FetchPolicy, name: str) -> IndexedTar:
    """Read a tar from start to end and write its index, with all samples that can be used, even of a damaged tar."""
    found = IndexedTar(None, digest_keys([]))
    path, index = name if is_remote(name) else str(tar_folder / name), ShardIndex(name)
    try:
        with open_tar(path, policy) as stream:
            tar = TarReader(path, stream)
            _index_samples(tar, index, label_key, found)
            index.describe_tar(tar.num_bytes, tar.sha256)
    except (MissingObjectError, StalledFetchError):
        raise
    except DataError as error:
        found.faults.append(str(error))
        return found
    found.entry, found.keys = index.save(out), digest_keys(index.key)
    found.class_counts.update(index.label)
    return found


def _index_samples(tar: TarReader, index: ShardIndex, label_key: str | None, found: IndexedTar) -> None:
    """Read a tar to its end; add its samples to the index, and faults to what was found."""
    try:
        for key, members in samples_of(tar, found.ignored):
            try:
                extension, image = image_of(tar.name, key, members)
                height, width = _size(tar.name, key, image.data)
                metadata = metadata_of(tar.name, key, members.get("json"))
                label = label_of(tar.name, key, members.get("cls"), metadata, label_key) if label_key else NO_LABEL
            except DataError as error:
                found.faults.append(str(error))
                continue
            if isinstance(metadata.get("class"), str):
                found.class_names[label] = metadata["class"]
            index.append(key, extension, image.offset, image.size, crc32(image.data), label, width, height)
            found.ignored.update(f"members .{other}" for other in members.keys() - {extension, "cls", "json"})
    except (MissingObjectError, StalledFetchError):
        raise
    except DataError as error:  # damage; what comes after it cannot be found
        found.faults.append(str(error))
        tar.read_to_end()


def _size(tar: str, key: str, data: bytes) -> tuple[int, int]:
    """Return the height and width of an image in pixels, after decoding it to verify it."""
    try:
        height, width, _ = decode(data).shape
    except DecodeError as error:
        raise DataError(f"{tar}: sample {key} is not a usable image: {error}") from None
    return height, width
