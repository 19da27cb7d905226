"""The pretraining loop. Accumulation, every host synchronisation and every save are visible here; ZeRO is not."""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from pretrain import EXIT_MISTAKE, EXIT_RESUMABLE, UserError, distributed
from pretrain.checkpoint.history import list_remains
from pretrain.checkpoint.manifest import CheckpointError, Manifest
from pretrain.checkpoint.restore import newest_whole, restore
from pretrain.checkpoint.save import Saver
from pretrain.config import PretrainConfig
from pretrain.configfile import CommandLine, exit_with_mistake, flatten
from pretrain.data.device_decode import Decoder, build_decoder, unpack
from pretrain.data.index import DataError
from pretrain.data.loader import Batch, Fault, Loaded, evaluation_batches, training_batches
from pretrain.data.meters import Meter, metrics, verdict
from pretrain.data.order import random_bits
from pretrain.data.quarantine import QUARANTINE_FILE, Quarantine
from pretrain.data.samples import Samples
from pretrain.data.sets import open_cache, open_samples
from pretrain.distributed import on_all_ranks
from pretrain.engine import Engine, build_engine, gradient_norm, set_learning_rate, start_distributed
from pretrain.model.vit import ViT, compile_blocks
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective
from pretrain.schedules import learning_rate_at
from pretrain.tracking.progress import ProgressLine
from pretrain.tracking.tracker import Tracker, git_commit

EXIT_DONE, EXIT_FAILED = 0, 1


@dataclass(frozen=True)
class Data:
    """What a run starts from."""

    training: Samples
    validation: Samples | None


@dataclass
class Run:
    """Everything the loop holds. `manifest` says where it stands: the whole state beside the engine's own."""

    config: PretrainConfig
    objective: Objective
    engine: Engine
    data: Data
    manifest: Manifest
    quarantine: Quarantine
    decoder: Decoder | None

    def advance(self) -> None:
        """Count one optimizer step."""
        manifest = self.manifest
        samples = manifest.samples + self.config.engine.global_batch_size
        self.manifest = replace(manifest, step=manifest.step + 1, samples=samples)


def main(command: CommandLine[PretrainConfig]) -> int:
    """Pretrain as the command line asks; return the exit code."""
    config = command.config
    start_distributed()
    try:
        run = prepare(config, insist_on_resume=command.resume)
    except UserError as error:
        exit_with_mistake(str(error))
    stop = StopSignal()
    try:
        with open_tracker(run, command.text) as tracker:
            finished = train(run, tracker, stop)
            tracker.status = "FINISHED" if finished else "KILLED"
    except DataError as error:  # met by one rank or its workers: whoever meets it says so
        print(str(error).rpartition("DataError: ")[2].strip(), file=sys.stderr, flush=True)
        return EXIT_MISTAKE
    except FloatingPointError as error:
        if distributed.is_main():
            print(error, file=sys.stderr, flush=True)
        return EXIT_FAILED
    return EXIT_DONE if finished else EXIT_RESUMABLE


def prepare(config: PretrainConfig, *, insist_on_resume: bool = False) -> Run:
    """Open the data, build the model under its engine, and continue from the newest checkpoint that is whole.

    Raises:
        UserError: on every rank, whatever was wrong on any.
    """
    on_all_ranks(lambda: make_run_dir(config.run_dir))
    data = on_all_ranks(lambda: open_data(config))
    checkpoint, faults = newest_whole(config.run_dir)
    if distributed.is_main():
        for fault in faults:
            print(f"{fault}; set aside, an older checkpoint is taken", file=sys.stderr, flush=True)
    if insist_on_resume and not checkpoint:
        raise CheckpointError(f"{config.run_dir}: nothing to resume, the run has no checkpoint")
    return on_all_ranks(lambda: build_run(config, data, checkpoint))


def make_run_dir(run_dir: Path) -> None:
    """Make the run's folder, on the main rank, and clear what saves that never ended have left."""
    if distributed.is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        for remains in list_remains(run_dir):
            shutil.rmtree(remains, ignore_errors=True)


def open_data(config: PretrainConfig) -> Data:
    """Open the shard sets.

    Raises:
        DataError: a set cannot be used, or the two sets' classes differ.
        CheckpointError: this rank does not see the run folder.
    """
    if not config.run_dir.exists():
        raise CheckpointError(
            f"{config.run_dir}: not seen by rank {distributed.rank()}; "
            "put run_dir on a file system that all machines share"
        )
    cache = open_cache(config.data)
    training = open_samples(config.data.train, config.data.weights, cache)
    training.check_room(config.data.shuffle_window)
    validation = open_samples(config.data.validation, cache=cache) if config.data.validation else None
    if validation and validation.class_names != training.class_names:
        raise DataError(f"{config.data.validation}: its classes differ from those of the training data")
    if config.objective.needs_labels and not training.class_names:
        raise DataError(f"{config.data.train}: has no labels, objective.name={config.objective.name} needs them")
    return Data(training, validation)


def build_run(config: PretrainConfig, data: Data, checkpoint: Path | None) -> Run:
    """Build the model under its engine, and continue from the checkpoint if there is one."""
    torch.manual_seed(config.seed)
    encoder = ViT(config.model, config.engine.activation_checkpointing)
    objective = build_objective(config.objective, encoder, len(data.training.class_names), config.preprocessing)
    if config.engine.compile:
        compile_blocks(objective)
    manifest = Manifest(
        step=0,
        samples=0,
        world_size=distributed.world_size(),
        data_digest=data.training.digest,
        class_names=data.training.class_names,
        config=json.loads(config.model_dump_json()),
        git_commit=git_commit(),
    )
    engine = build_engine(objective, config.engine, config.optimizer)
    if checkpoint:
        saved = restore(engine, checkpoint, manifest)
        manifest = replace(manifest, step=saved.step, samples=saved.samples)
    ledger = config.run_dir / QUARANTINE_FILE
    quarantine = Quarantine(ledger, config.data, manifest.samples, writes=distributed.is_main())
    decoder = build_decoder(engine.device) if config.data.decode == "gpu" else None
    return Run(config, objective, engine, data, manifest, quarantine, decoder)


def train(run: Run, tracker: Tracker, stop: "StopSignal") -> bool:
    """Train to the last step; return whether it was reached, or a stop was asked for first."""
    config, engine, total_steps = run.config, run.engine, run.config.schedule.total_steps
    progress = ProgressLine(total_steps, run.manifest.step, enabled=distributed.is_main())
    progress.note(f"{_millions(run.objective)} parameters, {_summary(run)}")
    batches = Batches(run)
    saver = Saver(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_every, progress.say)
    interval = Interval(engine.device)
    said = None
    engine.train()
    while run.manifest.step < total_steps:
        step = run.manifest.step
        learning_rate = learning_rate_at(
            step,
            peak=config.optimizer.learning_rate,
            final=config.schedule.final_learning_rate,
            warmup_steps=config.schedule.warmup_steps,
            total_steps=total_steps,
        )
        set_learning_rate(engine, learning_rate)
        torch.manual_seed(int(random_bits(config.seed, step, distributed.rank()).random_raw() >> 1))  # for dropout
        for batch, weight in batches.next_step():
            losses = engine(batch)
            engine.backward(losses["loss"] * weight)
            engine.step()
            interval.add(losses, weight)
        run.objective.after_step(step)
        run.advance()
        step = run.manifest.step

        last = step == total_steps
        due_save = last or step % config.checkpoint.every_steps == 0
        due_evaluation = last or (config.evaluation.every_steps and step % config.evaluation.every_steps == 0)
        if due_save or due_evaluation or step % config.logging.every_steps == 0:
            row, stopping = interval.close(run, batches, stop)  # the only host synchronisation
            row["optim/learning_rate"] = learning_rate
            tracker.log(row, step)
            progress.show(row, step)
            if (bound := verdict(row, config.data.num_workers)) != said:
                said = bound
                progress.note(said or "no longer input-bound")
            run.quarantine.check(run.manifest.samples)
            if not math.isfinite(row["train/loss"] + row["optim/grad_norm"]):
                raise FloatingPointError(
                    f"step {step}: the loss is {row['train/loss']}, its gradient's norm {row['optim/grad_norm']}; "
                    f"stopped without saving, the same command continues from the last checkpoint"
                )
            if due_evaluation:
                evaluate(run, tracker, progress)
            if due_save or stopping:
                saver.begin(engine, replace(run.manifest, mlflow_run_id=tracker.mlflow_run_id()))
            if (stopping or last) and not saver.finish():
                raise CheckpointError(f"{config.run_dir}: the last checkpoint could not be written; see above")
            if stopping and not last:
                progress.note("stopped as asked; the same command continues from here")
                return False
            interval = Interval(engine.device)
    return True


def evaluate(run: Run, tracker: Tracker, progress: ProgressLine) -> None:
    """Go through the validation set, every sample once over all ranks."""
    if run.data.validation is None:
        return
    run.engine.eval()
    batches = evaluation_batches(
        run.data.validation,
        run.objective.evaluation_view(),
        batch_size=run.config.engine.micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=run.config.data.num_workers,
    )
    sums: dict[str, Tensor] = {}
    faults: list[Fault] = []
    with torch.no_grad():
        for loaded in batches:
            faults += loaded.faults
            batch = to_device(loaded.tensors, run.engine.device)
            for name, value in (run.engine(batch) | {"count": batch["weight"].sum()}).items():
                sums[name] = sums.get(name, 0.0) + value.double()
    run.engine.train()
    run.quarantine.add(chain.from_iterable(distributed.gather(faults)))
    totals = distributed.sum_over_ranks(torch.stack([*sums.values()])).tolist()
    if not totals[-1]:
        raise DataError(f"{run.config.data.validation}: no sample can be used; {run.quarantine.path} says why")
    means = {name: total / totals[-1] for name, total in zip(sums, totals, strict=True)}
    row = {f"validation/{name}": mean for name, mean in means.items() if name != "count"}
    tracker.log(row, run.manifest.step)
    progress.note(f"step {run.manifest.step}  " + "  ".join(f"{name} {value:.4f}" for name, value in row.items()))


class Batches:
    """This rank's micro-batches, what was unusable among them, and how long they took."""

    def __init__(self, run: Run) -> None:
        engine = run.config.engine
        self.device = run.engine.device
        self.order = run.data.training.order(run.config.seed, run.config.data.shuffle_window)
        self.decoder = run.decoder
        self.image_size = run.config.model.image_size
        self.meter = Meter()
        self.faults: list[Fault] = []
        self.per_step = engine.accumulation_steps(distributed.world_size())
        self.loading = training_batches(
            run.data.training,
            run.objective.train_view(),
            seed=run.config.seed,
            window=run.config.data.shuffle_window,
            start=run.manifest.samples,
            stop=run.config.schedule.total_steps * engine.global_batch_size,
            global_batch_size=engine.global_batch_size,
            accumulation_steps=self.per_step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=run.config.data.num_workers,
            num_threads=run.config.data.num_threads,
            decode_here=self.decoder is None,
            together=run.objective.together,
        )

    def next_step(self) -> Iterator[tuple[Batch, float]]:
        """Yield the micro-batches of one optimizer step, each with its weight."""
        for _ in range(self.per_step):
            asked_at = time.monotonic()
            loaded: Loaded = next(self.loading)
            self.meter.note(loaded, asked_at, time.monotonic())
            self.faults += loaded.faults
            yield self._on_device(loaded.tensors), loaded.weight

    def _on_device(self, batch: Batch) -> Batch:
        if self.decoder is not None:
            batch = unpack(batch, self.image_size, self.device, self.decoder)
        return to_device(batch, self.device)

    def epochs(self, position: int) -> dict[str, float]:
        """Return how often each set has been gone through before a position of the run."""
        epochs = self.order.epochs(position)
        return {f"data/epoch_{i}" if len(epochs) > 1 else "data/epoch": epoch for i, epoch in enumerate(epochs)}

    def take_faults(self) -> list[Fault]:
        """Return the faults met since the last call."""
        faults, self.faults = self.faults, []
        return faults


@dataclass
class Interval:
    """What happened between two rows of metrics; stays on the device until the row is due."""

    device: torch.device
    started: float = field(default_factory=time.perf_counter)
    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Count one micro-batch."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double() * weight
        self.count += 1

    def close(self, run: Run, batches: Batches, stop: "StopSignal") -> tuple[dict[str, float], bool]:
        """Meet all ranks: return the row, and whether any rank was asked to stop."""
        config, world_size = run.config, distributed.world_size()
        own = [float(stop.asked), float(len(batches.faults)), *batches.meter.take()]
        norm = gradient_norm(run.engine).double() / world_size
        sums = torch.stack([*(value / self.count / world_size for value in self.sums.values()), norm])
        values = torch.cat([sums, torch.tensor(own, dtype=torch.float64, device=self.device)])
        totals = distributed.sum_over_ranks(values).tolist()
        means, (norm_mean, stops, faults, *work) = totals[: len(self.sums)], totals[len(self.sums) :]
        if faults:
            run.quarantine.add(chain.from_iterable(distributed.gather(batches.take_faults())))
        seconds = time.perf_counter() - self.started
        steps = self.count // batches.per_step
        row = {f"train/{name}": mean for name, mean in zip(self.sums, means, strict=True)}
        row |= {
            "optim/grad_norm": norm_mean,
            "speed/images_per_second": steps * config.engine.global_batch_size / seconds,
            "data/samples": run.manifest.samples,
            "data/bad_samples": len(run.quarantine),
            **batches.epochs(run.manifest.samples),
            **metrics(work, seconds, world_size, max(config.data.num_workers, 1) * config.data.num_threads),
        }
        return row, stops > 0


class StopSignal:
    """Notes that someone wants the run to stop (SIGTERM, SIGUSR1, Ctrl-C); a second Ctrl-C stops at once.

    A terminal and a launcher pass the same Ctrl-C on, so what comes within a second is not a second one.
    """

    def __init__(self) -> None:
        self.asked = False
        self.asked_at = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT and time.monotonic() > self.asked_at + 1:
            raise KeyboardInterrupt
        self.asked, self.asked_at = True, time.monotonic()


def open_tracker(run: Run, config_text: str) -> Tracker:
    """Start tracking on the main rank."""
    return Tracker(
        run.config.run_dir,
        uri=run.config.tracking.uri,
        experiment=run.config.tracking.experiment,
        config_text=config_text,
        params=flatten(run.config),
        tags={"stage": "pretrain", "git_commit": str(run.manifest.git_commit), "data_digest": run.data.training.digest},
        resume_step=run.manifest.step,
        enabled=distributed.is_main(),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Start copying a batch to the device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _millions(objective: Objective) -> str:
    return f"{sum(p.numel() for p in objective.parameters()) / 1e6:.1f} M"


def _summary(run: Run) -> str:
    config, ranks = run.config.engine, distributed.world_size()
    return (
        f"{sum(run.data.training.shard_sizes)} images in {len(run.data.training.class_names)} classes, "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {run.engine.device.type}, ZeRO {config.zero_stage}, "
        f"{config.precision}, batch {config.global_batch_size}, from step {run.manifest.step}"
    )
