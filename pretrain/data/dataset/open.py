"""Open data by its name: a shard set, several, a mix of them, or a folder with a subfolder a class."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.config import SourceConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.folder import FolderDataset
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.storage.cache import Cache
from pretrain.data.storage.index import DATASET_FILE
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
    first = Path(places[0])
    is_plain = len(places) == 1 and not is_remote(places[0]) and not (first / DATASET_FILE).exists()
    samples = _open_folder(first) if is_plain else ShardDataset(places, weights, cache, labeled)
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


def _open_folder(folder: Path) -> FolderDataset:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a {DATASET_FILE}, or with a subfolder a class")
    if list(folder.glob("*.tar")):
        raise DataError(f"{folder}: tars without a {DATASET_FILE}; run `vitrail shards index {folder}` first")
    if (folder / "train" / DATASET_FILE).exists():
        raise DataError(f"{folder}: holds several splits; name one, as in {folder / 'train'}")
    return FolderDataset(folder)
