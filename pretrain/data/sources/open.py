"""Choose the kind of source by its path, and list its images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.folder import list_folder
from pretrain.data.sources.source import Source
from pretrain.data.sources.table import Columns, is_table, list_table
from pretrain.data.sources.tar import list_tars
from pretrain.data.storage.index import DATASET_FILE, DatasetInfo
from pretrain.data.storage.remote import PIPE, FetchPolicy, expand_braces, is_remote
from pretrain.data.storage.tar_set import describe_beside, describe_hidden, is_tar, tar_names
from pretrain.errors import DataError


@dataclass(frozen=True)
class SourceOptions:
    """Interpretation of a source.

    Args:
        labeled: Whether the images have classes.
        class_names: Names of the classes in the order of the labels, for sources with numeric labels.
        columns: Columns of a table.
        label_key: JSON key of the label for samples of a tar without .cls.
        policy: Timeouts for remote sources.
    """

    labeled: bool = True
    class_names: Sequence[str] | None = None
    columns: Columns = field(default_factory=Columns)
    label_key: str = "label"
    policy: FetchPolicy = field(default_factory=FetchPolicy)


def list_source(
    path: str, options: SourceOptions | None = None, progress: Callable[[int], None] = lambda _: None
) -> Source:
    """List the images of a folder, a table, tars or the built-in digits.

    Args:
        path: Folder of images or of tars; .csv, .tsv or .parquet file; paths or URLs of tars; or `digits`.
        options: Interpretation of labels and columns.
        progress: Function called with the number of images listed since the last call.

    Raises:
        DataError: If the path is a pipe, or a folder of several splits.
    """
    options = options or SourceOptions()
    folder = Path(path)
    if path == "digits" and not folder.exists():
        return list_digits()
    if is_table(folder) and not is_remote(path):
        return list_table(folder, options.columns, options.class_names, options.labeled, options.policy, progress)
    if path.startswith(PIPE):
        raise DataError(f"{path}: the output of a command has no random access; write it to a file first")
    info = DatasetInfo.load(folder) if (folder / DATASET_FILE).exists() else None
    tars = find_tars(path) or (info.tar_paths(path) if info else [])
    if tars:
        names = options.class_names if options.class_names or not info else info.class_names or None
        label_key = options.label_key if options.labeled else None
        source = list_tars(tars, names, label_key, options.policy, progress)
        if folder.is_dir():
            source.problems += describe_beside(folder) if not info else []
            source.notes += describe_hidden(folder)
        return source
    if (folder / "train" / DATASET_FILE).exists():
        raise DataError(f"{folder}: contains several splits; name one, such as {folder / 'train'}")
    return list_folder(folder, options.labeled, progress)


def find_tars(path: str) -> list[str]:
    """Return the tars that a path stands for; empty if it is another kind of source.

    Args:
        path: URLs or paths of tars, with braces; or a folder.
    """
    if is_remote(path) or is_tar(path):
        return expand_braces(path)
    return [f"{path}/{name}" for name in tar_names(Path(path))]
