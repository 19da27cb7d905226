"""Open a dataset by path or URL: one or several shard sets, a weighted mix of them, or a folder of images."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.config import SourceConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.folder import FolderDataset, Split
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.storage.cache import Cache
from pretrain.data.storage.index import DATASET_FILE
from pretrain.data.storage.remote import FetchPolicy, expand_braces, is_remote
from pretrain.data.storage.tar_set import local_tar_sets
from pretrain.errors import DataError


def open_dataset(
    paths: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None = None,
    cache: Cache | None = None,
    labeled: bool = True,
    split: Split | None = None,
) -> Dataset:
    """Open shard sets or a folder of images as one dataset.

    Args:
        paths: Paths or URLs of the shard sets, in which braces are expanded, or the path of one folder of images.
            Tars that a local path names, such as `photos/train-{000..007}.tar`, form one set.
        weights: Relative frequency of each set in a mix. If None, the sets are concatenated.
        cache: Cache for remote shards.
        labeled: Whether the labels will be used. If not, sets with different classes can be combined, without labels,
            and a folder of images needs no subfolders.
        split: Split to take of a folder that has several.

    Raises:
        DataError: If a path cannot be used, or the sets have different classes.
    """
    given = [_split_of(path, split) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    places = [place for path in given for place in find_sets(path, cache)]
    if not places:
        raise DataError("the list of data paths is empty; give at least one path")
    if weights is not None and len(weights) != len(places):
        raise DataError(f"{len(weights)} weights for {len(places)} shard sets; give one weight per set")
    if len(places) == 1 and not is_remote(places[0]) and not (Path(places[0]) / DATASET_FILE).exists():
        dataset: Dataset = _open_folder(Path(places[0]), labeled, split)
    else:
        dataset = ShardDataset(places, weights, cache, labeled)
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


def find_sets(path: str, cache: Cache | None = None) -> list[str]:
    """Return the sets that a data path means: the folder or URL of each `dataset.json`, or a folder that has none.

    Args:
        path: Path or URL, in which braces are expanded.
        cache: Cache of this machine, whose folder may have the index; None to look only next to the shards.

    Raises:
        DataError: If a tar that the path names does not exist.
    """
    places = expand_braces(path)
    if is_remote(places[0]):
        return places
    return [str(tars.find_index(cache.folder if cache else None) or tars.folder) for tars in local_tar_sets(path)]


def _split_of(path: str | Path, split: Split | None) -> str:
    """Return the folder of a split where a path is that of all splits of a shard set."""
    if split and not is_remote(str(path)) and (Path(path) / "train" / DATASET_FILE).exists():
        return str(Path(path) / split)
    return str(path)


def _open_folder(folder: Path, labeled: bool, split: Split | None) -> FolderDataset:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a {DATASET_FILE} or with one subfolder per class")
    if list(folder.glob("*.tar")):
        raise DataError(f"{folder}: the tars have no index; run `vitrail shards index {folder}` first")
    if (folder / "train" / DATASET_FILE).exists():
        raise DataError(f"{folder}: contains several splits; name one, such as {folder / 'train'}")
    return FolderDataset(folder, labeled, split)
