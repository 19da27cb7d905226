"""Train small models on one or two ranks; tests/pretrain/train compares what the main ranks have seen.

    python tests/pretrain/ranks_train.py --list
    python tests/pretrain/ranks_train.py --only zero2 mae-zero3 --world-size 2 --folder /tmp/runs

The runs are listed in tests/support/training.py. Each writes `seen.json` and a log for each rank into its own folder.
"""

import contextlib
import errno
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch._dynamo
import torch._inductor.compile_fx  # torch and DeepSpeed import both late; here every forked rank finds them imported
from torch.optim.swa_utils import AveragedModel

import pretrain.train
from benchmarks.counting import HostWaits
from pretrain import distributed
from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.manifest import Manifest, SavedFile
from pretrain.checkpoint.pieces import Reader, load_weights, write_file
from pretrain.checkpoint.restore import newest_intact
from pretrain.config import PretrainConfig
from pretrain.configfile import CommandLine, load_config
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import BatchPlan, training_batches
from pretrain.data.loading.meters import STAGES as STAGES_OF_INPUT
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.engine.deepspeed import start_distributed
from pretrain.engine.partitions import count_optimizer_steps
from pretrain.errors import MachineError
from pretrain.journal import read_rows
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.optimizers import build_optimizer
from pretrain.run import Run, open_run
from pretrain.schedules import learning_rate_at
from pretrain.steps import Batches
from pretrain.stop_signal import StopSignal
from pretrain.train import take_step, train_with_tracking
from tests.support.foreign_tars import damage_header, write_tars
from tests.support.ranks import folder_of, main
from tests.support.training import (
    CONTINUED,
    EMA_DECAY,
    FULL_DISK,
    IN_MLFLOW,
    KILLED_IN_SAVE,
    LAST,
    LONG,
    LONG_RUN,
    MIDDLE,
    NEW_TARS,
    NEW_TARS_SETTING,
    OWED,
    RECIPE,
    RECIPES,
    REFERENCES,
    REFUSED,
    SETTINGS,
    STARTS,
    STOPPED,
    STREAM,
    Setting,
    all_runs,
    needs,
)

SPEEDS = {
    "time",
    "probe/seconds",
    "speed/images_per_second",
    "data/wait_fraction",
    "data/batches_ready",
    "data/megabytes_per_second",
    *(f"data/{stage}_busy" for stage in STAGES_OF_INPUT),
}
COUNTED_STEP = 2  # counted from 0; the first one creates the state of the optimizer
WEIGHT = "encoder.patch_embedding.weight"


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run one of the runs on this rank; return what the main rank has seen."""
    root = folder.parents[1 + name.count("/")]
    recipe = root / "tiny.yaml"
    start_distributed()
    if name in SETTINGS:
        in_mlflow = (distributed.world_size(), name) == IN_MLFLOW
        seen = train_and_resume(recipe, folder, SETTINGS[name], in_mlflow=in_mlflow)
    elif name in REFERENCES:
        seen = train_without_deepspeed(recipe, REFERENCES[name])
    elif name in STARTS:
        seen = train_without_deepspeed(recipe, STARTS[name], steps=0)
    elif name in (STOPPED, FULL_DISK, KILLED_IN_SAVE):
        fault = {STOPPED: stop_in_evaluation, FULL_DISK: fail_in_save, KILLED_IN_SAVE: die_in_save}[name]
        seen = fault(recipe, folder)
    elif name == LONG:
        run_to_end(load(recipe, *LONG_RUN, f"run_dir={folder / 'run'}"))
        seen = {"rows": rows_of(folder / "run")}
    elif name == REFUSED:
        seen = start_wrongly(recipe, folder)
    elif name == NEW_TARS:
        seen = train_from_new_tars(recipe, folder)
    elif name == STREAM:
        seen = train_from_stream(recipe, folder)
    elif name.startswith(RECIPE):
        seen = {"losses": try_recipe(RECIPES[name.removeprefix(RECIPE)], folder, recipe)}
    else:
        [(world_size, source)] = needs(distributed.world_size(), name)
        whole = folder_of(root, world_size, source) / "whole"
        if name.startswith(CONTINUED):
            seen = continue_from(whole, recipe, folder, SETTINGS[source])
        else:
            assert name.startswith(OWED), f"{name}: unknown run; --list prints all of them"
            seen = {"rows": evaluate_after_the_end(whole, recipe, folder, SETTINGS[source])}
    distributed.leave_process_group()
    return seen


def run_to_end(config: PretrainConfig) -> tuple[int, list[int], list[int]]:
    """Train to the last step.

    Returns:
        The step it began at, the position of each sample and the image size of each micro-batch on this rank.
    """
    positions, pixels = [], []

    def note(batch: Batch, device: torch.device) -> Batch:
        if run.objective.training:
            positions.extend(batch["position"].tolist())
            pixels.extend([batch["image"].shape[-1]] if "image" in batch else [])
        return to_device(batch, device)

    with open_run(config) as run, mock.patch("pretrain.steps.to_device", note):
        first = run.state.step
        assert count_optimizer_steps(run.engine) == first  # DeepSpeed itself has taken none
        adds_up = config.engine.accumulation_steps(distributed.world_size()) > 1
        if config.engine.zero_stage and distributed.world_size() > 1 and adds_up:  # bf16 too is added up in fp32
            assert run.engine.optimizer.gradient_accumulation_dtype == torch.float32
        run.watch.finish(train_with_tracking(run, "", StopSignal()))
    return first, positions, pixels


@contextlib.contextmanager
def counting_a_step(counter: HostWaits) -> Iterator[None]:
    """Count the operations and the host's waits in one step of the training loop, without those of loading."""

    def take_and_count(run: Run, batches: Batches, *arguments: Any) -> Any:
        if run.state.step != COUNTED_STEP:
            return take_step(run, batches, *arguments)
        micro_batches = [*batches.next_step(run.state.step)]
        loaded = SimpleNamespace(next_step=lambda step: micro_batches)
        with counter:
            return take_step(run, cast(Batches, loaded), *arguments)

    with mock.patch("pretrain.train.take_step", take_and_count):
        yield


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics that are the same whenever a run is repeated: all but those of speed."""
    return [
        {name: value for name, value in row.items() if name not in SPEEDS}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]


def load(recipe: Path, *overrides: str) -> PretrainConfig:
    """Read the tiny recipe, with overrides that all runs share before those of one run."""
    shared = ["tracking.uri=off", f"ema.decay={EMA_DECAY}", "data.num_workers=0"]
    return load_config(PretrainConfig, recipe, [*shared, *overrides]).config


def train_and_resume(recipe: Path, folder: Path, setting: Setting, *, in_mlflow: bool) -> dict[str, Any]:
    """Train to the end; then, if the setting asks for it, again from the checkpoint in the middle."""
    whole_dir, resumed_dir = folder / "whole", folder / "resumed"
    settings = [*setting.overrides, f"data.num_workers={setting.num_workers}"]
    settings += [f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"] if in_mlflow else []
    counter = HostWaits()
    with counting_a_step(counter):
        _, positions, image_sizes = run_to_end(load(recipe, *settings, f"run_dir={whole_dir}"))
    weights, averages = both_kinds(whole_dir) if distributed.is_main() else ({}, {})
    seen = {
        "rows": rows_of(whole_dir),
        "num_distinct_samples": len(set(positions)),
        "image_sizes": image_sizes,
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "operations": counter.num_operations,
        "waits": counter.waits,
        "weights": {name: digest(weight) for name, weight in weights.items()},
        "averages": {name: digest(average) for name, average in averages.items()},
    }
    if not setting.is_resumed:
        return seen
    if distributed.is_main():
        shutil.copytree(whole_dir / "checkpoints" / MIDDLE, resumed_dir / "checkpoints" / MIDDLE)
        shutil.copy(whole_dir / "metrics.jsonl", resumed_dir / "metrics.jsonl")
    distributed.barrier()
    first, repeated, _ = run_to_end(load(recipe, *settings, f"run_dir={resumed_dir}"))
    if not distributed.is_main():
        return {}
    pairs = zip((weights, averages), both_kinds(resumed_dir), strict=True)
    return seen | {
        "resumed": rows_of(resumed_dir),
        "resumed_at": first,
        "same_samples": bool(repeated) and repeated == positions[len(positions) // 2 :],
        "same_weights": all(torch.equal(one[key], two[key]) for one, two in pairs for key in one | two),
        "rounded": torch.equal(weights[WEIGHT], weights[WEIGHT].bfloat16().float()),
        "finite": all(bool(weight.isfinite().all()) for weight in weights.values()),
    }


def start_wrongly(recipe: Path, folder: Path) -> dict[str, Any]:
    """Start runs that must be refused; return the exit code and the output of each."""
    begun, other = folder / "begun", folder / "other"
    run_to_end(load(recipe, "schedule.total_steps=1", "schedule.warmup_steps=0", f"run_dir={begun}"))
    make_shards(keep_classes(list_digits(), ["4", "5"]), other, ShardOptions(validation_fraction=0.1, seed=0))
    starts: dict[str, tuple[list[str], bool]] = {
        "no checkpoint": ([f"run_dir={folder / 'never'}"], True),
        "another seed": ([f"run_dir={begun}", "seed=4", f"init_from={folder / 'nowhere'}"], False),
        "no weights": ([f"run_dir={folder / 'new'}", f"init_from={folder / 'nowhere'}"], False),
        "other classes": ([f"run_dir={folder / 'new'}", f"data.validation={other / 'train'}"], False),
    }
    seen = {}
    for name, (overrides, resume) in starts.items():
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            code = pretrain.train.main(CommandLine(load(recipe, *overrides), "", resume))
        seen[name] = [code, printed.getvalue()]
    return seen


def train_from_new_tars(recipe: Path, folder: Path) -> dict[str, Any]:
    """Train from copies of the tars that have no index."""
    data = load(recipe).data
    overrides = [f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}"]
    for name, source in (("train", data.train), ("validation", data.validation)):
        overrides.append(f"data.{name}={folder / name}")
        if distributed.is_main():
            (folder / name).mkdir()
            for tar in Path(str(source)).glob("*.tar"):
                shutil.copy(tar, folder / name)
    distributed.barrier()
    run_to_end(load(recipe, *SETTINGS[NEW_TARS_SETTING].overrides, *overrides))
    return {"rows": rows_of(folder / "run"), "files": [path.name for path in (folder / "train").iterdir()]}


def train_from_stream(recipe: Path, folder: Path) -> dict[str, Any]:
    """Train four steps from tars without an index, one of which is damaged; then four more from the checkpoint."""
    tars, mark, run_dir = folder / "tars", folder / "unpickled", folder / "run"
    if distributed.is_main():
        write_tars(tars, [5, 12, 7, 15, 9], mark)
        damage_header(tars / "003.tar", "0026")
        (folder / "classes.txt").write_text("even\nodd\n")
    distributed.barrier()
    stream = [f"data.train={tars}", "data.stream=true", "data.validation=null", "data.max_bad_consecutive=1000"]
    stream += [f"data.class_names={folder / 'classes.txt'}", "data.shuffle_buffer=8", "data.num_workers=2"]
    seen: dict[str, Any] = {"begins": [], "positions": []}
    for total_steps in (4, 8):
        settings = [*stream, f"schedule.total_steps={total_steps}", f"run_dir={run_dir}"]
        begin, positions, _ = run_to_end(load(recipe, *settings))
        seen["begins"].append(begin)
        seen["positions"].append(sorted(chain.from_iterable(distributed.gather(positions))))
    states = [Manifest.load(checkpoint).state for checkpoint in list_checkpoints(run_dir)]
    return seen | {
        "rows": rows_of(run_dir),
        "next_tars": [state.next_tar for state in states],
        "bad": [(Path(row["shard"]).name, row["key"]) for row in read_rows(run_dir / "quarantine.jsonl")],
        "unpickled": mark.exists(),
    }


def both_kinds(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the last checkpoint's weights and averages."""
    last = run_dir / "checkpoints" / LAST
    return load_weights(last), load_weights(last, averaged=True)


def continue_from(whole: Path, recipe: Path, folder: Path, setting: Setting) -> dict[str, Any]:
    """Continue what another world size saved, at another ZeRO stage or precision."""
    run_dir = folder / "run"
    if distributed.is_main():
        shutil.copytree(whole / "checkpoints" / MIDDLE, run_dir / "checkpoints" / MIDDLE)
    distributed.barrier()
    held: dict[str, int] = {}
    with mock.patch("pretrain.checkpoint.restore.Reader", counting(held)):
        first, *_ = run_to_end(load(recipe, *(setting.continued_with or []), f"run_dir={run_dir}"))
    assert first == 4
    if not distributed.is_main():
        return {}
    weights, averages = both_kinds(run_dir)
    return {
        "rows": rows_of(run_dir),
        "averages": {name: digest(average) for name, average in averages.items()},
        "shares": {kind: n / sum(weight.numel() for weight in weights.values()) for kind, n in held.items()},
    }


def counting(held: dict[str, int]) -> type[Reader]:
    """Return a reader that adds to `held` how many numbers of each kind this rank reads."""

    class CountingReader(Reader):
        def read_into(self, out: torch.Tensor, name: str, start: int, kind: str = "weight") -> None:
            held[kind] = held.get(kind, 0) + out.numel()
            super().read_into(out, name, start, kind)

    return CountingReader


def digest(weight: torch.Tensor) -> list[float]:
    """Return three numbers that change when the values of a tensor, or their order, change."""
    flat = weight.double().flatten()
    return [float(flat.sum()), float(flat.norm()), float(flat @ torch.linspace(-1, 1, len(flat), dtype=torch.float64))]


def stop_in_evaluation(recipe: Path, folder: Path) -> dict[str, Any]:
    """Ask the last rank to stop, in the second batch of the evaluation after step 3."""
    stop, evaluated = StopSignal(), 0

    def ask(batch: Batch, device: torch.device) -> Batch:
        nonlocal evaluated
        evaluated += 1
        stop.is_requested = evaluated >= 2 and distributed.rank() == distributed.world_size() - 1
        return to_device(batch, device)

    config = load(recipe, "evaluation.every_steps=3", f"run_dir={folder / 'run'}")
    with open_run(config) as run, mock.patch("pretrain.evaluation.to_device", ask):
        outcome = train_with_tracking(run, "", stop)
    return {"outcome": outcome.name, "evaluated": evaluated, "rows": rows_of(config.run_dir)}


def evaluate_after_the_end(whole: Path, recipe: Path, folder: Path, setting: Setting) -> list[dict[str, Any]]:
    """Continue a run that was killed between its last save and its last evaluation; return the rows that come."""
    run_dir = folder / "run"
    if distributed.is_main():
        shutil.copytree(whole / "checkpoints" / LAST, run_dir / "checkpoints" / LAST)
    distributed.barrier()
    run_to_end(load(recipe, *setting.overrides, f"run_dir={run_dir}"))
    return rows_of(run_dir)


def fail_in_save(recipe: Path, folder: Path) -> dict[str, Any]:
    """Let the last rank's disk refuse the save at step 4 until it gives up; return what is left at the end."""
    config = load(recipe, f"run_dir={folder / 'run'}")

    def write_or_refuse(path: Path, *arguments: Any) -> SavedFile:
        if MIDDLE in str(path) and distributed.rank() == distributed.world_size() - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_file(path, *arguments)

    seen_after: dict[int, list[str]] = {}

    def note(batch: Batch, device: torch.device) -> Batch:
        seen_after[run.state.step] = sorted(path.name for path in (config.run_dir / "checkpoints").glob("*"))
        time.sleep(0.3 if run.state.step in (4, 5) else 0)  # the failure has time to be known
        return to_device(batch, device)

    with (
        open_run(config) as run,
        mock.patch("pretrain.checkpoint.save.write_file", write_or_refuse),
        mock.patch("pretrain.checkpoint.save.RETRY_DELAYS", (0.01,)),
        mock.patch("pretrain.steps.to_device", note),
    ):
        outcome = train_with_tracking(run, "", StopSignal())
    newest, faults = newest_intact(config.run_dir)
    return {
        "outcome": outcome.name,
        "steps": [row["step"] for row in rows_of(config.run_dir) if "train/loss" in row],
        "seen": seen_after,
        "checkpoints": [path.name for path in list_checkpoints(config.run_dir)],
        "newest": newest.name if newest else None,
        "faults": faults,
        "error_of_the_last_save": fail_in_last_save(recipe, folder),
    }


def fail_in_last_save(recipe: Path, folder: Path) -> str:
    """Let the disk of every rank refuse the only save of a run of two steps; return the error that ends the run."""
    config = load(recipe, f"run_dir={folder / 'unsaved'}", "schedule.total_steps=2", "schedule.warmup_steps=1")

    def refuse(path: Path, *_: Any) -> SavedFile:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with (
        mock.patch("pretrain.checkpoint.save.write_file", refuse),
        mock.patch("pretrain.checkpoint.save.RETRY_DELAYS", (0.01,)),
        open_run(config) as run,
    ):
        try:
            train_with_tracking(run, "", StopSignal())
        except MachineError as error:
            return str(error)
    return ""


def die_in_save(recipe: Path, folder: Path) -> dict[str, Any]:
    """Let the last rank die in the second save, before its part is written; the others are ended."""

    def write_or_die(path: Path, *arguments: Any) -> SavedFile:
        if LAST in str(path) and distributed.rank() == distributed.world_size() - 1:
            os._exit(9)
        return write_file(path, *arguments)

    with mock.patch("pretrain.checkpoint.save.write_file", write_or_die):
        run_to_end(load(recipe, "data.num_workers=1", f"run_dir={folder / 'run'}"))
    raise AssertionError("the last rank has survived")


def try_recipe(path: Path, folder: Path, recipe: Path) -> list[float]:
    """Take three steps by a published recipe at a thousandth of its scale; return the losses."""
    data = load(recipe).data
    settings = [
        f"run_dir={folder / 'run'}",
        f"data.train={data.train}",
        f"data.validation={data.validation}",
        "data.num_workers=0",
        "model.hidden_size=24",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.image_size=64",
        "schedule.total_steps=3",
        "schedule.warmup_steps=1",
        "schedule.epochs=0",
        "schedule.warmup_epochs=0",
        "engine.global_batch_size=12",
        "engine.micro_batch_size=4",
        "engine.compile=false",
        "logging.every_steps=1",
        "tracking.uri=off",
    ]
    if path.stem.startswith("dinov2"):
        settings += ["objective.num_prototypes=64", "objective.head_hidden_size=24", "objective.local_image_size=32"]
    if "mae" in path.stem:
        settings += ["objective.decoder_hidden_size=16", "objective.decoder_num_hidden_layers=1"]
        settings += ["objective.decoder_num_attention_heads=2", "objective.decoder_intermediate_size=32"]
    config = load_config(PretrainConfig, path, settings).config
    run_to_end(config)
    return [row["train/loss"] for row in rows_of(config.run_dir) if "train/loss" in row]


def average_as_documented(average: torch.Tensor, weight: torch.Tensor, updates: torch.Tensor | int) -> torch.Tensor:
    """Return the next average, as the documentation of `ema.decay` has it."""
    decay = min(EMA_DECAY, (1 + int(updates)) / (10 + int(updates)))
    return decay * average + (1 - decay) * weight


def split_by_layer(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], decay: float, depth: int
) -> None:
    """Give each parameter a group of its own, with a share of the learning rate that depends on its layer."""
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            section, place, number = (names[parameter] + "...").split(".")[:3]
            above = depth - int(number) if place == "layers" else 0 if place == "norm" else depth + 1
            groups.append({**group, "params": [parameter], "share": decay**above if section == "encoder" else 1.0})
    optimizer.param_groups[:] = groups


def train_without_deepspeed(recipe: Path, overrides: list[str], steps: int | None = None) -> dict[str, Any]:
    """Train in a plain torch loop over the same samples, without DeepSpeed and micro-batches.

    Returns:
        Its losses, and digests of its last weights and averages.
    """
    config = load(recipe, *overrides)
    training = open_dataset(config.data.train)
    torch.manual_seed(config.seed)
    encoder = ViT(config.model)
    objective = build_objective(config.objective, encoder, training.class_shares, config.preprocessing).train()
    averaged = AveragedModel(objective, avg_fn=average_as_documented)
    optimizer = build_optimizer(objective, config.optimizer)
    if config.optimizer.layer_decay < 1:
        names = {parameter: name for name, parameter in objective.named_parameters()}
        split_by_layer(optimizer, names, config.optimizer.layer_decay, config.model.num_hidden_layers)
    schedule, batch_size = config.schedule, config.engine.global_batch_size
    losses = []
    batches = training_batches(
        training,
        objective.train_view(config.model.image_size),
        BatchPlan(seed=config.seed, shuffle_window=config.data.shuffle_window, global_batch_size=batch_size),
        start=0,
        stop=(schedule.total_steps if steps is None else steps) * batch_size,
    )
    for step, loaded in enumerate(batches):
        rate = learning_rate_at(
            step,
            peak=config.optimizer.peak_learning_rate(batch_size),
            final=schedule.final_learning_rate,
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.total_steps,
            name=schedule.name,
            cooldown_steps=schedule.cooldown_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        loss = objective(to_device(loaded.tensors, torch.device("cpu")))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.engine.gradient_clipping or math.inf)
        optimizer.step()
        losses.append(float(loss))
        averaged.update_parameters(objective)
    tensors = {"weights": objective.state_dict(), "averages": averaged.module.state_dict()}
    return {"losses": losses, **{kind: {name: digest(w) for name, w in each.items()} for kind, each in tensors.items()}}


if __name__ == "__main__":
    main(run, __doc__, all_runs(), needs)
