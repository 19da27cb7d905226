"""The `tessera` command: one verb, one function.

Stages are imported when their verb runs, so that `--help` and a user's mistakes don't wait for torch.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain import EXIT_MISTAKE, UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}

app = typer.Typer(
    help="Pretrain Vision Transformers on your images, export them to Hugging Face, fine-tune them.\n\n"
    "Training itself is started by a launcher: deepspeed launch/pretrain.py --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
shards = typer.Typer(help="Make and index shards: WebDataset tars that are read in any order.", no_args_is_help=True)
app.add_typer(shards, name="shards")


@shards.command("make")
def shards_make(
    source: Annotated[str, typer.Argument(help="A folder with a subfolder for each class, or `digits`.")],
    out: Annotated[Path, typer.Argument(help="A new folder; gets train/ and validation/.")],
    validation: Annotated[float, typer.Option(min=0, max=0.9, help="Share of each class held out.")] = 0.1,
    shard_size: Annotated[str, typer.Option(help="Bytes of a shard, with kB, MB or GB.")] = "256MB",
    classes: Annotated[str | None, typer.Option(help="Only these classes, separated by commas.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the order in the shards.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what cannot be used, counted and named.")
    ] = False,
) -> None:
    """Write images as shards with an index, split into train/ and validation/.

    The same source, seed and size give the same bytes.

    Example: tessera shards make photos/ shards/photos
    """
    shard_bytes = parse_size(shard_size, "--shard-size")
    sources, making = stage("pretrain.data.sources"), stage("pretrain.data.shards.make")
    with mistakes():
        listed = sources.list_source(source)
        if classes is not None:
            listed = sources.keep_classes(listed, [name.strip() for name in classes.split(",")])
        for remark in listed.remarks:
            print(remark)
        with progress_bar("writing shards", len(listed.images), "images") as advance:
            made = making.make_shards(
                listed,
                out,
                validation=validation,
                shard_bytes=shard_bytes,
                seed=seed,
                skip_bad=skip_bad,
                progress=advance,
            )
    for line in [*(listed.faults if skip_bad else []), *made.left_out]:
        print(f"left out: {line}")
    for name, info in made.splits.items():
        print(f"{out / name}: {describe(info)}")


@shards.command("index")
def shards_index(
    source: Annotated[str, typer.Argument(help="One split: a folder of WebDataset tars, or URLs with {000..123}.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the indexes go; needed for URLs, else beside the tars.")
    ] = None,
    class_names: Annotated[Path | None, typer.Option(help="A file with a class name a line, in label order.")] = None,
    label_key: Annotated[str, typer.Option(help="Key of the label in .json where there is no .cls.")] = "label",
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Images without classes, with captions or nothing beside them.")
    ] = False,
    allow_pipe: Annotated[
        bool, typer.Option("--allow-pipe", help="Let a source be a command, as in pipe:COMMAND.")
    ] = False,
) -> None:
    """Index tars that someone else wrote, reading each once, and prove that each is whole.

    Example: tessera shards index /data/imagenet/train --class-names classes.txt

    Example: tessera shards index 's3://bucket/train-{000000..001023}.tar' --out shards/train
    """
    index, remote, scan = (stage(f"pretrain.data.{name}") for name in ("index", "remote", "shards.scan"))
    with mistakes():
        policy = remote.FetchPolicy(allow_pipe=allow_pipe)
        if remote.is_remote(source):
            if out is None:
                raise index.DataError(f"{source}: the indexes need a folder of their own; name one with --out")
            folder, tars = out, remote.expand_braces(source)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder, tars = find_tars(Path(source), out, index.DataError)
        names = read_class_names(class_names, index.DataError) if class_names else None
        with progress_bar("indexing", len(tars), "shards") as advance:
            scanned = scan.index_shards(
                tars,
                folder,
                lambda name: remote.open_stream(name, policy) if remote.is_remote(name) else (folder / name).open("rb"),
                names,
                None if unlabelled else label_key,
                advance,
            )
    for remark in scanned.remarks:
        print(remark)
    print(f"{folder}: {describe(scanned.info)}")


@shards.command("check")
def shards_check(
    folder: Annotated[Path, typer.Argument(help="A split: a folder with a dataset.json.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes; as many as there are cores.")] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")] = False,
    allow_pipe: Annotated[bool, typer.Option("--allow-pipe", help="Let a shard be a command.")] = False,
) -> None:
    """Hold every byte of a split against its index; list what is wrong, and exit with 1 if anything is.

    Example: tessera shards check shards/photos/train
    """
    check, remote = stage("pretrain.data.shards.check"), stage("pretrain.data.remote")
    found = 0
    with mistakes():
        info = stage("pretrain.data.index").DatasetInfo.load(folder)
        for name in check.stray_files(folder):
            print(f"{folder / name}: belongs to no shard", file=sys.stderr)
        policy = remote.FetchPolicy(allow_pipe=allow_pipe)
        with progress_bar("checking", len(info.shards), "shards") as advance:
            for finding in check.check_set(folder, workers, policy, advance):
                found += 1
                print(json.dumps(finding._asdict()) if as_json else "  ".join(filter(None, finding)))
    if found:
        print(f"{folder}: {found} faults", file=sys.stderr)
        raise typer.Exit(1)
    if not as_json:
        print(f"{folder}: {describe(info)}, every byte as it should be")


@shards.command("stats")
def shards_stats(
    folder: Annotated[Path, typer.Argument(help="A split: a folder with a dataset.json.")],
    picture: Annotated[Path | None, typer.Option(help="Also draw it: a PNG with samples and histograms.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Count classes, sizes, shapes and duplicates of a split.

    Example: tessera shards stats shards/photos/train --picture photos.png
    """
    statistics, sets = stage("pretrain.data.shards.stats"), stage("pretrain.data.sets")
    with mistakes():
        opened = sets.open_samples(folder)
        with progress_bar("reading indexes", len(opened.shard_sizes), "shards") as advance:
            stats = statistics.read_stats(opened, advance)
        if picture is not None:
            statistics.draw(opened, stats, picture)
    if as_json:
        print(json.dumps(statistics.summary(stats)))
        return
    for name, value in statistics.summary(stats).items():
        shown = "  ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else value
        print(f"{name:<24}{shown}")
    for group in stats.duplicates[: statistics.SHOWN]:
        print(f"the same bytes          {'  '.join(group)}")
    if picture is not None:
        print(f"picture                 {picture}")


@shards.command("simulate")
def shards_simulate(
    folder: Annotated[Path, typer.Argument(help="A split: a folder with a dataset.json.")],
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

    Example: tessera shards simulate shards/photos/train --ranks 64 --nodes 8
    """
    cache_bytes = parse_size(cache_size, "--cache-size")
    simulation, sets = stage("pretrain.data.shards.simulate"), stage("pretrain.data.sets")
    with mistakes():
        opened = sets.open_samples(folder)
        shard_bytes = [shard.num_bytes for shard in stage("pretrain.data.index").DatasetInfo.load(folder).shards]
        timed = simulation.BATCHES_DRAWN + simulation.SAMPLES_TIMED
        with progress_bar("simulating", timed, "steps") as advance:
            result = simulation.simulate(
                opened,
                shard_bytes,
                global_batch_size=global_batch_size,
                ranks=ranks,
                window=shuffle_window,
                cache_bytes=cache_bytes,
                make_view=stage("pretrain.data.loader").work_of_a_worker(image_size),
                progress=advance,
            )
    if as_json:
        print(json.dumps(vars(result)))
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
        f"{result.later_epoch_bytes_per_node / 1e9:.2f} GB in each later one; {nodes} machines",
        "images a second": f"{result.images_per_second_per_worker:.0f} a worker on this machine's cores, "
        f"{result.images_per_second_per_worker * max(workers, 1) * ranks:.0f} with {workers} workers on {ranks} ranks",
    }
    for name, value in lines.items():
        print(f"{name:<24}{value}")


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints/step-*.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Turn a checkpoint into a Hugging Face folder that is proved to give the same numbers.

    Example: tessera export runs/quickstart runs/quickstart/export
    """
    with mistakes():
        checkpoint = stage("pretrain.checkpoint.manifest").find_checkpoint(run)
        proof = stage("pretrain.export.folder").export(checkpoint, out, overwrite)
    stage("pretrain.tracking.tracker").tag_run(checkpoint.parents[1], exported_folder=str(out.resolve()))
    print(f"{out}: loads strictly with transformers; logits differ by at most {proof.logits:.1e}")


@app.command("predict")
def predict(
    folder: Annotated[Path, typer.Argument(help="A fine-tuned or exported Hugging Face folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to print for each image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")] = False,
) -> None:
    """Print the likeliest classes of images, with their probabilities.

    Example: tessera predict runs/quickstart-finetune/model cat.jpg dog.png
    """
    with mistakes():
        for prediction in stage("finetune.predict").predict(folder, images, top_k):
            if as_json:
                classes = [{"class": name, "probability": value} for name, value in prediction.classes]
                print(json.dumps({"image": str(prediction.path), "classes": classes}))
            else:
                print(f"{prediction.path}: " + ", ".join(f"{name} {value:.1%}" for name, value in prediction.classes))


def main() -> None:
    """Run the command that the user typed."""
    app()


def stage(module: str) -> Any:
    """Import the part of Tessera that a verb needs."""
    return importlib.import_module(module)


@contextmanager
def mistakes() -> Iterator[None]:
    """Answer a user's mistake with its sentence and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_MISTAKE) from None
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), file=sys.stderr)
        raise typer.Exit(1) from None


@contextmanager
def progress_bar(label: str, total: int, unit: str) -> Iterator[Any]:
    """Show how far a long piece of work is and when it will end; nothing where nobody looks."""
    rich = stage("rich.progress")
    speed = rich.TransferSpeedColumn() if unit == "bytes" else rich.MofNCompleteColumn()
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), speed, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=stage("rich.console").Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


def parse_size(text: str, option: str) -> int:
    """Read a size such as 256MB; a plain number is bytes."""
    for unit, factor in UNITS.items():
        if text.endswith(unit) and text.removesuffix(unit).isdigit():
            return int(text.removesuffix(unit)) * factor
    if text.isdigit():
        return int(text)
    raise typer.BadParameter(f"expected a size such as 256MB, got {text!r}", param_hint=option)


def find_tars(folder: Path, out: Path | None, error: type[Exception]) -> tuple[Path, list[str]]:
    """Return where the index of a folder's tars goes, and the tars as it will name them."""
    if not folder.is_dir():
        raise error(f"{folder}: no such folder")
    if packed := sorted(path.name for path in folder.iterdir() if path.name.endswith(COMPRESSED)):
        raise error(
            f"{folder}: {len(packed)} compressed tars, the first is {packed[0]}; nothing in them can be read by "
            "itself: unpack them, as with gunzip"
        )
    tars = sorted(path.name for path in folder.glob("*.tar"))
    if not tars:
        raise error(f"{folder}: has no .tar files")
    if out is not None and out.resolve() != folder.resolve():
        raise error(f"{out}: the indexes of {folder} stand beside its tars; leave --out away")
    return folder, tars


def read_class_names(path: Path, error: type[Exception]) -> list[str]:
    """Read a class name from each line."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from None


def describe(info: Any) -> str:
    """Sum up a split in a line."""
    return (
        f"{info.num_samples} images in {len(info.class_names)} classes, {len(info.shards)} "
        f"{'shard' if len(info.shards) == 1 else 'shards'}, {info.num_bytes / 1e6:.1f} MB"
    )
