"""Find everything that is wrong with a shard set by comparing every byte of every tar with the index."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from pretrain.data.dataset.sharded import load_info
from pretrain.data.shards.keys import Digests, digest_keys, find_repeated
from pretrain.data.shards.tasks import Executor, run_tasks
from pretrain.data.storage.archive import Member, TarReader, open_tar
from pretrain.data.storage.index import (
    DATASET_FILE,
    LEFT_OUT_FILE,
    DatasetInfo,
    ShardEntry,
    ShardIndex,
    index_name,
)
from pretrain.data.storage.local import read_range
from pretrain.data.storage.remote import FetchPolicy, fetch_bytes, is_remote
from pretrain.data.storage.webdataset import IMAGE_EXTENSIONS
from pretrain.data.transforms.decode import DecodeError, decode
from pretrain.errors import DataError


class Finding(NamedTuple):
    """One fault of a shard set.

    Attributes:
        file: Name of the file.
        key: Key of the sample, or None if the fault concerns the whole file.
        reason: Description of the fault.
    """

    file: str
    key: str | None
    reason: str


class CheckedShard(NamedTuple):
    """The result for one shard.

    Attributes:
        findings: Faults of the shard.
        keys: Digests of the sample keys.
        class_counts: Number of samples of each class.
    """

    findings: list[Finding]
    keys: Digests
    class_counts: list[int]


def check_set(
    location: str,
    policy: FetchPolicy | None = None,
    executor: Executor[ShardEntry, CheckedShard] = run_tasks,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Iterator[Finding]:
    """Yield the faults of a shard set: those of each shard, then those between shards.

    Args:
        location: Folder or URL of `dataset.json`, which locates the tars, and of the indexes.
        policy: Timeouts and permissions for remote reads.
        executor: Function that runs the tasks, one per shard.
        progress: Function called after each shard with 1 and the total number of shards.

    Raises:
        DataError: If there is no shard set, or its tars are not where they were.
    """
    policy = policy or FetchPolicy()
    try:
        info = load_info(location, policy)
    except (DataError, OSError) as error:
        entries = [] if is_remote(location) else _entries_by_indexes(Path(location))
        if not entries:
            raise DataError(str(error)) from None
        yield Finding(DATASET_FILE, None, str(error).removeprefix(f"{location}/{DATASET_FILE}: "))
        info = DatasetInfo([], [], entries)
    keys, counts = [], [0] * len(info.class_names)
    work = partial(_check_shard, info.find_tars(location), location, len(info.class_names), policy)
    with closing(executor(work, info.shards)) as results:
        for checked in results:
            yield from checked.findings
            keys.append(checked.keys)
            counts = [a + b for a, b in zip(counts, checked.class_counts, strict=True)]
            progress(1, len(info.shards))
    for (shard, row), (first, _) in find_repeated(keys):
        index = _load_index(location, info.shards[shard], policy, [])
        yield Finding(
            info.shards[shard].name, index.key[row] if index else None, f"the same key is in {info.shards[first].name}"
        )
    if counts != info.class_counts and all(map(len, keys)):
        yield Finding(DATASET_FILE, None, f"lists {info.class_counts} samples per class, but there are {counts}")


def stray_files(folder: Path) -> list[str]:
    """Return the names of files in the folder of a shard set that do not belong to it."""
    try:
        info = DatasetInfo.load(folder)
    except DataError:
        info = DatasetInfo([], [], _entries_by_indexes(folder))
    if info.tar_folders:  # a folder that the tars share with other files, or an index in the cache
        return []
    shards = info.shards
    known = {
        DATASET_FILE,
        LEFT_OUT_FILE,
        *(shard.name for shard in shards),
        *(index_name(shard.name) for shard in shards),
    }
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def _entries_by_indexes(folder: Path) -> list[ShardEntry]:
    """Return the entries of all shards that have an index, for a set whose `dataset.json` cannot be read."""
    entries = []
    for path in sorted(folder.glob("*.index.json")):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        with suppress(DataError, TypeError):
            index = ShardIndex.parse(data, path, digest)
            entries.append(ShardEntry(index.name, len(index), index.num_bytes, index.sha256, len(data), digest))
    return entries


def _check_shard(
    tar_folder: str, location: str, num_classes: int, policy: FetchPolicy, entry: ShardEntry
) -> CheckedShard:
    """Check one shard: its index, the structure and checksum of its tar, and every sample."""
    findings: list[Finding] = []
    index = _load_index(location, entry, policy, findings)
    rows = {offset: row for row, offset in enumerate(index.offset)} if index else {}
    tar = entry.name if is_remote(entry.name) else f"{tar_folder}/{entry.name}"
    try:
        with open_tar(tar, policy) as stream:
            reader = TarReader(entry.name, stream)
            for member in reader.members():
                row = rows.pop(member.offset, None)
                if index and row is not None:
                    findings += _check_sample(index, row, member.data, num_classes)
                elif _is_image(member):
                    findings += _check_unknown(entry.name, member, index is not None)
            if index:
                missing = "the tar has no member at the offset in the index"
                findings += [Finding(entry.name, index.key[row], missing) for row in rows.values()]
            if (reader.num_bytes, reader.sha256) != (entry.num_bytes, entry.sha256):
                findings.append(Finding(entry.name, None, f"its SHA-256 is not the one in {DATASET_FILE}"))
    except DataError as error:
        findings.append(Finding(entry.name, None, str(error).removeprefix(f"{tar}: ").removeprefix(f"{entry.name}: ")))
        if index and Path(tar).is_file():  # the index still locates the samples after the damage
            for offset, row in rows.items():
                findings += _check_sample(index, row, read_range(Path(tar), offset, index.size[row]), num_classes)
    except OSError as error:
        findings.append(Finding(entry.name, None, f"cannot be read: {error.strerror}"))
    if index is None:
        return CheckedShard(findings, digest_keys([]), [0] * num_classes)
    counts = Counter(index.label)
    return CheckedShard(findings, digest_keys(index.key), [counts[label] for label in range(num_classes)])


def _load_index(location: str, entry: ShardEntry, policy: FetchPolicy, findings: list[Finding]) -> ShardIndex | None:
    name = index_name(entry.name)
    path = f"{location}/{name}"
    try:
        data = fetch_bytes(path, policy) if is_remote(location) else Path(path).read_bytes()
        index = ShardIndex.parse(data, name, entry.index_sha256)
    except OSError as error:
        findings.append(Finding(name, None, f"cannot be read: {error.strerror}"))
    except DataError as error:
        findings.append(Finding(name, None, str(error).removeprefix(f"{path}: ").removeprefix(f"{name}: ")))
    else:
        if len(index) == entry.num_samples:
            return index
        findings.append(Finding(name, None, f"has {len(index)} samples, but {DATASET_FILE} lists {entry.num_samples}"))
    return None


def _is_image(member: Member) -> bool:
    """Return whether a member is an image by its name; a name that begins with a dot has no key."""
    name = member.name.rpartition("/")[2].lower()
    return member.is_file and name.endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _check_unknown(tar: str, member: Member, is_indexed: bool) -> Iterator[Finding]:
    """Yield the faults of an image that is not in the index."""
    key = member.name.rpartition(".")[0]
    if is_indexed:
        yield Finding(tar, key, "is in the tar but not in the index")
        return
    try:
        decode(member.data)
    except DecodeError as error:
        yield Finding(tar, key, f"not a usable image: {error}")


def _check_sample(index: ShardIndex, row: int, data: bytes, num_classes: int) -> Iterator[Finding]:
    """Yield the faults of one sample."""
    key = index.key[row]
    if len(data) != index.size[row]:
        yield Finding(index.name, key, f"has {len(data)} bytes, but the index says {index.size[row]}")
    elif crc32(data) != index.crc32[row]:
        yield Finding(index.name, key, "its checksum is wrong")
    else:
        try:
            height, width, _ = decode(data).shape
        except DecodeError as error:
            yield Finding(index.name, key, f"not a usable image: {error}")
        else:
            if (width, height) != (index.width[row], index.height[row]):
                expected = f"{index.width[row]} x {index.height[row]}"
                yield Finding(index.name, key, f"is {width} x {height} pixels, but the index says {expected}")
    if num_classes and not 0 <= index.label[row] < num_classes:
        reason = f"label {index.label[row]} is out of range because there are {num_classes} classes"
        yield Finding(index.name, key, reason)
