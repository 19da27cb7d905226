"""Statistics of a shard set, computed from the indexes: classes, sizes, shapes and duplicates; and a plot of them."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pretrain.captions import caption_of_class, fit
from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.order import permutation
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.errors import DataError

MAX_SHOWN = 5
PERCENTILES = {"smallest": 0, "5%": 5, "median": 50, "95%": 95, "largest": 100}
MOSAIC_ROWS, MOSAIC_COLUMNS, TILE = 6, 14, 124
CAPTION, CAPTION_SIZE = 34, 13  # pixels: height below a tile, for two lines, and size of the font
MAX_NAME = 24  # characters of a class name below its bar
INK, ACCENT = "#22303c", "#2a7f9e"


@dataclass(frozen=True)
class Stats:
    """Columns of all indexes, and duplicates.

    Attributes:
        class_names: Name of each class, in the order of the labels.
        labels: Label of each sample [N].
        widths: Width of each image in pixels [N].
        heights: Height of each image in pixels [N].
        sizes: Size of each encoded image in bytes [N].
        extensions: Number of images by file name extension.
        duplicates: Keys of each group of samples with identical bytes.
        conflicts: The groups of `duplicates` whose samples have different labels.
    """

    class_names: list[str]
    labels: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int64]
    heights: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    extensions: dict[str, int]
    duplicates: list[list[str]]
    conflicts: list[list[str]]


def read_stats(dataset: Dataset, progress: Callable[[int], None] = lambda _: None) -> Stats:
    """Read every index of a shard set.

    Args:
        dataset: Shard set.
        progress: Function called with 1 after each index.

    Raises:
        DataError: If the data is a folder of images.
    """
    if not isinstance(dataset, ShardDataset):
        raise DataError("a folder of images has no index; create shards from it with `vitrail shards make`")
    columns: dict[str, list[int]] = defaultdict(list)
    extensions: dict[str, int] = defaultdict(int)
    locations: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for shard in range(len(dataset.shard_sizes)):
        index = dataset.index(shard)
        for name in ("label", "width", "height", "size"):
            columns[name] += getattr(index, name)
        for row, extension in enumerate(index.extension):
            extensions[extension] += 1
            locations[index.crc32[row], index.size[row]].append((shard, row))
        progress(1)
    alike = [group for group in locations.values() if len(group) > 1]
    duplicates = [encoded for group in alike for encoded in _identical(dataset, group)]
    conflicts = [group for group in duplicates if len({encoded.label for encoded in group}) > 1]
    arrays = {name: np.asarray(values, dtype=np.int64) for name, values in columns.items()}
    return Stats(
        dataset.class_names,
        arrays["label"],
        arrays["width"],
        arrays["height"],
        arrays["size"],
        dict(sorted(extensions.items())),
        [_keys(group) for group in duplicates],
        [_keys(group) for group in conflicts],
    )


def _identical(dataset: Dataset, locations: list[tuple[int, int]]) -> list[list[EncodedSample]]:
    """Group samples with equal checksums by their actual bytes."""
    groups: dict[bytes, list[EncodedSample]] = defaultdict(list)
    for shard, row in locations:
        encoded = dataset.fetch(shard, row)
        groups[encoded.data].append(encoded)
    return [group for group in groups.values() if len(group) > 1]


def _keys(group: list[EncodedSample]) -> list[str]:
    return sorted(encoded.key for encoded in group)


def summary(stats: Stats) -> dict[str, Any]:
    """Return the statistics to show to the user, by their descriptions."""
    counts = np.bincount(stats.labels, minlength=len(stats.class_names)) if stats.class_names else np.zeros(0, int)
    classes: dict[str, Any] = {"count": len(stats.class_names)}
    if len(counts):
        smallest, largest = int(counts.argmin()), int(counts.argmax())
        classes |= {
            "smallest": f"{stats.class_names[smallest]} ({counts[smallest]})",
            "largest": f"{stats.class_names[largest]} ({counts[largest]})",
            "imbalance": round(float(counts[largest] / max(counts[smallest], 1)), 1),
            "holding half of the samples": _classes_with_half(counts),
        }
    return {
        "samples": len(stats.sizes),
        "classes": classes,
        "width": _percentiles(stats.widths),
        "height": _percentiles(stats.heights),
        "shorter side": _percentiles(np.minimum(stats.widths, stats.heights)),
        "aspect": _percentiles(np.round(stats.widths / stats.heights, 2)),
        "bytes": _percentiles(stats.sizes),
        "formats": stats.extensions,
        "duplicates": sum(len(group) - 1 for group in stats.duplicates),
        "duplicates across classes": len(stats.conflicts),
    }


def _classes_with_half(counts: npt.NDArray[np.int64]) -> int:
    """Return the smallest number of classes that together have half of the samples."""
    return int(np.searchsorted(np.cumsum(np.sort(counts)[::-1]), counts.sum() / 2)) + 1


def _percentiles(values: npt.NDArray[Any]) -> dict[str, Any]:
    return {name: values.dtype.type(np.percentile(values, percent)).item() for name, percent in PERCENTILES.items()}


def plot(dataset: Dataset, stats: Stats, path: Path) -> None:
    """Plot a mosaic of samples with their classes above histograms of classes, image sizes and file sizes.

    Args:
        dataset: Shard set.
        stats: Its statistics.
        path: PNG file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    style = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#c5ced6"}
    with plt.rc_context({**style, "xtick.color": INK, "ytick.color": INK}):
        figure, axes = plt.subplot_mosaic(
            [["mosaic"] * 3, ["classes", "shape", "bytes"]],
            figsize=(16, 13),
            height_ratios=[2.6, 1],
            layout="constrained",
        )
        axes["mosaic"].imshow(_mosaic(dataset))
        axes["mosaic"].set_axis_off()
        axes["mosaic"].set_title("images chosen at random from all shards, each cropped to a square")
        figure.set_layout_engine("constrained", h_pad=0.1)
        figure.suptitle(f"{_name(dataset)}: {dataset.describe()}".replace("$", r"\$"), fontsize=15)
        _plot_classes(axes["classes"], stats)
        # Start at 0.4, so that a single image is visible.
        shades = ListedColormap(mpl.colormaps["GnBu"](np.linspace(0.4, 1.0, 256)))
        axes["shape"].hexbin(stats.widths, stats.heights, gridsize=40, mincnt=1, bins="log", cmap=shades)
        axes["shape"].set(title="image sizes", xlabel="width, pixels", ylabel="height, pixels")
        axes["bytes"].hist(stats.sizes / 1000, bins=60, color=ACCENT)
        axes["bytes"].set(title="file sizes", xlabel="kilobytes", ylabel="images")
        for name in ("classes", "shape", "bytes"):
            axes[name].spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _plot_classes(axes: Any, stats: Stats) -> None:
    counts = np.bincount(np.maximum(stats.labels, 0), minlength=len(stats.class_names))
    order = np.argsort(-counts, kind="stable")
    axes.bar(np.arange(len(counts)), counts[order], width=1.0 if len(counts) > 60 else 0.8, color=ACCENT)
    axes.set(title="images per class, largest first", ylabel="images", xlabel="classes")
    if len(counts) <= 30:
        names = [_short(stats.class_names[label]) if stats.class_names else "" for label in order]
        longest = max(map(len, names))
        axes.set_xticks(
            np.arange(len(counts)), names, rotation=0 if longest < 4 else 60, ha="center" if longest < 4 else "right"
        )
        axes.set_xlabel("")


def _short(name: str) -> str:
    """Return a class name that leaves room for the plot, and that matplotlib does not read as a formula."""
    return (name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…").replace("$", r"\$")


def _name(dataset: Dataset) -> str:
    """Return the last two parts of the path or URL of a shard set, such as photos/train."""
    assert isinstance(dataset, ShardDataset)  # `read_stats` refuses a folder
    return "/".join(dataset.index_places[0].rstrip("/").split("/")[-2:])


def _mosaic(dataset: Dataset) -> npt.NDArray[np.uint8]:
    """Return random samples of all shards, each cropped to a square over its class [height, width, 3]."""
    ends = np.cumsum(dataset.shard_sizes)
    chosen = permutation(int(ends[-1]), "mosaic")[: MOSAIC_ROWS * MOSAIC_COLUMNS].tolist()
    caption_height = CAPTION if dataset.class_names else 0
    canvas = Image.new("RGB", (MOSAIC_COLUMNS * TILE, MOSAIC_ROWS * (TILE + caption_height)), "white")
    for tile_number, position in enumerate(chosen):
        shard = int(np.searchsorted(ends, position, side="right"))
        sample = dataset.read(shard, position - int(ends[shard]) + dataset.shard_sizes[shard])
        tile = ImageOps.fit(Image.fromarray(sample.image), (TILE - 4, TILE - 4), Image.Resampling.BICUBIC)
        row, column = divmod(tile_number, MOSAIC_COLUMNS)
        left, top = column * TILE + 2, row * (TILE + caption_height) + 2
        canvas.paste(tile, (left, top))
        if dataset.class_names:
            name = caption_of_class(dataset.class_names[sample.label], sample.label)
            caption = fit(name, TILE - 4, CAPTION_SIZE, CAPTION)
            caption.draw(canvas, left, top + TILE - 4, TILE - 4, caption.height)
    return np.asarray(canvas)
