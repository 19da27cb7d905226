"""`vitrail shards`: turn images into shards, and check, describe and measure them."""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from launch.commands.terminal import parse_size, report_errors
from pretrain.cores import available_cores
from pretrain.errors import UserError
from pretrain.outcome import EXIT_FAILED, EXIT_RESUMABLE
from pretrain.tracking.progress import progress_bar

if TYPE_CHECKING:
    from pretrain.data.dataset.dataset import Dataset
    from pretrain.data.storage.index import DatasetInfo

NUM_CORES = available_cores()
NUM_SHOWN = 5  # lines of a long list that are printed
MEASURED_SECONDS = 2.0
COLUMN = 30  # where values begin

Split = Annotated[str, typer.Argument(help="Folder or URL of one split, where its dataset.json is.")]
NumWorkers = Annotated[
    int, typer.Option(min=1, show_default="number of CPU cores", help="Number of processes that share the work.")
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        help="Text file with one class name per line, for labels that are numbers; the first line names label 0."
    ),
]
Unlabeled = Annotated[
    bool, typer.Option("--unlabeled", help="Ignore labels; for images without classes, such as image-caption pairs.")
]
AllowPipe = Annotated[
    bool,
    typer.Option("--allow-pipe", help="Allow shards of the form pipe:COMMAND. Only for sources that you trust."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line, for scripts.")]

Set = TypeVar("Set")

app = typer.Typer(
    help="Turn images into shards (indexed WebDataset tars), and check, describe and measure them.",
    no_args_is_help=True,
)


@app.command("make")
def make(
    source: Annotated[
        str,
        typer.Argument(
            help="Where the images are: a folder with one subfolder per class; a .csv, .tsv or .parquet table of paths "
            "or URLs; WebDataset tars, as a folder or a pattern with {000..123}; or the built-in set `digits`."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create; it gets the subfolders train/ and validation/.")],
    validation: Annotated[
        float, typer.Option(min=0, max=0.9, help="Fraction of each class to hold out for validation; 0 for none.")
    ] = 0.1,
    shard_size: Annotated[
        str,
        typer.Option(
            help="Maximum size of a shard, with kB, MB or GB. Choose it so that there are several shards per GPU."
        ),
    ] = "256MB",
    resize: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="keep the size",
            help="Shrink larger images to this length of the shorter side, in pixels; 256 suits training at 224.",
        ),
    ] = None,
    image_format: Annotated[
        Literal["jpg", "png", "webp"] | None,
        typer.Option(
            "--format",
            show_default="keep JPEG, PNG and WebP; others become PNG",
            help="Format in which to store all images.",
        ),
    ] = None,
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="JPEG or WebP quality of images that are resized or converted.")
    ] = 90,
    classes: Annotated[
        str | None, typer.Option(show_default="all", help="Classes to use, separated by commas.")
    ] = None,
    unlabeled: Unlabeled = False,
    class_names: ClassNames = None,
    image_column: Annotated[
        str | None,
        typer.Option(
            show_default="path, url, image, file_name, filename or file", help="Column of a table with the images."
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(show_default="label, class, category or target", help="Column of a table with the classes."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed for the train/validation split and for the order within the shards.")
    ] = 0,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave out unreadable images and list them, instead of stopping with an error."
        ),
    ] = False,
    workers: NumWorkers = NUM_CORES,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="Where to run: on this machine, or on a Ray cluster whose machines all see the source and the output."
        ),
    ] = "local",
) -> None:
    """Write images as shuffled shards with an index, split into train/ and validation/.

    The same source, seed, shard size and encoding give identical files with any number of workers. If the command is
    interrupted or killed, run it again: it continues with the shards that are still missing.

    Example: vitrail shards make photos/ shards/photos --resize 256

    Example: vitrail shards make photos.csv shards/photos --image-column url --label-column species --skip-bad

    Example: vitrail shards make 's3://bucket/part-{000..127}.tar' shards/mixed --unlabeled --validation 0
    """
    shard_bytes = parse_size(shard_size, "--shard-size")
    from pretrain.data.shards.encoding import Encoding
    from pretrain.data.shards.make import make_shards, refuse_existing
    from pretrain.data.shards.plan import ShardOptions
    from pretrain.data.shards.tasks import run_tasks, run_tasks_on_ray
    from pretrain.data.sources.open import SourceOptions, list_source
    from pretrain.data.sources.source import keep_classes
    from pretrain.data.sources.table import Columns
    from pretrain.data.storage.webdataset import read_class_names

    options = ShardOptions(validation, shard_bytes, seed, Encoding(resize, image_format, quality))
    with report_errors():
        names = read_class_names(class_names) if class_names else None
        columns = Columns(image_column, label_column)
        source_options = SourceOptions(labeled=not unlabeled, class_names=names, columns=columns)
        refuse_existing(out)
        with progress_bar("listing", None, "images") as advance:
            images = list_source(source, source_options, advance)
        if classes is not None:
            images = keep_classes(images, [name.strip() for name in classes.split(",")])
        for note in images.notes:
            print(note)
        try:
            with progress_bar("writing shards", len(images), "images") as advance:
                made = make_shards(
                    images,
                    out,
                    options,
                    skip_bad=skip_bad,
                    executor=partial(run_tasks, num_workers=workers) if engine == "local" else run_tasks_on_ray,
                    progress=advance,
                )
        except KeyboardInterrupt:
            print(f"{out}: interrupted; the same command continues from here", file=sys.stderr)
            sys.exit(EXIT_RESUMABLE)
    for bits, count in sorted(made.scaled_from.items()):
        number = "1 image" if count == 1 else f"{count} images"
        print(f"{number} of 16-bit values that use {bits} bits: scaled from {bits} to 8 bits")
    for note in made.notes:
        print(note)
    for problem in images.problems:
        print(f"left out: {problem}")
    print_left_out(made.left_out, out)
    for name, info in made.splits.items():
        print(f"{out / name}: {describe(info)}")
    print_next_command(*(f"data.{name}={out / name}" for name in made.splits))


@app.command("index")
def index(
    source: Annotated[
        str, typer.Argument(help="Tars of one split: a folder, or paths or URLs with a pattern such as {000..123}.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            show_default="next to the tars",
            help="Folder for the indexes and dataset.json, which is then the path of the data; required for URLs, for "
            "a part of a folder's tars, and for a folder that cannot be written.",
        ),
    ] = None,
    class_names: ClassNames = None,
    label_key: Annotated[
        str, typer.Option(help="Key of the label in a sample's .json, for samples without a .cls member.")
    ] = "label",
    unlabeled: Unlabeled = False,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Leave out samples that cannot be used (no image, no label, unreadable) and list them, instead of "
            "stopping with an error.",
        ),
    ] = False,
    workers: NumWorkers = NUM_CORES,
    allow_pipe: AllowPipe = False,
) -> None:
    """Index existing WebDataset tars, so that a run can train on them.

    Reads every tar once, verifies its images, and writes one index per tar and a dataset.json. The tars stay unchanged.

    Example: vitrail shards index /data/imagenet/train --class-names classes.txt

    Example: vitrail shards index /read-only/tars --out indexes/train --skip-bad

    Example: vitrail shards index 's3://bucket/train-{000000..001023}.tar' --out shards/train
    """
    from pretrain.data.shards.scan import index_shards
    from pretrain.data.shards.tasks import run_tasks
    from pretrain.data.storage.remote import FetchPolicy
    from pretrain.data.storage.tar_set import describe_beside
    from pretrain.data.storage.webdataset import read_class_names

    with report_errors():
        folder, tars, tar_folder = find_tars_to_index(source, out)
        lost = describe_beside(Path(source)) if Path(source).is_dir() else []
        if lost and not skip_bad:
            raise UserError(f"{source}: {lost[0]}; move them away, or leave them out with --skip-bad")
        names = read_class_names(class_names) if class_names else None
        with progress_bar("indexing", len(tars), "shards") as advance:
            indexed = index_shards(
                tars,
                folder,
                names,
                None if unlabeled else label_key,
                FetchPolicy(allow_pipe=allow_pipe),
                partial(run_tasks, num_workers=workers),
                advance,
                tar_folder=tar_folder,
                skip_bad=skip_bad,
            )
    for note in indexed.notes:
        print(note)
    print_left_out([*lost, *indexed.left_out], folder)
    print(f"{folder}: {describe(indexed.info)}")
    print_next_command(f"data.train={folder}")


@app.command("check")
def check(
    split: Split,
    workers: NumWorkers = NUM_CORES,
    as_json: Json = False,
    allow_pipe: AllowPipe = False,
) -> None:
    """Verify every byte of a split against its index and print every fault; the exit code is 1 if there is any.

    Example: vitrail shards check shards/photos/train
    """
    from pretrain.config import SourceConfig
    from pretrain.data.dataset.open import find_sets, open_cache
    from pretrain.data.dataset.sharded import load_info
    from pretrain.data.shards.check import check_set, stray_files
    from pretrain.data.shards.tasks import run_tasks
    from pretrain.data.storage.remote import FetchPolicy, is_remote

    num_faults, policy = 0, FetchPolicy(allow_pipe=allow_pipe)
    executor = partial(run_tasks, num_workers=workers)
    with report_errors():
        index = single_set(split, find_sets(split, open_cache(SourceConfig(train=split))))
        with progress_bar("checking", None, "shards") as advance:
            for fault in check_set(index, policy, executor, advance):
                num_faults += 1
                print(json.dumps(fault._asdict()) if as_json else "  ".join(filter(None, fault)))
        for name in [] if is_remote(split) else stray_files(Path(index)):
            print(f"{index}/{name}: does not belong to any shard", file=sys.stderr)
    if num_faults:
        print(f"{split}: {num_faults} {'fault' if num_faults == 1 else 'faults'}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    if not as_json:
        print(f"{split}: {describe(load_info(index, policy))}, no faults")


@app.command("stats")
def stats(
    split: Split,
    picture: Annotated[
        Path | None,
        typer.Option(show_default="none", help="PNG file to write, with sample images and histograms."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the class balance, image sizes, formats and duplicates of a split.

    Example: vitrail shards stats shards/photos/train --picture photos.png
    """
    from pretrain.data.shards.stats import plot, read_stats, summary

    with report_errors():
        opened = open_split(split)
        with progress_bar("reading indexes", len(opened.shard_sizes), "shards") as advance:
            found = read_stats(opened, advance)
        if picture is not None:
            plot(opened, found, picture)
    if as_json:
        print(json.dumps(summary(found)))
        return
    for name, value in summary(found).items():
        shown = "  ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else value
        print(f"{name:<{COLUMN}}{shown}")
    for group in found.duplicates[:NUM_SHOWN]:
        print(f"{'identical images':<{COLUMN}}{'  '.join(group)}")
    for group in found.conflicts[:NUM_SHOWN]:
        print(f"{'identical, different classes':<{COLUMN}}{'  '.join(group)}")
    if picture is not None:
        print(f"{'picture':<{COLUMN}}{picture}")


@app.command("simulate")
def simulate(
    split: Split,
    global_batch_size: Annotated[int, typer.Option(min=1, help="Images per optimizer step over all ranks.")] = 1024,
    ranks: Annotated[int, typer.Option(min=1, help="Number of GPUs over all machines.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Data workers per rank, as in data.num_workers.")] = 4,
    shuffle_window: Annotated[
        int,
        typer.Option(min=1, help="Number of shards whose samples are shuffled together, as in data.shuffle_window."),
    ] = 64,
    cache_size: Annotated[
        str,
        typer.Option(help="Size of each machine's cache for remote shards, with kB, MB or GB, as in data.cache_bytes."),
    ] = "100GB",
    image_size: Annotated[int, typer.Option(min=1, help="Height and width of the training crops in pixels.")] = 224,
    as_json: Json = False,
) -> None:
    """Estimate how training would read a split: steps per epoch, shuffle quality, downloads and loading speed.

    Run it before renting GPUs. The loading speed is measured on this machine for a few seconds; everything else follows
    from the indexes.

    Example: vitrail shards simulate shards/photos/train --ranks 64 --nodes 8
    """
    cache_bytes = parse_size(cache_size, "--cache-size")
    from pretrain.data.shards.bench import loader_rate
    from pretrain.data.shards.simulate import NUM_SAMPLED_BATCHES
    from pretrain.data.shards.simulate import simulate as simulate_epoch

    with report_errors():
        opened = open_split(split)
        num_batches = min(NUM_SAMPLED_BATCHES, max(sum(opened.shard_sizes) // global_batch_size, 1))
        with progress_bar("simulating", num_batches, "steps") as advance:
            result = simulate_epoch(
                opened,
                global_batch_size=global_batch_size,
                ranks=ranks,
                window=shuffle_window,
                cache_bytes=cache_bytes,
                progress=advance,
            )
        rate = loader_rate(opened, image_size, NUM_CORES, MEASURED_SECONDS) / NUM_CORES
    if as_json:
        print(json.dumps({**vars(result), "images_per_second_per_worker": rate}))
        return
    least, most = result.samples_per_rank
    per_rank = str(least) if least == most else f"{least} or {most}"
    first_epoch, later_epoch = result.first_epoch_bytes_per_node / 1e9, result.later_epoch_bytes_per_node / 1e9
    lines = {
        "samples": f"{result.samples}",
        "steps per epoch": f"{result.steps_per_epoch:.1f}, each with {per_rank} samples per rank",
        "classes per batch": f"{result.classes_in_a_batch:.1f} of {len(opened.class_names)} "
        f"({result.classes_if_fully_shuffled:.1f} with a full shuffle)",
        "cache needed": f"{result.bytes_of_two_windows / 1e9:.2f} GB per machine, for two windows of {shuffle_window}",
        "download if remote": f"{first_epoch:.2f} GB per machine in the first epoch, then {later_epoch:.2f} GB per "
        f"epoch; {first_epoch * nodes:.2f} and {later_epoch * nodes:.2f} GB over all machines",
        "images per second": f"{rate:.0f} per worker with all {NUM_CORES} cores of this machine busy; "
        f"{rate * max(workers, 1) * ranks:.0f} in total with {workers} workers on each of {ranks} ranks",
    }
    if not opened.class_names:
        del lines["classes per batch"]
    for name, value in lines.items():
        print(f"{name:<{COLUMN}}{value}")


@app.command("bench")
def bench(
    folder: Annotated[Path, typer.Argument(help="Local folder of one split, with its tars and dataset.json.")],
    samples: Annotated[int, typer.Option(min=64, help="Maximum number of samples to read per measurement.")] = 2000,
    workers: Annotated[
        int,
        typer.Option(
            min=1, show_default="number of CPU cores", help="Number of worker processes of each complete data loader."
        ),
    ] = NUM_CORES,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of rounds; every method runs once per round and the median is printed.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Measure reading, decoding and loading on your shards, next to webdataset, Pillow and PyTorch.

    Example: vitrail shards bench shards/photos/train
    """
    from pretrain.data.shards.bench import NUM_ROWS, compare

    with report_errors():
        open_split(str(folder))  # indexes the tars if they have no index
        with progress_bar("measuring", NUM_ROWS, "figures") as advance:
            for row in compare(folder, samples, workers, rounds):
                advance(1)
                text = f"{row.what:<36}{row.value:<28}{row.comparison}"
                print(json.dumps(row._asdict()) if as_json else text, flush=True)


def open_split(split: str) -> "Dataset":
    """Open a local or remote split with the cache that a run uses by default; index local tars that have no index."""
    from pretrain.config import SourceConfig
    from pretrain.data.dataset.open import open_cache, open_dataset
    from pretrain.data.shards.first_use import index_tars, tars_without_index

    cache = open_cache(SourceConfig(train=split))
    for tars in tars_without_index([split], cache.folder):
        with progress_bar(f"indexing {tars.folder.name}", None, "tars") as advance:
            notes = index_tars(tars, cache.folder, labels_required=False, progress=advance)
        print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    return open_dataset(split, cache=cache, labeled=False)


def single_set(split: str, sets: list[Set]) -> Set:
    """Return the only shard set that a path means.

    Raises:
        UserError: If the path means several sets.
    """
    if len(sets) > 1:
        raise UserError(f"{split}: names {len(sets)} shard sets; give one at a time")
    return sets[0]


def find_tars_to_index(source: str, out: Path | None) -> tuple[Path, list[str], Path | None]:
    """Return the folder for the indexes, the tars as dataset.json will name them, and the folder of local tars.

    Args:
        source: Folder with tars, or paths or URLs with a brace pattern.
        out: Folder for the indexes, or None for the folder of the tars.

    Raises:
        UserError: If there are no readable tars, or the indexes cannot be written.
    """
    from pretrain.data.storage.remote import expand_braces, is_remote
    from pretrain.data.storage.tar_set import COMPRESSED, local_tar_sets
    from pretrain.files import make_writable

    if is_remote(source):
        if out is None:
            raise UserError(f"{source}: indexes cannot be written to a URL; choose a local folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        return out, expand_braces(source), None
    tars = single_set(source, local_tar_sets(source))
    folder = tars.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder with .tar files")
    if packed := sorted(path.name for path in folder.iterdir() if path.name.endswith(COMPRESSED)):
        raise UserError(
            f"{folder}: {len(packed)} compressed tars, the first is {packed[0]}; Vitrail reads single samples, which "
            "compression prevents; decompress the tars, for example with gunzip"
        )
    if not tars.names:
        raise UserError(f"{folder}: no .tar files in this folder; to make shards of images, use `vitrail shards make`")
    if out is None and not tars.is_whole_folder:
        raise UserError(f"{source}: names a part of a folder's tars; choose a folder for their indexes with --out")
    if out is not None and out.resolve() != folder.resolve() and any(out.glob("*.tar")):
        raise UserError(f"{out}: contains tars, whose indexes belong there; choose another folder with --out")
    if reason := make_writable(out or folder):
        raise UserError(f"{out or folder}: {reason}; choose a folder for the indexes with --out")
    return out or folder, list(tars.names), folder


def print_next_command(*overrides: str) -> None:
    """Print the command that trains on a new set of shards."""
    print(f"next: vitrail pretrain FILE {shlex.join(overrides)}  # vitrail init writes a FILE")


def print_left_out(lines: list[str], out: Path) -> None:
    """Print the first lines about what was left out, and where all of them are."""
    from pretrain.data.storage.index import LEFT_OUT_FILE

    for line in lines[:NUM_SHOWN]:
        print(f"left out: {line}")
    if len(lines) > NUM_SHOWN:
        print(f"left out: {len(lines)} in total; {out / LEFT_OUT_FILE} lists them all")


def describe(info: "DatasetInfo") -> str:
    """Return the number of images, classes, shards and bytes of a split, in one line."""
    classes = f" in {len(info.class_names)} classes" if info.class_names else ""
    shards = f"{len(info.shards)} {'shard' if len(info.shards) == 1 else 'shards'}"
    return f"{info.num_samples} images{classes}, {shards}, {info.num_bytes / 1e6:.1f} MB"
