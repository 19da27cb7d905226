"""The pretraining loop. Gradient accumulation, every wait for the device and every save are visible here; ZeRO is not.

The loop waits for the device only when a row of metrics is due. It learns whether a step was skipped, and whether a
rank was asked to stop, while the next step is running.
"""

import traceback

import torch

from pretrain import distributed
from pretrain.checkpoint.save import Saver
from pretrain.config import PretrainConfig
from pretrain.configfile import CommandLine, flatten
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.order import dropout_seed
from pretrain.data.loading.meters import describe_bottleneck
from pretrain.data.loading.workers import start_server
from pretrain.device_errors import explain_device_errors
from pretrain.engine.deepspeed import start_distributed
from pretrain.engine.protocol import TrainingEngine
from pretrain.errors import DivergedError, MachineError, UserError
from pretrain.evaluation import Evaluator
from pretrain.health import SkippedSteps, StepResult
from pretrain.interval import Interval, interval_metrics
from pretrain.messages import describe_end, describe_long_schedule, describe_run
from pretrain.objectives.objective import Objective
from pretrain.outcome import EXIT_FAILED, Outcome, outcome_of
from pretrain.run import Run, open_run
from pretrain.schedules import learning_rate_at, set_learning_rate
from pretrain.startup import make_deterministic
from pretrain.steps import Batches
from pretrain.stop_signal import StopSignal
from pretrain.tracking.progress import ProgressLine
from pretrain.tracking.tracker import STOP_TIMEOUT_SECONDS, RunDescription, Tracker

MLFLOW_STATUS = {Outcome.DONE: "FINISHED", Outcome.STOPPED: "KILLED", Outcome.DIVERGED: "RUNNING"}


def main(command: CommandLine[PretrainConfig]) -> int:
    """Pretrain with the config of a command line; return the exit code."""
    stop = StopSignal()
    try:
        if command.config.engine.deterministic:
            make_deterministic()
        if not start_distributed(lambda: stop.is_requested):
            return Outcome.STOPPED.exit_code
        if command.config.data.num_workers:
            start_server()  # imports torch in the background while the model is built
        with explain_device_errors(), open_run(command.config, must_resume=command.resume) as run:
            while (outcome := train_with_tracking(run, command.text, stop)) is Outcome.DIVERGED:
                run.roll_back()
            run.watch.finish(outcome)
    except (UserError, MachineError, DivergedError) as error:
        distributed.print_error(error)
        return distributed.leave_after_error(outcome_of(error).exit_code)
    except Exception:  # the other ranks have to leave too, so this one must not wait for them
        traceback.print_exc()
        return distributed.leave_after_error(EXIT_FAILED)
    distributed.leave_process_group()
    return outcome.exit_code


def train_with_tracking(run: Run, config_text: str, stop: StopSignal) -> Outcome:
    """Train, or make up for a final evaluation that was interrupted, and record the outcome in MLflow.

    Args:
        run: Open run.
        config_text: Resolved config as YAML, which is saved in the run folder.
        stop: Signal handler that knows whether this rank was asked to stop.

    Returns:
        DONE, STOPPED, or DIVERGED if the run must roll back.
    """
    progress = ProgressLine(run.config.schedule.total_steps, run.state.step, enabled=distributed.is_main())
    for message in (*run.data.notes, describe_run(run), describe_long_schedule(run)):
        if message:
            progress.print_message(message)
    evaluator = Evaluator(
        run.config,
        run.data.training if isinstance(run.data.training, Dataset) else None,
        run.data.validation,
        run.objective,
        run.engine,
        run.ema,
        run.quarantine,
        run.watch,
    )
    with open_tracker(run.config, run.data.digests["training"], config_text, run.state.step) as tracker:
        if evaluator.final_is_missing(tracker.kept_rows, run.state.step):
            outcome = evaluate(evaluator, run.state.step, tracker, progress, stop)
        else:
            progress.begin_first_step(compiles=run.config.engine.compile)
            batches = Batches(run.config, run.data.training, run.objective, run.state, run.decoder, run.watch)
            outcome = train(run, batches, evaluator, tracker, progress, stop)
        if outcome is Outcome.STOPPED:
            progress.print_message("stopped as requested; the same command continues the run")
        tracker.finish(MLFLOW_STATUS[outcome], STOP_TIMEOUT_SECONDS if outcome is Outcome.STOPPED else None)
    if outcome is Outcome.DONE:
        progress.print_message(describe_end(run.config))
    return outcome


def train(
    run: Run, batches: Batches, evaluator: Evaluator, tracker: Tracker, progress: ProgressLine, stop: StopSignal
) -> Outcome:
    """Train until the last step, until a rank is asked to stop, or until too many steps in a row were skipped.

    Args:
        run: Open run.
        batches: Micro-batches of this rank, from the run's current position on.
        evaluator: Evaluator of the run.
        tracker: Tracker that logs the metrics.
        progress: Progress line that shows them.
        stop: Signal handler that knows whether this rank was asked to stop.

    Returns:
        DONE, STOPPED, or DIVERGED if the run must roll back.

    Raises:
        MachineError: If the last checkpoint could not be written.
    """
    config, engine, watch = run.config, run.engine, run.watch
    total_steps = config.schedule.total_steps
    saver = Saver(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_every, progress.print_warning)
    interval = Interval(engine.device, batches.accumulation_steps)
    outcome, save_is_due = Outcome.DONE, False
    engine.train()
    while run.state.step < total_steps and outcome is Outcome.DONE:
        learning_rate = prepare_step(config, run.objective, engine, run.state.step)
        previous = take_step(run, batches, interval, saver, stop)
        run.advance()
        step = run.state.step
        progress.end_step()

        if previous is not None:
            outcome = handle_result(run, batches, saver, previous)
        ends = outcome is not Outcome.DONE or step == total_steps
        save_is_due = save_is_due or ends or step % config.checkpoint.every_steps == 0
        # A run that skips steps needs its older checkpoint to roll back to, so it saves only at its end.
        saves = save_is_due and outcome is not Outcome.DIVERGED and (ends or not run.skipped_steps.consecutive)
        evaluates = outcome is Outcome.DONE and evaluator.is_due(step)
        if ends or saves or evaluates or config.logging.is_due(step):
            watch.enter("report")
            log_interval(run, interval, batches, learning_rate, tracker, progress)
            if saves:
                watch.enter("save")
                saver.begin(engine, run.manifest(tracker.mlflow_run_id()))
                save_is_due = False
            if evaluates:
                evaluated = evaluate(evaluator, step, tracker, progress, stop)
                outcome = evaluated if step == total_steps else outcome  # otherwise the next step stops and saves
            interval = Interval(engine.device, batches.accumulation_steps)
    batches.close()
    if outcome is not Outcome.DIVERGED and (last := run.health.flush()) is not None:
        record_result(run.skipped_steps, batches, last)
    watch.enter("save")
    if not saver.finish() and outcome is not Outcome.DIVERGED:
        raise MachineError(
            f"{config.run_dir}: the last checkpoint could not be written; free disk space and start the run again"
        )
    return outcome


def prepare_step(config: PretrainConfig, objective: Objective, engine: TrainingEngine, step: int) -> float:
    """Set the learning rate and seed the step's dropout by the run's seed, the step and the rank.

    Args:
        config: Resolved run configuration.
        objective: Model that is trained.
        engine: DeepSpeed engine around it.
        step: Number of the step, counted from 0.

    Returns:
        The learning rate.
    """
    objective.before_step(step / config.schedule.total_steps)
    learning_rate = learning_rate_at(
        step,
        peak=config.optimizer.peak_learning_rate(config.engine.global_batch_size),
        final=config.schedule.final_learning_rate,
        warmup_steps=config.schedule.warmup_steps,
        total_steps=config.schedule.total_steps,
        name=config.schedule.name,
        cooldown_steps=config.schedule.cooldown_steps,
    )
    set_learning_rate(engine.optimizer.param_groups, learning_rate)
    torch.manual_seed(dropout_seed(config.seed, step, distributed.rank()))
    return learning_rate


def take_step(run: Run, batches: Batches, interval: Interval, saver: Saver, stop: StopSignal) -> StepResult | None:
    """Take one optimizer step (collective): the forward and backward pass of each micro-batch, then the update.

    Args:
        run: Open run.
        batches: Micro-batches of the run.
        interval: Interval to which the losses and the gradient norm are added.
        saver: Saver of the run, whose failure the other ranks must learn.
        stop: Signal handler that knows whether this rank was asked to stop.

    Returns:
        The result of the step before, for which the host may wait; None if there was none.
    """
    engine, gradients, health, watch = run.engine, run.gradients, run.health, run.watch
    step, position = run.state.step, run.state.position
    for batch, weight, is_last in batches.next_step(step):
        losses = engine(batch)
        watch.enter("backward")
        engine.backward(losses["loss"] * weight)
        gradients.collect(is_last=is_last)
        interval.add(losses, weight)
        if is_last:
            loss, square = interval.step_loss(), gradients.squared_norm()
            health.judge(loss, square, position, stop_requested=stop.is_requested, save_failed=saver.has_failed)
            gradients.prepare_update(health.grad_norm, health.skipped)
        watch.enter("step")
        engine.step()  # after the last micro-batch it updates the weights, unless `health` skips the step
    previous = health.end_step(step, position)
    run.objective.after_step(health.skipped)
    run.ema.update(step, health.skipped)
    interval.end_step(health.grad_norm, health.skipped)
    return previous


def handle_result(run: Run, batches: Batches, saver: Saver, result: StepResult) -> Outcome:
    """React to the result of a step: record it if it was skipped, and clean up a checkpoint that failed.

    Args:
        run: Open run, whose state already counts later steps.
        batches: Batches of the run, which know the names of the samples.
        saver: Saver of the run.
        result: Result of the step, the same on all ranks.

    Returns:
        DONE to continue, or the outcome with which training must end: STOPPED or DIVERGED.
    """
    record_result(run.skipped_steps, batches, result)
    if result.save_failed:
        saver.abandon()
    if run.has_diverged:
        return Outcome.DIVERGED
    is_last = run.state.step == run.config.schedule.total_steps
    return Outcome.STOPPED if result.stop_requested and not is_last else Outcome.DONE


def record_result(skipped_steps: SkippedSteps, batches: Batches, result: StepResult) -> None:
    """Add a step to the list of skipped steps if it was skipped."""
    skipped_steps.record(result, batches.sample_names(result.position) if result.is_skipped else ())


def evaluate(evaluator: Evaluator, step: int, tracker: Tracker, progress: ProgressLine, stop: StopSignal) -> Outcome:
    """Evaluate and log the metrics (collective); return STOPPED if a rank was asked to stop before the end."""
    row = evaluator.evaluate(step, lambda: stop.is_requested)
    if row is None:
        return Outcome.STOPPED
    if row:
        tracker.log(row, step)
        progress.print_message(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in row.items()))
    return Outcome.DONE


def log_interval(
    run: Run,
    interval: Interval,
    batches: Batches,
    learning_rate: float,
    tracker: Tracker,
    progress: ProgressLine,
) -> None:
    """All-reduce the metrics of an interval, log and print them, and count its images (collective).

    Args:
        run: Open run.
        interval: Losses and gradient norms since the last row of metrics.
        batches: Batches of the run, with the timing of data loading and the unusable samples.
        learning_rate: Learning rate of the latest step.
        tracker: Tracker that logs the metrics.
        progress: Progress line that shows them.
    """
    data, batch_size = run.config.data, run.config.engine.global_batch_size
    totals, shared = interval_metrics(interval, batches.meter, run.quarantine, data, batch_size)
    run.count_images(totals.num_applied * batch_size)
    run.resume_stream_at(batches.next_tar())
    row = {
        **shared,
        "optim/learning_rate": learning_rate,
        "health/skipped_steps": run.skipped_steps.total,
        "data/samples": run.state.position,
        **batches.epochs(run.state),
    }
    tracker.log(row, run.state.step)
    progress.print_metrics(row, run.state.step)
    progress.print_bottleneck(describe_bottleneck(row, data.num_workers))
    run.quarantine.check(run.state.position)


def open_tracker(config: PretrainConfig, data_digest: str, config_text: str, resume_step: int) -> Tracker:
    """Start tracking the run; only the main rank does."""
    return Tracker(
        config.run_dir,
        config.tracking,
        RunDescription("pretrain", data_digest, config_text, flatten(config)),
        resume_step=resume_step,
        enabled=distributed.is_main(),
    )
