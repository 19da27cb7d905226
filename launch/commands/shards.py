"""`vitrail shards`: one verb, one function."""

import json
import os
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.commands.terminal import mistakes, parse_size, progress_bar, stage
from pretrain.errors import UserError
from pretrain.outcome import EXIT_RESUMABLE

CORES = os.cpu_count() or 1
SHOWN = 5
SECONDS_TIMED = 2.0
COLUMN = 30  # where values begin
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class ImageFormat(str, Enum):
    """How images can be stored."""

    JPG = "jpg"
    PNG = "png"
    WEBP = "webp"


class EngineName(str, Enum):
    """What runs the units of work."""

    LOCAL = "local"
    RAY = "ray"


app = typer.Typer(help="Make and index shards: WebDataset tars that are read in any order.", no_args_is_help=True)


@app.command("make")
def make(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with a subfolder for each class; a .csv or .parquet of paths or URLs and labels; tars, as a "
            "folder or with {000..123}; or `digits`."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="A new folder; gets train/ and validation/.")],
    validation: Annotated[float, typer.Option(min=0, max=0.9, help="Share of each class held out.")] = 0.1,
    shard_size: Annotated[str, typer.Option(help="Bytes of a shard at most, with kB, MB or GB.")] = "256MB",
    resize: Annotated[
        int | None, typer.Option(min=1, help="Shrink images to this shorter side, in pixels; 256 suits crops of 224.")
    ] = None,
    image_format: Annotated[
        ImageFormat | None, typer.Option("--format", help="Encode every image anew; else only what must be.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of what is encoded anew as JPEG or WebP.")] = 90,
    classes: Annotated[str | None, typer.Option(help="Only these classes, separated by commas.")] = None,
    unlabeled: Annotated[bool, typer.Option("--unlabeled", help="Images without classes.")] = False,
    class_names: Annotated[
        Path | None, typer.Option(help="A file with a class name a line, in label order, where labels are numbers.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="A table's column of paths or URLs.")] = None,
    label_column: Annotated[str | None, typer.Option(help="A table's column of classes.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the order in the shards.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what cannot be used, counted and named.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes; as many as there are cores.")] = CORES,
    engine: Annotated[
        EngineName, typer.Option(help="Where the work is done; a Ray cluster must see the source and OUT.")
    ] = EngineName.LOCAL,
) -> None:
    """Write images as shards with an index, shuffled, split into train/ and validation/.

    The same source, seed, size and encoding give the same bytes, on any number of workers. A command that was stopped
    or killed goes on where it was when it is typed again.

    Example: vitrail shards make photos/ shards/photos --resize 256

    Example: vitrail shards make photos.csv shards/photos --image-column url --label-column species --skip-bad

    Example: vitrail shards make 's3://bucket/part-{000..127}.tar' shards/mixed --unlabeled --validation 0
    """
    shard_bytes = parse_size(shard_size, "--shard-size")
    encoding, listing, making, plan, units = (
        stage(f"pretrain.data.{name}")
        for name in ("shards.encoding", "sources.open", "shards.make", "shards.plan", "shards.units")
    )
    with mistakes():
        how = listing.Listing(
            labeled=not unlabeled,
            class_names=read_class_names(class_names) if class_names else None,
            columns=stage("pretrain.data.sources.table").Columns(image_column, label_column),
        )
        making.refuse_used(out)
        with progress_bar("listing", None, "images") as advance:
            listed = listing.list_source(source, how, advance)
        if classes is not None:
            kept = [name.strip() for name in classes.split(",")]
            listed = stage("pretrain.data.sources.source").keep_classes(listed, kept)
        for remark in listed.remarks:
            print(remark)
        recipe = plan.Recipe(
            validation, shard_bytes, seed, encoding.Encoding(resize, image_format and image_format.value, quality)
        )
        try:
            with progress_bar("writing shards", len(listed), "images") as advance:
                made = making.make_shards(
                    listed,
                    out,
                    recipe,
                    skip_bad=skip_bad,
                    engine=local_engine(workers) if engine is EngineName.LOCAL else units.run_units_on_ray,
                    progress=advance,
                )
        except KeyboardInterrupt:
            print(f"{out}: stopped; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(EXIT_RESUMABLE) from None
    if skip_bad:
        for line in listed.faults:
            print(f"left out: {line}")
    for line in made.left_out[:SHOWN]:
        print(f"left out: {line}")
    if len(made.left_out) > SHOWN:
        print(f"left out: {len(made.left_out)} in all; {out / making.LEFT_OUT_FILE} names them")
    for name, info in made.splits.items():
        print(f"{out / name}: {describe(info)}")


@app.command("index")
def index(
    source: Annotated[str, typer.Argument(help="One split: a folder of WebDataset tars, or URLs with {000..123}.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the indexes go; needed for URLs, else beside the tars.")
    ] = None,
    class_names: Annotated[Path | None, typer.Option(help="A file with a class name a line, in label order.")] = None,
    label_key: Annotated[str, typer.Option(help="Key of the label in .json where there is no .cls.")] = "label",
    unlabeled: Annotated[
        bool, typer.Option("--unlabeled", help="Images without classes, with captions or nothing beside them.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes; as many as there are cores.")] = CORES,
    allow_pipe: Annotated[
        bool, typer.Option("--allow-pipe", help="Let a source be a command, as in pipe:COMMAND.")
    ] = False,
) -> None:
    """Index tars that someone else wrote, reading each once, and prove that each is whole.

    Example: vitrail shards index /data/imagenet/train --class-names classes.txt

    Example: vitrail shards index 's3://bucket/train-{000000..001023}.tar' --out shards/train
    """
    remote, scan = stage("pretrain.data.storage.remote"), stage("pretrain.data.shards.scan")
    with mistakes():
        if remote.is_remote(source):
            if out is None:
                raise UserError(f"{source}: the indexes need a folder of their own; name one with --out")
            folder, tars = out, remote.expand_braces(source)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder, tars = find_tars(Path(source), out)
        names = read_class_names(class_names) if class_names else None
        with progress_bar("indexing", len(tars), "shards") as advance:
            scanned = scan.index_shards(
                tars,
                folder,
                names,
                None if unlabeled else label_key,
                remote.FetchPolicy(allow_pipe=allow_pipe),
                local_engine(workers),
                advance,
            )
    for remark in scanned.remarks:
        print(remark)
    print(f"{folder}: {describe(scanned.info)}")


@app.command("check")
def check(
    place: Annotated[str, typer.Argument(help="A split: a folder, or a URL, with a dataset.json.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes; as many as there are cores.")] = CORES,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")] = False,
    allow_pipe: Annotated[bool, typer.Option("--allow-pipe", help="Let a shard be a command.")] = False,
) -> None:
    """Hold every byte of a split against its index; list what is wrong, and exit with 1 if anything is.

    Example: vitrail shards check shards/photos/train
    """
    check, remote = stage("pretrain.data.shards.check"), stage("pretrain.data.storage.remote")
    found = 0
    with mistakes():
        policy = remote.FetchPolicy(allow_pipe=allow_pipe)
        with progress_bar("checking", None, "shards") as advance:
            for finding in check.check_set(place, policy, local_engine(workers), advance):
                found += 1
                print(json.dumps(finding._asdict()) if as_json else "  ".join(filter(None, finding)))
        for name in [] if remote.is_remote(place) else check.stray_files(Path(place)):
            print(f"{place}/{name}: belongs to no shard", file=sys.stderr)
    if found:
        print(f"{place}: {found} {'fault' if found == 1 else 'faults'}", file=sys.stderr)
        raise typer.Exit(1)
    if not as_json:
        info = stage("pretrain.data.dataset.sharded").load_info(place, policy)
        print(f"{place}: {describe(info)}, every byte as it should be")


@app.command("stats")
def stats(
    place: Annotated[str, typer.Argument(help="A split: a folder, or a URL, with a dataset.json.")],
    picture: Annotated[Path | None, typer.Option(help="Also draw it: a PNG with samples and histograms.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Count classes, sizes, shapes and duplicates of a split.

    Example: vitrail shards stats shards/photos/train --picture photos.png
    """
    statistics = stage("pretrain.data.shards.stats")
    with mistakes():
        opened = open_set(place)
        with progress_bar("reading indexes", len(opened.shard_sizes), "shards") as advance:
            stats = statistics.read_stats(opened, advance)
        if picture is not None:
            statistics.draw(opened, stats, picture)
    if as_json:
        print(json.dumps(statistics.summary(stats)))
        return
    for name, value in statistics.summary(stats).items():
        shown = "  ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else value
        print(f"{name:<{COLUMN}}{shown}")
    for group in stats.duplicates[: statistics.SHOWN]:
        print(f"{'the same bytes':<{COLUMN}}{'  '.join(group)}")
    for group in stats.conflicts[: statistics.SHOWN]:
        print(f"{'in several classes':<{COLUMN}}{'  '.join(group)}")
    if picture is not None:
        print(f"{'picture':<{COLUMN}}{picture}")


@app.command("simulate")
def simulate(
    place: Annotated[str, typer.Argument(help="A split: a folder, or a URL, with a dataset.json.")],
    global_batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 1024,
    ranks: Annotated[int, typer.Option(min=1, help="GPUs, over all machines.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Loader workers of each rank: data.num_workers.")] = 4,
    shuffle_window: Annotated[int, typer.Option(min=1, help="Shards shuffled together: data.shuffle_window.")] = 64,
    cache_size: Annotated[str, typer.Option(help="The cache of each machine, with kB, MB or GB.")] = "100GB",
    image_size: Annotated[int, typer.Option(min=1, help="Pixels of the crop.")] = 224,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Say what a run would be like before GPUs are rented: steps, shuffle quality, downloads, images a second.

    Example: vitrail shards simulate shards/photos/train --ranks 64 --nodes 8
    """
    cache_bytes = parse_size(cache_size, "--cache-size")
    simulation = stage("pretrain.data.shards.simulate")
    with mistakes():
        opened = open_set(place)
        batches = min(simulation.BATCHES_DRAWN, max(sum(opened.shard_sizes) // global_batch_size, 1))
        with progress_bar("simulating", batches, "steps") as advance:
            result = simulation.simulate(
                opened,
                global_batch_size=global_batch_size,
                ranks=ranks,
                window=shuffle_window,
                cache_bytes=cache_bytes,
                progress=advance,
            )
        rate = stage("pretrain.data.shards.bench").loader_rate(opened, image_size, CORES, SECONDS_TIMED) / CORES
    if as_json:
        print(json.dumps({**vars(result), "images_per_second_per_worker": rate}))
        return
    least, most = result.samples_per_rank
    share = str(least) if least == most else f"{least} or {most}"
    lines = {
        "samples": f"{result.samples}",
        "steps an epoch": f"{result.steps_per_epoch:.1f}, each {share} a rank",
        "classes in a batch": f"{result.classes_in_a_batch:.1f} ({result.classes_if_fully_shuffled:.1f} if all samples "
        f"were shuffled at once), of {len(opened.class_names)}",
        "cache needed": f"{result.bytes_of_two_windows / 1e9:.2f} GB a machine, for two windows of {shuffle_window}",
        "download, where remote": f"{result.first_epoch_bytes_per_node / 1e9:.2f} GB a machine in the first epoch, "
        f"{result.later_epoch_bytes_per_node / 1e9:.2f} GB in each later one; "
        f"over all machines {result.first_epoch_bytes_per_node * nodes / 1e9:.2f} and "
        f"{result.later_epoch_bytes_per_node * nodes / 1e9:.2f} GB",
        "images a second": f"{rate:.0f} a worker where all {CORES} cores of this machine work, "
        f"{rate * max(workers, 1) * ranks:.0f} with {workers} workers on each of {ranks} ranks",
    }
    if not opened.class_names:
        del lines["classes in a batch"]
    for name, value in lines.items():
        print(f"{name:<{COLUMN}}{value}")


@app.command("bench")
def bench(
    folder: Annotated[Path, typer.Argument(help="A split: a folder with a dataset.json, its tars beside it.")],
    samples: Annotated[int, typer.Option(min=64, help="Read at most so many.")] = 2000,
    workers: Annotated[int, typer.Option(min=1, help="Of the whole loaders.")] = CORES,
    rounds: Annotated[int, typer.Option(min=1, help="In which all take turns; the medians count.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")] = False,
) -> None:
    """Measure the input stage on your shards, beside webdataset, Pillow and torch's DataLoader over a folder.

    Example: vitrail shards bench shards/photos/train
    """
    with mistakes():
        comparing = stage("pretrain.data.shards.bench")
        with progress_bar("measuring", comparing.ROWS, "figures") as advance:
            for row in comparing.compare(folder, samples, workers, rounds):
                advance(1)
                print(json.dumps(row._asdict()) if as_json else f"{row.what:<36}{row.ours:<28}{row.beside}", flush=True)


def open_set(place: str) -> Any:
    """Open data where it stands, with the cache that a run has by default."""
    sets = stage("pretrain.data.dataset.open")
    return sets.open_dataset(place, cache=sets.open_cache(stage("pretrain.config").SourceConfig(train=place)))


def local_engine(workers: int) -> Any:
    """Return what runs units of work on so many processes."""
    return partial(stage("pretrain.data.shards.units").run_units, num_workers=workers)


def find_tars(folder: Path, out: Path | None) -> tuple[Path, list[str]]:
    """Return where the index of a folder's tars goes, and the tars as it will name them."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if packed := sorted(path.name for path in folder.iterdir() if path.name.endswith(COMPRESSED)):
        raise UserError(
            f"{folder}: {len(packed)} compressed tars, the first is {packed[0]}; nothing in them can be read by "
            "itself: unpack them, as with gunzip"
        )
    tars = sorted(path.name for path in folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: has no .tar files")
    if out is not None and out.resolve() != folder.resolve():
        raise UserError(f"{out}: the indexes of {folder} stand beside its tars; leave --out away")
    return folder, tars


def read_class_names(path: Path) -> list[str]:
    """Read a class name from each line."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as reason:
        raise UserError(f"{path}: cannot be read: {reason.strerror}") from None


def describe(info: Any) -> str:
    """Sum up a split in a line."""
    classes = f" in {len(info.class_names)} classes" if info.class_names else ""
    shards = f"{len(info.shards)} {'shard' if len(info.shards) == 1 else 'shards'}"
    return f"{info.num_samples} images{classes}, {shards}, {info.num_bytes / 1e6:.1f} MB"
