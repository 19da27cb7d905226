"""The pretraining loop. Accumulation, every host synchronisation and every save are visible here; ZeRO is not."""

import signal
import sys
import time
from types import FrameType

import torch

from pretrain import distributed
from pretrain.checkpoint.save import Saver
from pretrain.config import PretrainConfig
from pretrain.configfile import CommandLine, flatten
from pretrain.data.dataset.order import random_bits
from pretrain.data.loading.meters import verdict
from pretrain.engine.deepspeed import gradient_norm, set_learning_rate, start_distributed
from pretrain.errors import DataError, DivergedError, MachineError, UserError
from pretrain.evaluation import evaluate, is_due, is_owed
from pretrain.objectives.objective import Objective
from pretrain.outcome import Outcome, outcome_of
from pretrain.run import Run, go_back, open_run
from pretrain.schedules import learning_rate_at
from pretrain.steps import Batches, Interval
from pretrain.tracking.progress import ProgressLine
from pretrain.tracking.tracker import Tracker

MLFLOW_STATUS = {Outcome.DONE: "FINISHED", Outcome.STOPPED: "KILLED", Outcome.DIVERGED: "RUNNING"}
SECONDS_AFTER_STOP = 10.0  # for MLflow to catch up: a launcher waits for 30 in all


def main(command: CommandLine[PretrainConfig]) -> int:
    """Pretrain as the command line asks; return the exit code."""
    stop = StopSignal()
    start_distributed()
    try:
        with open_run(command.config, insist_on_resume=command.resume) as run:
            while (outcome := tracked(run, command.text, stop)) is Outcome.DIVERGED:
                go_back(run)
            run.watch.finish(outcome)
    except DataError as error:  # met by one rank or its workers: whoever meets it says so
        print(error.summary, file=sys.stderr, flush=True)
        return outcome_of(error).exit_code
    except (UserError, MachineError, DivergedError) as error:
        if distributed.is_main():
            print(error, file=sys.stderr, flush=True)
        return outcome_of(error).exit_code
    distributed.leave()
    return outcome.exit_code


def tracked(run: Run, config_text: str, stop: "StopSignal") -> Outcome:
    """Train, with MLflow told how it ended."""
    progress = ProgressLine(run.config.schedule.total_steps, run.manifest.step, enabled=distributed.is_main())
    progress.note(f"{_millions(run.objective)} parameters, {_summary(run)}")
    with open_tracker(run, config_text) as tracker:
        if is_owed(run, tracker.journal.kept if tracker.enabled else []):
            outcome = evaluate(run, tracker, progress, lambda: stop.asked)
        else:
            outcome = train(run, tracker, progress, stop)
        tracker.status = MLFLOW_STATUS[outcome]
        if outcome is Outcome.STOPPED:
            tracker.timeout_seconds = SECONDS_AFTER_STOP
    if outcome is Outcome.STOPPED and distributed.is_main():
        print("stopped as asked; the same command continues from here", flush=True)
    return outcome


def train(run: Run, tracker: Tracker, progress: ProgressLine, stop: "StopSignal") -> Outcome:
    """Train until the last step, or until someone asks to stop, or too many steps in a row were skipped."""
    config, engine, watch, total_steps = run.config, run.engine, run.watch, run.config.schedule.total_steps
    batches = Batches(run)
    saver = Saver(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_every, progress.say)
    interval = Interval(engine.device, batches.per_step)
    outcome, owed = Outcome.DONE, False
    engine.train()
    while run.manifest.step < total_steps and outcome is Outcome.DONE:
        step, samples = run.manifest.step, run.manifest.samples
        learning_rate = prepare_step(run)
        for batch, weight, is_last in batches.next_step():
            losses = engine(batch)
            watch.enter("backward")
            engine.backward(losses["loss"] * weight)
            interval.add(losses, weight)
            if is_last:
                run.health.meet(interval.step_loss(), samples, stop=stop.asked, save_failed=saver.has_failed)
            watch.enter("step")
            engine.step()  # after the last micro-batch: the weights move, unless `health` objects
        judged = run.health.close(gradient_norm(engine), step, samples)
        run.objective.after_step(run.health.bad)
        run.ema.update(step, run.health.bad)
        interval.end_step(run.health.bad, gradient_norm(engine))
        run.advance()
        step = run.manifest.step

        batches.note(judged)
        if judged and judged.save_failed:
            saver.give_up()
        if judged and judged.stop and step < total_steps:
            outcome = Outcome.STOPPED
        if len(run.skipped.in_a_row) >= config.health.max_consecutive_skips:
            outcome = Outcome.DIVERGED
        ends = outcome is not Outcome.DONE or step == total_steps
        owed = owed or step % config.checkpoint.every_steps == 0
        due_save = ends or (owed and not run.skipped.in_a_row)  # nothing to go back to while steps fail
        due_evaluation = is_due(run) and outcome is not Outcome.STOPPED
        if due_save or due_evaluation or step % config.logging.every_steps == 0:
            watch.enter("report")
            report(run, interval.close(run, batches) | {"optim/learning_rate": learning_rate}, tracker, progress)
            if due_save and outcome is not Outcome.DIVERGED:
                watch.enter("save")
                saver.begin(engine, run.moment(tracker.mlflow_run_id()))
                owed = False
            if due_evaluation:
                finished = evaluate(run, tracker, progress, lambda: stop.asked)
                outcome = finished if step == total_steps else outcome
            interval = Interval(engine.device, batches.per_step)
    batches.close()
    watch.enter("save")
    if not saver.finish() and outcome is not Outcome.DIVERGED:
        raise MachineError(f"{config.run_dir}: the last checkpoint could not be written; see above")
    return outcome


def prepare_step(run: Run) -> float:
    """Set and return the learning rate, and make the step's dropout a function of the step and the rank."""
    config, step = run.config, run.manifest.step
    run.objective.before_step(step / config.schedule.total_steps)
    learning_rate = learning_rate_at(
        step,
        peak=config.optimizer.peak_learning_rate(config.engine.global_batch_size),
        final=config.schedule.final_learning_rate,
        warmup_steps=config.schedule.warmup_steps,
        total_steps=config.schedule.total_steps,
        name=config.schedule.name,
        cooldown_steps=config.schedule.cooldown_steps,
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
        tags={
            "stage": "pretrain",
            "git_commit": str(run.manifest.git_commit),
            "data_digest": run.manifest.data_digests["training"],
        },
        resume_step=run.manifest.step,
        enabled=distributed.is_main(),
    )


def _millions(objective: Objective) -> str:
    return f"{sum(p.numel() for p in objective.parameters()) / 1e6:.1f} M"


def _summary(run: Run) -> str:
    config, ranks = run.config.engine, distributed.world_size()
    return (
        f"{sum(run.data.training.shard_sizes)} images in {len(run.data.training.class_names)} classes, "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {run.engine.device.type}, ZeRO {config.zero_stage}, "
        f"{config.precision}, batch {config.global_batch_size}, from step {run.manifest.step}, "
        f"{run.config.optimizer.describe_learning_rate(config.global_batch_size)}"
    )
