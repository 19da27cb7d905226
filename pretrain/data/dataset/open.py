"""Open data by its name: a shard set, several, a mix of them, or a folder with a subfolder a class."""

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
    names: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None = None,
    cache: Cache | None = None,
    labeled: bool = True,
) -> Dataset:
    """Open a shard set or a folder of images; several sets become one, or are mixed by weight.

    Args:
        names: paths or URLs; braces are expanded.
        weights: how often each set is drawn; without them several sets are one.
        cache: where remote shards are kept.
        labeled: whether the labels will be used; if not, sets of different classes become one without any.

    Raises:
        DataError: nothing usable at a path, or the sets' classes differ.
    """
    given = [names] if isinstance(names, str | Path) else names
    places = [place for name in given for place in expand_braces(str(name))]
    if not places:
        raise DataError("no data: the list of paths is empty")
    if weights is not None and len(weights) != len(places):
        raise DataError(f"{len(weights)} weights for {len(places)} sets; expected one for each")
    index_places = [_find_index(place, cache) for place in places]
    if len(places) == 1 and index_places[0] is None:
        samples: Dataset = _open_folder(Path(places[0]))
    else:
        found = [index or place for index, place in zip(index_places, places, strict=True)]
        samples = ShardDataset(places, weights, cache, labeled, found)
    for part, place in zip(samples.parts, places, strict=False):
        if not sum(part.shard_sizes):
            raise DataError(f"{place}: holds no samples")
    return samples


def open_cache(config: SourceConfig) -> Cache:
    """Return the node's cache as a run's config describes it; nothing is made until something remote is read."""
    policy = FetchPolicy(
        request_seconds=min(config.stall_seconds, FetchPolicy.request_seconds),
        stall_seconds=config.stall_seconds,
        allow_pipe=config.allow_pipe,
    )
    return Cache(config.cache_dir, config.cache_bytes, policy)


def _find_index(place: str, cache: Cache | None) -> str | None:
    """Return the folder or URL of a set's index; None if a local folder has none."""
    if is_remote(place):
        return place
    index = find_index(Path(place), cache.folder if cache else None)
    return str(index) if index else None


def _open_folder(folder: Path) -> FolderDataset:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a {DATASET_FILE}, or with a subfolder a class")
    if list(folder.glob("*.tar")):
        raise DataError(f"{folder}: the tars have no index; run `vitrail shards index {folder}` first")
    if (folder / "train" / DATASET_FILE).exists():
        raise DataError(f"{folder}: holds several splits; name one, as in {folder / 'train'}")
    return FolderDataset(folder)
