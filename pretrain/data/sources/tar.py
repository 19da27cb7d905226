"""Tars as a source of images: each is skimmed once for its samples, which are then read in any order."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.sources.source import Content, Source, SourceImage, counted
from pretrain.data.storage.archive import BLOCK_BYTES, TarReader, open_tar
from pretrain.data.storage.index import NO_LABEL
from pretrain.data.storage.local import read_range
from pretrain.data.storage.remote import FetchPolicy, fetch_range, is_remote
from pretrain.data.storage.webdataset import image_of, label_of, metadata_of, name_classes, samples_of


@dataclass(frozen=True)
class ReadSample:
    """Reads one sample's members out of a tar."""

    tar: str
    offset: int
    size: int
    policy: FetchPolicy

    def __call__(self) -> Content:
        if is_remote(self.tar):
            data = fetch_range(self.tar, self.offset, self.size, self.policy)
        else:
            data = read_range(Path(self.tar), self.offset, self.size)
        archive = TarReader(self.tar, io.BytesIO(data + b"\0" * (2 * BLOCK_BYTES)))
        [(key, members)] = samples_of(archive, Counter())
        extension, image = image_of(self.tar, key, members)
        others = {name: member.data for name, member in members.items() if name not in (extension, "cls", "json")}
        return Content(image.data, metadata_of(self.tar, key, members.get("json")), others)


def list_tars(
    tars: Sequence[str],
    class_names: Sequence[str] | None,
    label_key: str | None,
    policy: FetchPolicy,
    listed: Callable[[int], None] = lambda _: None,
) -> Source:
    """List the samples of WebDataset tars. Local tars are skimmed, remote ones stream by once.

    Args:
        tars: paths or URLs.
        class_names: in the order of the labels; else taken from the samples' JSON ("class"), else the labels' numbers.
        label_key: the JSON key of the label where a sample has no `cls`; None when the samples have no labels.
        policy: how patient to be with remote tars.
        listed: called with the number of samples just seen.

    Raises:
        DataError: a damaged tar, no image or label, a label out of range.
    """
    keys: list[str] = []
    places: list[tuple[int, int, int, int]] = []  # label, tar, offset, size
    left_out: Counter[str] = Counter()
    found: dict[int, str] = {}
    seen: dict[str, str] = {}
    twice: list[str] = []
    for number, tar in enumerate(tars):
        with open_tar(tar, policy) as stream:
            for key, members in samples_of(TarReader(tar, stream, _is_small), left_out):
                listed(1)
                image_of(tar, key, members)
                metadata = metadata_of(tar, key, members.get("json"))
                label = label_of(tar, key, members.get("cls"), metadata, label_key) if label_key else NO_LABEL
                if isinstance(metadata.get("class"), str):
                    found[label] = metadata["class"]
                if key in seen:
                    twice.append(f"{key} of {tar} (also in {seen[key]})")
                    continue
                seen[key] = tar
                begin = min(member.header_offset for member in members.values())
                end = max(member.offset + member.size for member in members.values())
                keys.append(key)
                places.append((label, number, begin, end - begin + -(end - begin) % BLOCK_BYTES))
    columns = np.asarray(places, np.int64).reshape(-1, 4)
    names = name_classes(int(columns[:, 0].max(initial=-1)), class_names, found) if label_key else []

    def image(i: int) -> SourceImage:
        label, number, offset, size = columns[i].tolist()
        return SourceImage(keys[i], label, f"{tars[number]}: {keys[i]}", ReadSample(tars[number], offset, size, policy))

    return Source(
        names,
        keys,
        columns[:, 0],
        columns[:, 3],
        image,
        [f"{count} {what}, left out" for what, count in left_out.items()],
        counted(twice, "sample with a key already taken", "samples with keys already taken"),
    )


def _is_small(name: str) -> bool:
    """Say whether a member is read while listing: what may hold the label, and the class's name."""
    return name.lower().endswith((".cls", ".json"))
