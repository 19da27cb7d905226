"""Find everything that is wrong with a shard set: every byte of every tar is held against what was promised."""

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from pretrain.data.dataset.sharded import load_info
from pretrain.data.shards.keys import Digests, digest_keys, find_repeated
from pretrain.data.shards.units import run_units
from pretrain.data.storage.archive import Member, TarReader, open_tar
from pretrain.data.storage.index import DATASET_FILE, DatasetInfo, ShardEntry, ShardIndex, index_name
from pretrain.data.storage.local import read_range
from pretrain.data.storage.remote import FetchPolicy, fetch_bytes, is_remote
from pretrain.data.storage.webdataset import IMAGE_EXTENSIONS
from pretrain.data.transforms.decode import DecodeError, decode
from pretrain.errors import DataError


class Finding(NamedTuple):
    """One thing that is wrong: with a sample, or with a whole file where there is no key."""

    file: str
    key: str | None
    reason: str


class _Checked(NamedTuple):
    findings: list[Finding]
    keys: Digests
    class_counts: list[int]


Engine = Callable[[Callable[[ShardEntry], _Checked], Iterable[ShardEntry]], Generator[_Checked, None, None]]


def check_set(
    place: str,
    policy: FetchPolicy | None = None,
    engine: Engine = run_units,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Iterator[Finding]:
    """Yield what is wrong with a set, shard by shard; then what is wrong between them.

    Args:
        place: the folder or URL where `dataset.json` and the indexes stand; the tars may stand elsewhere.
        policy: how patient to be with what is remote.
        engine: runs the units of work, a shard each.
        progress: called after each shard, with 1 and the number of all.

    Raises:
        DataError: no set at all is there.
    """
    policy = policy or FetchPolicy()
    try:
        info = load_info(place, policy)
    except (DataError, OSError) as error:
        entries = [] if is_remote(place) else _entries_by_indexes(Path(place))
        if not entries:
            raise DataError(str(error)) from None
        yield Finding(DATASET_FILE, None, str(error).removeprefix(f"{place}/{DATASET_FILE}: "))
        info = DatasetInfo([], [], entries)
    keys, counts = [], [0] * len(info.class_names)
    work = partial(_check_shard, place, len(info.class_names), policy)
    with closing(engine(work, info.shards)) as results:
        for checked in results:
            yield from checked.findings
            keys.append(checked.keys)
            counts = [a + b for a, b in zip(counts, checked.class_counts, strict=True)]
            progress(1, len(info.shards))
    for (shard, row), (first, _) in find_repeated(keys):
        index = _load_index(place, info.shards[shard], policy, [])
        yield Finding(
            info.shards[shard].name, index.key[row] if index else None, f"the same key is in {info.shards[first].name}"
        )
    if counts != info.class_counts and all(map(len, keys)):
        yield Finding(DATASET_FILE, None, f"counts {info.class_counts} samples of each class, there are {counts}")


def stray_files(folder: Path) -> list[str]:
    """Return the names of files in a set's folder that belong to nothing."""
    try:
        shards = DatasetInfo.load(folder).shards
    except DataError:
        shards = _entries_by_indexes(folder)
    known = {DATASET_FILE, *(shard.name for shard in shards), *(index_name(shard.name) for shard in shards)}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def _entries_by_indexes(folder: Path) -> list[ShardEntry]:
    """Return the shards that there are by their indexes alone, where `dataset.json` cannot be read."""
    entries = []
    for path in sorted(folder.glob("*.index.json")):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        with suppress(DataError, TypeError):
            index = ShardIndex.parse(data, path, digest)
            entries.append(ShardEntry(index.name, len(index), index.num_bytes, index.sha256, len(data), digest))
    return entries


def _check_shard(place: str, num_classes: int, policy: FetchPolicy, entry: ShardEntry) -> _Checked:
    """Check one shard: its index, its tar's structure and digest, and every sample."""
    findings: list[Finding] = []
    index = _load_index(place, entry, policy, findings)
    rows = {offset: row for row, offset in enumerate(index.offset)} if index else {}
    tar = entry.name if is_remote(entry.name) else f"{place}/{entry.name}"
    try:
        with open_tar(tar, policy) as stream:
            archive = TarReader(entry.name, stream)
            for member in archive.members():
                row = rows.pop(member.offset, None)
                if index and row is not None:
                    findings += _check_sample(index, row, member.data, num_classes)
                elif member.is_file and member.name.lower().endswith(IMAGE_EXTENSIONS):
                    findings += _check_unknown(entry.name, member, index is not None)
            if index:
                findings += [Finding(entry.name, index.key[i], "the tar has no member there") for i in rows.values()]
            if (archive.num_bytes, archive.sha256) != (entry.num_bytes, entry.sha256):
                findings.append(Finding(entry.name, None, f"its sha256 is not the one in {DATASET_FILE}"))
    except DataError as error:
        findings.append(Finding(entry.name, None, str(error).removeprefix(f"{tar}: ").removeprefix(f"{entry.name}: ")))
        if index and Path(tar).is_file():  # what lies behind the damage can still be read by the index
            for offset, row in rows.items():
                findings += _check_sample(index, row, read_range(Path(tar), offset, index.size[row]), num_classes)
    except OSError as error:
        findings.append(Finding(entry.name, None, f"cannot be read: {error.strerror}"))
    if index is None:
        return _Checked(findings, digest_keys([]), [0] * num_classes)
    counts = Counter(index.label)
    return _Checked(findings, digest_keys(index.key), [counts[label] for label in range(num_classes)])


def _load_index(place: str, entry: ShardEntry, policy: FetchPolicy, findings: list[Finding]) -> ShardIndex | None:
    name = index_name(entry.name)
    path = f"{place}/{name}"
    try:
        data = fetch_bytes(path, policy) if is_remote(place) else Path(path).read_bytes()
        index = ShardIndex.parse(data, name, entry.index_sha256)
    except OSError as error:
        findings.append(Finding(name, None, f"cannot be read: {error.strerror}"))
    except DataError as error:
        findings.append(Finding(name, None, str(error).removeprefix(f"{path}: ").removeprefix(f"{name}: ")))
    else:
        if len(index) == entry.num_samples:
            return index
        findings.append(Finding(name, None, f"has {len(index)} samples, {DATASET_FILE} promises {entry.num_samples}"))
    return None


def _check_unknown(tar: str, member: Member, is_indexed: bool) -> Iterator[Finding]:
    """Yield what is wrong with an image that no index knows."""
    key = member.name.rpartition(".")[0]
    if is_indexed:
        yield Finding(tar, key, "is in the tar, but not in the index")
        return
    try:
        decode(member.data)
    except DecodeError as error:
        yield Finding(tar, key, f"no usable image: {error}")


def _check_sample(index: ShardIndex, row: int, data: bytes, num_classes: int) -> Iterator[Finding]:
    """Yield what is wrong with one sample."""
    key = index.key[row]
    if len(data) != index.size[row]:
        yield Finding(index.name, key, f"has {len(data)} bytes, the index promises {index.size[row]}")
    elif crc32(data) != index.crc32[row]:
        yield Finding(index.name, key, "its checksum is off")
    else:
        try:
            height, width, _ = decode(data).shape
        except DecodeError as error:
            yield Finding(index.name, key, f"no usable image: {error}")
        else:
            if (width, height) != (index.width[row], index.height[row]):
                promised = f"{index.width[row]} x {index.height[row]}"
                yield Finding(index.name, key, f"is {width} x {height} pixels, the index promises {promised}")
    if num_classes and not 0 <= index.label[row] < num_classes:
        yield Finding(index.name, key, f"label {index.label[row]} is out of range: there are {num_classes} classes")
