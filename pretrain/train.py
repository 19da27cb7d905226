"""The pretraining loop. Accumulation, every host synchronisation and every save are visible here; ZeRO is not."""

import sys

import torch

from pretrain import distributed
from pretrain.checkpoint.save import Saver
from pretrain.config import PretrainConfig
from pretrain.configfile import CommandLine, flatten
from pretrain.data.dataset.order import random_bits
from pretrain.data.loading.meters import describe_bottleneck
from pretrain.engine.deepspeed import gradient_norm, set_learning_rate, start_distributed
from pretrain.errors import DataError, DivergedError, MachineError, UserError
from pretrain.evaluation import evaluate, is_due, is_owed
from pretrain.objectives.objective import Objective
from pretrain.outcome import Outcome, outcome_of
from pretrain.run import Run, go_back, open_run
from pretrain.schedules import learning_rate_at
from pretrain.steps import Batches, Interval
from pretrain.stop_signal import StopSignal
from pretrain.tracking.progress import ProgressLine
from pretrain.tracking.tracker import RunDescription, Tracker

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
    distributed.leave_process_group()
    return outcome.exit_code


def tracked(run: Run, config_text: str, stop: StopSignal) -> Outcome:
    """Train, with MLflow told how it ended."""
    progress = ProgressLine(run.config.schedule.total_steps, run.state.step, enabled=distributed.is_main())
    progress.print_message(f"{_millions(run.objective)} parameters, {_summary(run)}")
    with open_tracker(run, config_text) as tracker:
        if is_owed(run, tracker.kept_rows):
            outcome = evaluate(run, tracker, progress, lambda: stop.is_requested)
        else:
            outcome = train(run, tracker, progress, stop)
        tracker.finish(MLFLOW_STATUS[outcome], SECONDS_AFTER_STOP if outcome is Outcome.STOPPED else None)
    if outcome is Outcome.STOPPED and distributed.is_main():
        print("stopped as asked; the same command continues from here", flush=True)
    return outcome


def train(run: Run, tracker: Tracker, progress: ProgressLine, stop: StopSignal) -> Outcome:
    """Train until the last step, or until someone asks to stop, or too many steps in a row were skipped."""
    config, engine, watch, total_steps = run.config, run.engine, run.watch, run.config.schedule.total_steps
    batches = Batches(run)
    saver = Saver(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_every, progress.print_warning)
    interval = Interval(engine.device, batches.per_step)
    outcome, owed = Outcome.DONE, False
    engine.train()
    while run.state.step < total_steps and outcome is Outcome.DONE:
        step, samples = run.state.step, run.state.position
        learning_rate = prepare_step(run)
        for batch, weight, is_last in batches.next_step():
            losses = engine(batch)
            watch.enter("backward")
            engine.backward(losses["loss"] * weight)
            interval.add(losses, weight)
            if is_last:
                run.health.meet(interval.step_loss(), samples, stop=stop.is_requested, save_failed=saver.has_failed)
            watch.enter("step")
            engine.step()  # after the last micro-batch: the weights move, unless `health` objects
        judged = run.health.close(gradient_norm(engine), step, samples)
        run.objective.after_step(run.health.bad)
        run.ema.update(step, run.health.bad)
        interval.end_step(run.health.bad, gradient_norm(engine))
        run.advance()
        step = run.state.step

        batches.note(judged)
        if judged and judged.save_failed:
            saver.abandon()
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
                saver.begin(engine, run.manifest(tracker.mlflow_run_id()))
                owed = False
            if due_evaluation:
                finished = evaluate(run, tracker, progress, lambda: stop.is_requested)
                outcome = finished if step == total_steps else outcome
            interval = Interval(engine.device, batches.per_step)
    batches.close()
    watch.enter("save")
    if not saver.finish() and outcome is not Outcome.DIVERGED:
        raise MachineError(f"{config.run_dir}: the last checkpoint could not be written; see above")
    return outcome


def prepare_step(run: Run) -> float:
    """Set and return the learning rate, and make the step's dropout a function of the step and the rank."""
    config, step = run.config, run.state.step
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
    tracker.log(row, run.state.step)
    progress.print_metrics(row, run.state.step)
    progress.print_bottleneck(describe_bottleneck(row, run.config.data.num_workers))
    run.quarantine.check(run.state.position)


def open_tracker(run: Run, config_text: str) -> Tracker:
    """Start tracking on the main rank."""
    return Tracker(
        run.config.run_dir,
        run.config.tracking,
        RunDescription("pretrain", run.identity.data_digests["training"], config_text, flatten(run.config)),
        resume_step=run.state.step,
        enabled=distributed.is_main(),
    )


def _millions(objective: Objective) -> str:
    return f"{sum(p.numel() for p in objective.parameters()) / 1e6:.1f} M"


def _summary(run: Run) -> str:
    config, ranks = run.config.engine, distributed.world_size()
    return (
        f"{sum(run.data.training.shard_sizes)} images in {len(run.data.training.class_names)} classes, "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {run.engine.device.type}, ZeRO {config.zero_stage}, "
        f"{config.precision}, batch {config.global_batch_size}, from step {run.state.step}, "
        f"{run.config.optimizer.describe_learning_rate(config.global_batch_size)}"
    )
