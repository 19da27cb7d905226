"""Find everything that is wrong with a shard set: every byte of every tar is held against what was promised."""

import os
import signal
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from pretrain.data.decode import DecodeError, decode
from pretrain.data.fetch import read_range
from pretrain.data.index import DATASET_FILE, DataError, DatasetInfo, ShardEntry, ShardIndex, index_name
from pretrain.data.remote import FetchPolicy, is_remote, open_stream
from pretrain.data.shards.archive import Archive


class Finding(NamedTuple):
    """One thing that is wrong: with a sample, or with a whole shard where there is no key."""

    shard: str
    key: str | None
    reason: str


class _Checked(NamedTuple):
    findings: list[Finding]
    keys: list[str]


def check_set(
    folder: Path, num_workers: int, policy: FetchPolicy, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Finding]:
    """Yield what is wrong with a set, shard by shard; keys are held against those of all other shards.

    Args:
        folder: where `dataset.json` and the indexes stand; the tars may be remote.
        num_workers: processes; with 0 this one does the work.
        policy: how patient to be with remote tars.
        progress: called with 1 after each shard.
    """
    try:
        info = DatasetInfo.load(folder)
    except (DataError, OSError) as error:
        yield Finding(DATASET_FILE, None, str(error))
        return
    seen: dict[str, str] = {}
    work = partial(_check_shard, folder, len(info.class_names), policy)
    with closing(_in_order(work, info.shards, num_workers)) as results:
        for entry, checked in zip(info.shards, results, strict=True):
            yield from checked.findings
            for key in checked.keys:
                if key in seen:
                    yield Finding(entry.name, key, f"the same key is in {seen[key]}")
                seen[key] = entry.name
            progress(1)


def stray_files(folder: Path) -> list[str]:
    """Return the names of files in a set's folder that belong to nothing."""
    known = {DATASET_FILE}
    for shard in DatasetInfo.load(folder).shards:
        known |= {shard.name, index_name(shard.name)}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def _in_order(
    work: Callable[[ShardEntry], _Checked], entries: list[ShardEntry], num_workers: int
) -> Generator[_Checked, None, None]:
    """Yield each shard's result; what has not begun is given up when nobody wants more."""
    if not num_workers:
        yield from map(work, entries)
        return
    with ProcessPoolExecutor(num_workers, initializer=_start_worker) as pool:
        try:
            yield from pool.map(work, entries)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check_shard(folder: Path, num_classes: int, policy: FetchPolicy, entry: ShardEntry) -> _Checked:
    """Check one shard: its index, its tar's structure and digest, and every sample."""
    findings: list[Finding] = []
    index = _load_index(folder, entry, findings)
    rows = {offset: row for row, offset in enumerate(index.offset)} if index else {}
    tar = folder / entry.name
    try:
        with open_stream(entry.name, policy) if is_remote(entry.name) else tar.open("rb") as stream:
            archive = Archive(entry.name, stream)
            for member in archive.members():
                if index and (row := rows.pop(member.offset, None)) is not None:
                    findings += _check_sample(index, row, member.data, num_classes)
            if index and rows:
                findings += [Finding(entry.name, index.key[i], "the tar has no member there") for i in rows.values()]
            if (archive.num_bytes, archive.sha256) != (entry.num_bytes, entry.sha256):
                findings.append(Finding(entry.name, None, f"its sha256 is not the one in {DATASET_FILE}"))
    except DataError as error:
        findings.append(Finding(entry.name, None, str(error).removeprefix(f"{entry.name}: ")))
        if index and not is_remote(entry.name):  # what lies behind the damage can still be read by the index
            for offset, row in rows.items():
                findings += _check_sample(index, row, read_range(tar, offset, index.size[row]), num_classes)
    except OSError as error:
        findings.append(Finding(entry.name, None, f"cannot be read: {error.strerror}"))
    return _Checked(findings, index.key if index else [])


def _load_index(folder: Path, entry: ShardEntry, findings: list[Finding]) -> ShardIndex | None:
    name = index_name(entry.name)
    try:
        index = ShardIndex.parse((folder / name).read_bytes(), name, entry.index_sha256)
    except OSError as error:
        findings.append(Finding(name, None, f"cannot be read: {error.strerror}"))
    except DataError as error:
        findings.append(Finding(name, None, str(error).removeprefix(f"{name}: ")))
    else:
        if len(index) == entry.num_samples:
            return index
        findings.append(Finding(name, None, f"has {len(index)} samples, {DATASET_FILE} promises {entry.num_samples}"))
    return None


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


def _start_worker() -> None:
    """Leave Ctrl-C to the process that was typed at; end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
