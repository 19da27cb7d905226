"""The pretraining loop. Accumulation, every host synchronisation and every save are visible here; ZeRO is not."""

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
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
from pretrain.checkpoint.warm_start import warm_start
from pretrain.config import PretrainConfig
from pretrain.configfile import CommandLine, exit_with_mistake, flatten
from pretrain.data.device_decode import Decoder, build_decoder, unpack
from pretrain.data.index import DataError
from pretrain.data.loader import Batch, Fault, Loaded, evaluation_batches, training_batches
from pretrain.data.meters import Meter, metrics, verdict
from pretrain.data.order import random_bits
from pretrain.data.quarantine import QUARANTINE_FILE, Quarantine
from pretrain.data.samples import BadSampleError, Samples
from pretrain.data.sets import open_cache, open_samples
from pretrain.distributed import on_all_ranks
from pretrain.engine import Engine, build_engine, gradient_norm, guard, set_learning_rate, start_distributed
from pretrain.health import SKIPPED_FILE, Health, Ledger, Verdict
from pretrain.model.vit import ViT, compile_blocks
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective
from pretrain.schedules import learning_rate_at
from pretrain.tracking.progress import ProgressLine
from pretrain.tracking.tracker import Tracker, git_commit
from pretrain.watch import Watch, beats_folder

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
    health: Health
    quarantine: Quarantine
    skipped: Ledger
    decoder: Decoder | None
    rollbacks: int = 0

    def advance(self) -> None:
        """Count one optimizer step."""
        manifest = self.manifest
        samples = manifest.samples + self.config.engine.global_batch_size
        self.manifest = replace(manifest, step=manifest.step + 1, samples=past(samples, manifest.passed))

    def judge(self, grad_norm: Tensor) -> Tensor:
        """Return 1 where the step at hand must move nothing."""
        return self.health.judge(grad_norm)

    def moment(self, mlflow_run_id: str | None) -> Manifest:
        """Return the manifest of a checkpoint that is taken now."""
        return replace(self.manifest, usual=self.health.state(), mlflow_run_id=mlflow_run_id)


class Outcome(Enum):
    """How a stretch of training ended."""

    DONE = "FINISHED"  # as MLflow calls it
    STOPPED = "KILLED"
    DIVERGED = "RUNNING"  # it goes back and tries again


class DivergedError(Exception):
    """A run that cannot go on: its steps are not fit to be taken, and going back did not help."""


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
        while (outcome := tracked(run, command.text, stop)) is Outcome.DIVERGED:
            go_back(run)
    except DataError as error:  # met by one rank or its workers: whoever meets it says so
        print(str(error).rpartition("DataError: ")[2].strip(), file=sys.stderr, flush=True)
        return EXIT_MISTAKE
    except (DivergedError, CheckpointError) as error:
        if distributed.is_main():
            print(error, file=sys.stderr, flush=True)
        return EXIT_FAILED
    return EXIT_DONE if outcome is Outcome.DONE else EXIT_RESUMABLE


def tracked(run: Run, config_text: str, stop: "StopSignal") -> Outcome:
    """Train, with MLflow told how it ended."""
    with open_tracker(run, config_text) as tracker, open_watch(run) as watch:
        outcome = train(run, tracker, stop, watch)
        tracker.status = outcome.value
    if outcome is Outcome.STOPPED and distributed.is_main():
        print("stopped as asked; the same command continues from here", flush=True)
    return outcome


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
    """Make the run's folder, on the main rank, and clear what saves that never ended and earlier ranks have left."""
    if distributed.is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        for remains in (*list_remains(run_dir), beats_folder(run_dir)):
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
    if config.init_from and not checkpoint:
        said = warm_start(objective, config.init_from, data.training.class_names, config.model.layer_norm_eps)
        if distributed.is_main():
            print(said, flush=True)
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
        manifest = replace(manifest, step=saved.step, samples=saved.samples, usual=saved.usual, passed=saved.passed)
    main = distributed.is_main()
    run = Run(
        config,
        objective,
        engine,
        data,
        manifest,
        health=Health(config.health, engine.device, manifest.usual),
        quarantine=Quarantine(config.run_dir / QUARANTINE_FILE, config.data, manifest.samples, writes=main),
        skipped=Ledger(config.run_dir / SKIPPED_FILE, manifest.step, writes=main),
        decoder=build_decoder(engine.device) if config.data.decode == "gpu" else None,
    )
    guard(engine, run.judge)
    return run


def go_back(run: Run) -> None:
    """Return to the newest checkpoint; the samples of the steps that were skipped in a row will be passed over.

    Raises:
        DivergedError: there is none, or the run has gone back often enough.
    """
    config, bad = run.config, run.skipped.in_a_row
    said = f"step {bad[-1].step}: {len(bad)} steps in a row could not be taken, {bad[-1].reason}"
    advice = f"their samples are in {run.skipped.path}; look at them, or lower optimizer.learning_rate"
    if run.rollbacks >= config.health.max_rollbacks:
        raise DivergedError(f"{said}, after health.max_rollbacks={run.rollbacks}; {advice}")
    checkpoint, _ = newest_whole(config.run_dir)
    if checkpoint is None:
        raise DivergedError(f"{said}, and there is no checkpoint to go back to; {advice}")
    saved = restore(run.engine, checkpoint, run.manifest)
    passed = [bad[0].first_sample, bad[-1].first_sample + config.engine.global_batch_size]
    run.manifest = replace(run.manifest, step=saved.step, samples=saved.samples, passed=[*run.manifest.passed, passed])
    run.health = Health(config.health, run.engine.device, saved.usual)
    run.rollbacks += 1
    run.skipped.in_a_row.clear()
    if distributed.is_main():
        print(f"{said}; back to step {saved.step}, past samples {passed[0]} to {passed[1] - 1}", flush=True)


def train(run: Run, tracker: Tracker, stop: "StopSignal", watch: Watch) -> Outcome:
    """Train until the last step, or until someone asks to stop, or too many steps in a row were skipped."""
    config, engine, total_steps = run.config, run.engine, run.config.schedule.total_steps
    progress = ProgressLine(total_steps, run.manifest.step, enabled=distributed.is_main())
    progress.note(f"{_millions(run.objective)} parameters, {_summary(run)}")
    batches = Batches(run, watch)
    saver = Saver(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_every, progress.say)
    interval = Interval(engine.device, batches.per_step)
    outcome, owed = Outcome.DONE, False
    engine.train()
    while run.manifest.step < total_steps:
        step, samples = run.manifest.step, run.manifest.samples
        learning_rate = prepare_step(run)
        for batch, weight, is_last in batches.next_step():
            losses = engine(batch)
            watch.enter("backward")
            engine.backward(losses["loss"] * weight)
            interval.add(losses, weight)
            if is_last:
                run.health.meet(interval.step_loss(), samples, stop=stop.asked)
            watch.enter("step")
            engine.step()  # after the last micro-batch: the weights move, unless `health` objects
        run.objective.after_step(step)
        judged = run.health.close(gradient_norm(engine), step, samples)
        interval.end_step(run.health.bad, gradient_norm(engine))
        run.advance()
        step = run.manifest.step

        last = step == total_steps
        stopping = batches.note(judged) and not last
        owed = owed or step % config.checkpoint.every_steps == 0
        due_save = stopping or last or (owed and not run.skipped.in_a_row)  # nothing to go back to while steps fail
        due_evaluation = last or (config.evaluation.every_steps and step % config.evaluation.every_steps == 0)
        if due_save or due_evaluation or step % config.logging.every_steps == 0:
            watch.enter("report")
            report(run, interval.close(run, batches) | {"optim/learning_rate": learning_rate}, tracker, progress)
            if due_evaluation:
                watch.enter("evaluate")
                evaluate(run, tracker, progress)
            interval = Interval(engine.device, batches.per_step)
        diverged = len(run.skipped.in_a_row) >= config.health.max_skipped_in_a_row
        if due_save and not diverged:
            watch.enter("save")
            saver.begin(engine, run.moment(tracker.mlflow_run_id()))
            owed = False
        if diverged or stopping:
            outcome = Outcome.DIVERGED if diverged else Outcome.STOPPED
            break
    batches.close()
    watch.enter("save")
    if not saver.finish() and outcome is not Outcome.DIVERGED:
        raise CheckpointError(f"{config.run_dir}: the last checkpoint could not be written; see above")
    return outcome


def prepare_step(run: Run) -> float:
    """Set and return the learning rate, and make the step's dropout a function of the step and the rank."""
    config, step = run.config, run.manifest.step
    learning_rate = learning_rate_at(
        step,
        peak=config.optimizer.learning_rate,
        final=config.schedule.final_learning_rate,
        warmup_steps=config.schedule.warmup_steps,
        total_steps=config.schedule.total_steps,
    )
    set_learning_rate(run.engine, learning_rate)
    torch.manual_seed(int(random_bits(config.seed, step, distributed.rank()).random_raw() >> 1))
    return learning_rate


def report(run: Run, row: dict[str, float], tracker: Tracker, progress: ProgressLine) -> None:
    """Write a row of metrics, show it, and hold the data to its budget."""
    tracker.log(row, run.manifest.step)
    progress.show(row, run.manifest.step)
    progress.judge(verdict(row, run.config.data.num_workers))
    run.quarantine.check(run.manifest.samples)


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

    def __init__(self, run: Run, watch: Watch) -> None:
        engine = run.config.engine
        self.run = run
        self.watch = watch
        self.device = run.engine.device
        self.order = run.data.training.order(run.config.seed, run.config.data.shuffle_window)
        self.decoder = run.decoder
        self.image_size = run.config.model.image_size
        self.meter = Meter()
        self.faults: list[Fault] = []
        self.per_step = engine.accumulation_steps(distributed.world_size())
        self.samples = run.data.training
        self._stretch: Generator[Loaded, None, None] | None = None
        self.global_batch_size = engine.global_batch_size
        left = (run.config.schedule.total_steps - run.manifest.step) * engine.global_batch_size
        self.loading = chain.from_iterable(
            self._load(run, start, stop) for start, stop in stretches(run.manifest.samples, left, run.manifest.passed)
        )

    def _load(self, run: Run, start: int, stop: int) -> Generator[Loaded, None, None]:
        """Load the positions from `start` to before `stop`."""
        engine = run.config.engine
        self._stretch = training_batches(
            run.data.training,
            run.objective.train_view(),
            seed=run.config.seed,
            window=run.config.data.shuffle_window,
            start=start,
            stop=stop,
            global_batch_size=engine.global_batch_size,
            accumulation_steps=self.per_step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=run.config.data.num_workers,
            num_threads=run.config.data.num_threads,
            decode_here=self.decoder is None,
            together=run.objective.together,
        )
        return self._stretch

    def close(self) -> None:
        """End the workers, and hear of the last step, unless what was skipped before it decides what comes next."""
        if self._stretch is not None:
            self._stretch.close()
        if len(self.run.skipped.in_a_row) < self.run.config.health.max_skipped_in_a_row:
            self.note(self.run.health.flush())

    def note(self, judged: Verdict | None) -> bool:
        """Write a skipped step into the ledger; return whether some rank was asked to stop."""
        if judged is None:
            return False
        self.run.skipped.note(judged, self._names(judged.first_sample))
        return judged.stop

    def _names(self, first: int) -> Iterator[tuple[str, str]]:
        """Yield the shard and the key of each sample of a step."""
        for position in range(first, first + self.global_batch_size):
            _, shard, row = self.order.locate(position)
            with contextlib.suppress(BadSampleError):
                encoded = self.samples.fetch(shard, row)
                yield encoded.shard, encoded.key

    def next_step(self) -> Iterator[tuple[Batch, float, bool]]:
        """Yield the micro-batches of one optimizer step, each with its weight, and whether it is the last of them."""
        for number in range(self.per_step):
            self.watch.enter("data", self.run.manifest.step)
            asked_at = time.monotonic()
            loaded: Loaded = next(self.loading)
            self.meter.note(loaded, asked_at, time.monotonic())
            self.faults += loaded.faults
            batch = self._on_device(loaded.tensors)
            self.watch.enter("forward")
            yield batch, loaded.weight, number == self.per_step - 1

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
    """What happened between two rows of metrics, steps that were skipped left out; it stays on the device till then."""

    device: torch.device
    per_step: int  # micro-batches
    started: float = field(default_factory=time.perf_counter)
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    _step: dict[str, Tensor] = field(default_factory=dict)

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Count one micro-batch."""
        for name, value in losses.items():
            self._step[name] = self._step.get(name, 0.0) + value.detach().double() * weight / self.per_step

    def step_loss(self) -> Tensor:
        """Return this rank's mean loss of the step so far."""
        return self._step["loss"]

    def end_step(self, bad: Tensor, grad_norm: Tensor) -> None:
        """Take the step into account, unless it was bad."""
        norm = grad_norm.to(self.device).double()
        for name, value in {**self._step, "grad_norm": norm, "good": torch.ones_like(norm)}.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(bad > 0, 0.0, value)
        self._step = {}
        self.steps += 1

    def close(self, run: Run, batches: Batches) -> dict[str, float]:
        """Meet all ranks and return the row."""
        config, world_size = run.config, distributed.world_size()
        own = torch.tensor([float(len(batches.faults)), *batches.meter.take()], dtype=torch.float64, device=self.device)
        totals = distributed.sum_over_ranks(torch.cat([torch.stack([*self.sums.values()]), own])).tolist()
        sums, (faults, *work) = dict(zip(self.sums, totals, strict=False)), totals[len(self.sums) :]
        if faults:
            run.quarantine.add(chain.from_iterable(distributed.gather(batches.take_faults())))
        seconds = time.perf_counter() - self.started
        good = sums.pop("good")
        means = {name: total / good for name, total in sums.items()} if good else {}
        row = {f"train/{name}": mean for name, mean in means.items() if name != "grad_norm"}
        row |= {"optim/grad_norm": means["grad_norm"]} if good else {}
        row |= {
            "health/skipped_steps": run.skipped.total,
            "speed/images_per_second": self.steps * config.engine.global_batch_size / seconds,
            "data/samples": run.manifest.samples,
            "data/bad_samples": len(run.quarantine),
            **batches.epochs(run.manifest.samples),
            **metrics(work, seconds, world_size, max(config.data.num_workers, 1) * config.data.num_threads),
        }
        return row


def past(samples: int, passed: list[list[int]]) -> int:
    """Return the first position from `samples` on that is not passed over."""
    for start, stop in sorted(passed):
        if start <= samples < stop:
            samples = stop
    return samples


def stretches(start: int, count: int, passed: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of what `count` positions from `start` on are made of, without those that are passed over."""
    while count:
        start = past(start, passed)
        stop = min([start + count, *(first for first, _ in passed if first > start)])
        yield start, stop
        count -= stop - start
        start = stop


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


def open_watch(run: Run) -> Watch:
    """Start watching, on every rank."""
    return Watch(
        run.config.run_dir,
        distributed.rank(),
        distributed.world_size(),
        hang_seconds=run.config.health.hang_seconds,
        device=run.engine.device,
    )


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
