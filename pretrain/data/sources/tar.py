"""Tars as a source: each tar is scanned once for its samples, which can then be read in any order."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.sources.source import Content, Source, SourceImage, summarize, summarize_faults
from pretrain.data.storage.archive import BLOCK_BYTES, Member, TarReader, open_tar
from pretrain.data.storage.index import NO_LABEL
from pretrain.data.storage.local import read_range
from pretrain.data.storage.remote import FetchPolicy, MissingObjectError, StalledFetchError, fetch_range, is_remote
from pretrain.data.storage.webdataset import image_of, is_label_file, label_of, metadata_of, name_classes, samples_of
from pretrain.errors import DataError


@dataclass(frozen=True)
class ReadSample:
    """A callable that reads the members of one sample from a tar.

    Args:
        tar: Path or URL of the tar.
        offset: Position of the sample's first header, in bytes.
        size: Length of all its headers and data, in bytes.
        policy: Timeouts for a remote tar.
    """

    tar: str
    offset: int
    size: int
    policy: FetchPolicy

    def __call__(self) -> Content:
        if is_remote(self.tar):
            data = fetch_range(self.tar, self.offset, self.size, self.policy)
        else:
            data = read_range(Path(self.tar), self.offset, self.size)
        tar = TarReader(self.tar, io.BytesIO(data + b"\0" * (2 * BLOCK_BYTES)))
        [(key, members)] = samples_of(tar, Counter())
        extension, image = image_of(self.tar, key, members)
        others = {name: member.data for name, member in members.items() if name not in (extension, "cls", "json")}
        return Content(image.data, metadata_of(self.tar, key, members.get("json")), others)


def list_tars(
    tars: Sequence[str],
    class_names: Sequence[str] | None,
    label_key: str | None,
    policy: FetchPolicy,
    progress: Callable[[int], None] = lambda _: None,
) -> Source:
    """List the samples of WebDataset tars. Of local tars only headers and labels are read; remote tars are streamed.

    Args:
        tars: Paths or URLs.
        class_names: Names of the classes in the order of the labels. None takes them from "class" in the samples' JSON,
            or uses the labels.
        label_key: JSON key of the label for samples without .cls; None if the samples have no labels.
        policy: Timeouts for remote tars.
        progress: Function called with the number of samples listed since the last call.

    Raises:
        DataError: If no tar exists, or a host does not answer.
    """
    if not any(is_remote(tar) or Path(tar).exists() for tar in tars):
        raise DataError(f"{tars[0]}: no such file; check the path")
    keys: list[str] = []
    rows: list[tuple[int, int, int, int]] = []  # label, tar, offset, size
    ignored: Counter[str] = Counter()
    names_found: dict[int, str] = {}
    tar_of_key: dict[str, str] = {}
    repeated: list[str] = []
    unusable: list[str] = []

    def add(number: int, tar: str, key: str, members: dict[str, Member]) -> None:
        image_of(tar, key, members)
        metadata = metadata_of(tar, key, members.get("json"))
        label = label_of(tar, key, members.get("cls"), metadata, label_key) if label_key else NO_LABEL
        if isinstance(metadata.get("class"), str):
            names_found[label] = metadata["class"]
        if key in tar_of_key:
            repeated.append(f"{key} in {tar} (also in {tar_of_key[key]})")
            return
        tar_of_key[key] = tar
        start = min(member.header_offset for member in members.values())
        end = max(member.offset + member.size for member in members.values())
        keys.append(key)
        rows.append((label, number, start, end - start + -(end - start) % BLOCK_BYTES))

    for number, tar in enumerate(tars):
        try:
            with open_tar(tar, policy) as stream:
                for key, members in samples_of(TarReader(tar, stream, is_label_file), ignored):
                    progress(1)
                    try:
                        add(number, tar, key, members)
                    except DataError as error:
                        unusable.append(str(error))
        except (MissingObjectError, StalledFetchError):
            raise
        except DataError as error:
            unusable.append(str(error))  # the rest of the tar
    columns = np.asarray(rows, np.int64).reshape(-1, 4)
    names = name_classes(int(columns[:, 0].max(initial=-1)), class_names, names_found) if label_key else []

    def image(i: int) -> SourceImage:
        label, number, offset, size = columns[i].tolist()
        return SourceImage(keys[i], label, f"{tars[number]}: {keys[i]}", ReadSample(tars[number], offset, size, policy))

    return Source(
        names,
        keys,
        columns[:, 0],
        columns[:, 3],
        image,
        [f"{count} {kind}, skipped" for kind, count in ignored.items()],
        [
            *summarize(repeated, "sample whose key is taken", "samples whose keys are taken"),
            *summarize_faults(unusable),
        ],
    )
