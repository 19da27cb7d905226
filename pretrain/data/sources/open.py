"""Find out by its name what kind of source a user means, and list it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.folder import list_folder
from pretrain.data.sources.source import Source
from pretrain.data.sources.table import SUFFIXES, Columns, list_table
from pretrain.data.sources.tar import list_tars
from pretrain.data.storage.index import DATASET_FILE, DatasetInfo
from pretrain.data.storage.remote import PIPE, FetchPolicy, expand_braces, is_remote
from pretrain.errors import DataError


@dataclass(frozen=True)
class Listing:
    """How a source is to be understood.

    Args:
        labeled: whether its images have classes.
        class_names: in the order of the labels, where the source has numbers.
        columns: of a table.
        label_key: the label's key in the JSON of a tar's sample that has no `cls`.
        policy: how patient to be with what is remote.
    """

    labeled: bool = True
    class_names: Sequence[str] | None = None
    columns: Columns = field(default_factory=Columns)
    label_key: str = "label"
    policy: FetchPolicy = field(default_factory=FetchPolicy)


def list_source(name: str, listing: Listing | None = None, listed: Callable[[int], None] = lambda _: None) -> Source:
    """List the images of `name`: a folder, a table, tars, or `digits`.

    Args:
        name: a folder of images or of tars; a .csv, .tsv or .parquet file; URLs or paths of tars; `digits`.
        listing: how to understand it.
        listed: called with the number of images just seen.

    Raises:
        DataError: nothing usable is there.
    """
    listing = listing or Listing()
    path = Path(name)
    if name == "digits" and not path.exists():
        return list_digits()
    if path.suffix in SUFFIXES and not is_remote(name):
        return list_table(path, listing.columns, listing.class_names, listing.labeled, listing.policy, listed)
    if name.startswith(PIPE):
        raise DataError(f"{name}: the output of a command has no random access; write it to a file first")
    tars = find_tars(name)
    if tars:
        names = listing.class_names
        if names is None and (path / DATASET_FILE).exists():
            names = DatasetInfo.load(path).class_names or None
        return list_tars(tars, names, listing.label_key if listing.labeled else None, listing.policy, listed)
    if (path / "train" / DATASET_FILE).exists():
        raise DataError(f"{path}: holds several splits; name one, as in {path / 'train'}")
    return list_folder(path, listing.labeled, listed)


def find_tars(name: str) -> list[str]:
    """Return the tars that a name means: URLs, paths with braces, or a folder's; none where it means something else."""
    if is_remote(name) or name.endswith(".tar"):
        return expand_braces(name)
    return sorted(map(str, Path(name).glob("*.tar")))
