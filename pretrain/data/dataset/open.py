"""Open a dataset by path or URL: one or several shard sets, a weighted mix of them, or a folder of images."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.config import SourceConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.folder import FolderDataset
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.storage.cache import Cache
from pretrain.data.storage.index import DATASET_FILE
from pretrain.data.storage.index_folder import find_index
from pretrain.data.storage.remote import FetchPolicy, expand_braces, is_remote
from pretrain.errors import DataError


def open_dataset(
    paths: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None = None,
    cache: Cache | None = None,
    labeled: bool = True,
) -> Dataset:
    """Open shard sets or a folder of images as one dataset.

    Args:
        paths: Paths or URLs of the shard sets, in which braces are expanded, or the path of one folder of images.
        weights: Relative frequency of each set in a mix. If None, the sets are concatenated.
        cache: Cache for remote shards.
        labeled: Whether the labels will be used. If not, sets with different classes can be combined, without labels.

    Raises:
        DataError: If a path cannot be used, or the sets have different classes.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    places = [place for path in given for place in expand_braces(str(path))]
    if not places:
        raise DataError("the list of data paths is empty; give at least one path")
    if weights is not None and len(weights) != len(places):
        raise DataError(f"{len(weights)} weights for {len(places)} shard sets; give one weight per set")
    index_places = [_find_index(place, cache) for place in places]
    if len(places) == 1 and index_places[0] is None:
        dataset: Dataset = _open_folder(Path(places[0]))
    else:
        found = [index or place for index, place in zip(index_places, places, strict=True)]
        dataset = ShardDataset(places, weights, cache, labeled, found)
    for part, place in zip(dataset.parts, places, strict=False):
        if not sum(part.shard_sizes):
            raise DataError(f"{place}: contains no samples; choose another split or remove it")
    return dataset


def open_cache(config: SourceConfig) -> Cache:
    """Return the shard cache that a config describes; its folder is only created for remote data."""
    policy = FetchPolicy(
        request_seconds=min(config.stall_seconds, FetchPolicy.request_seconds),
        stall_seconds=config.stall_seconds,
        allow_pipe=config.allow_pipe,
    )
    return Cache(config.cache_dir, config.cache_bytes, policy)


def _find_index(place: str, cache: Cache | None) -> str | None:
    """Return the folder or URL of a shard set's index; None for a local folder without one."""
    if is_remote(place):
        return place
    index = find_index(Path(place), cache.folder if cache else None)
    return str(index) if index else None


def _open_folder(folder: Path) -> FolderDataset:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a {DATASET_FILE} or with one subfolder per class")
    if list(folder.glob("*.tar")):
        raise DataError(f"{folder}: the tars have no index; run `vitrail shards index {folder}` first")
    if (folder / "train" / DATASET_FILE).exists():
        raise DataError(f"{folder}: contains several splits; name one, such as {folder / 'train'}")
    return FolderDataset(folder)
