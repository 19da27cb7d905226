"""The fine-tuning loop: adapt a Hugging Face folder to the user's classes with Accelerate, on any number of ranks."""

import gc
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from finetune.backbone import save_folder
from finetune.card import model_card
from finetune.config import FinetuneConfig
from finetune.evaluate import Evaluation, evaluate
from finetune.preprocessor import WORKER_MODULES
from finetune.run import FinetuneRun, build_accelerator, build_run, claim, open_tracker
from finetune.steps import Batches, take_step
from pretrain import distributed
from pretrain.configfile import CommandLine
from pretrain.data.dataset.order import dropout_seed
from pretrain.data.loading.meters import describe_bottleneck
from pretrain.data.loading.workers import start_server
from pretrain.delayed_flag import DelayedFlag
from pretrain.device_errors import FINETUNING_FIXES, explain_device_errors
from pretrain.errors import DivergedError, MachineError, UserError
from pretrain.hub import MODEL_FOLDER
from pretrain.interval import Interval, interval_metrics
from pretrain.outcome import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, Outcome, outcome_of
from pretrain.schedules import learning_rate_at, set_learning_rate
from pretrain.startup import join_process_group, prepare_process
from pretrain.stop_signal import StopSignal
from pretrain.tracking.progress import ProgressLine, summary
from pretrain.tracking.tracker import STOP_TIMEOUT_SECONDS, Tracker, records_of


@dataclass(frozen=True)
class Best:
    """The saved model: the one with the best validation accuracy so far."""

    top1: float
    epoch: int


@dataclass(frozen=True)
class FinetuneResult:
    """How training ended.

    Attributes:
        best: The saved model, or None if the run was stopped before its first evaluation.
        stopped_after: Step after which the run was stopped, or None if it is complete.
    """

    best: Best | None
    stopped_after: int | None


def main(command: CommandLine[FinetuneConfig]) -> int:
    """Fine-tune as the command line asks; return the exit code."""
    stop = StopSignal()
    prepare_process()
    try:
        if distributed.is_launched() and not join_process_group(lambda: stop.is_requested):
            return EXIT_INTERRUPTED
        if command.config.data.num_workers:
            start_server(WORKER_MODULES)  # imports transformers in the background, once for all workers
        accelerator = build_accelerator()
        with explain_device_errors(FINETUNING_FIXES), claim(command.config) as watch:
            result = train_with_tracking(
                build_run(command.config, accelerator), command.text, stop, lambda step: watch.enter("step", step)
            )
            watch.finish(Outcome.DONE if result.stopped_after is None else Outcome.STOPPED)
    except (UserError, MachineError, DivergedError) as error:
        distributed.print_error(error)
        return distributed.leave_after_error(outcome_of(error).exit_code)
    except KeyboardInterrupt:  # a second Ctrl-C
        if distributed.is_main():
            print("interrupted", file=sys.stderr, flush=True)
        return distributed.leave_after_error(EXIT_INTERRUPTED)
    except Exception:  # the other ranks have to leave too, so this one must not wait for them
        traceback.print_exc()
        return distributed.leave_after_error(EXIT_FAILED)
    if distributed.is_main():
        print(_describe(result, command.config), flush=True)
    gc.collect()  # frees the model's wrapper if it is part of a reference cycle, see `train_with_tracking`
    distributed.leave_process_group()
    return EXIT_DONE if result.stopped_after is None else EXIT_INTERRUPTED


def train_with_tracking(
    run: FinetuneRun, config_text: str, stop: StopSignal, on_step: Callable[[int], None] = lambda _: None
) -> FinetuneResult:
    """Train and record the outcome in MLflow; call `on_step` with the number of each step that begins.

    The run must not outlive this call: if torch's wrapper of its model is freed after the process group, it waits for
    the group's threads while it holds Python's lock, for which they may be waiting.
    """
    with open_tracker(run, config_text) as tracker:
        tracker.tag({"model_folder": str(run.model_folder.resolve())})
        result = train(run, tracker, lambda: stop.is_requested, on_step)
        if result.stopped_after is None:
            tracker.finish("FINISHED")
        else:
            tracker.finish("KILLED", STOP_TIMEOUT_SECONDS)
    return result


def train(
    run: FinetuneRun,
    tracker: Tracker,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int], None] = lambda _: None,
) -> FinetuneResult:
    """Train to the last epoch, or until any rank is asked to stop; keep the model of the best evaluation (collective).

    Args:
        run: Fine-tuning run.
        tracker: Records the metrics.
        should_stop: Whether this rank was asked to stop. All ranks stop together, one step later.
        on_step: Function that is called with the number of each step that begins.

    Raises:
        DivergedError: If the loss or the norm of its gradient is not finite.
    """
    config, device, total_steps = run.config, run.accelerator.device, run.total_steps
    batch_size = config.engine.global_batch_size
    evaluation_epochs = run.evaluation_epochs()
    progress = ProgressLine(total_steps, 0, enabled=distributed.is_main())
    for note in dict.fromkeys((*run.training.notes, *run.validation.notes)):
        progress.print_message(note)
    progress.print_message(_summary(run))
    best, stopping = None, DelayedFlag(device)
    set_training_mode(run.model, freeze_backbone=config.freeze_backbone)
    progress.begin_first_step(compiles=config.engine.compile)
    with closing(Batches(run)) as batches:
        interval = Interval(device, batches.accumulation_steps)
        for step in range(1, total_steps + 1):
            on_step(step)
            learning_rate = prepare_step(run, step)
            take_step(run, batches, interval)
            must_stop = stopping.any_over_ranks(should_stop())  # waits for the step before, at most
            progress.end_step()
            if config.logging.is_due(step) or step == total_steps:
                _, shared = interval_metrics(interval, batches.meter, run.quarantine, config.data, batch_size)
                row = {**shared, "optim/learning_rate": learning_rate, "data/samples": step * batch_size}
                report(run, row, step, tracker, progress)
                check_finite(row, step, best, run.model_folder)
                interval = Interval(device, batches.accumulation_steps)
            if step in evaluation_epochs:
                with interval.pause():
                    evaluation = evaluate_run(run, should_stop)
                    if evaluation is None:
                        return FinetuneResult(best, stopped_after=step)
                    report_evaluation(evaluation, evaluation_epochs[step], step, tracker, progress)
                    best = keep_best(run, evaluation, evaluation_epochs[step], best)
            if step < total_steps and must_stop:
                return FinetuneResult(best, stopped_after=step)
    return FinetuneResult(best, stopped_after=None)


def prepare_step(run: FinetuneRun, step: int) -> float:
    """Set and return the learning rate, and seed dropout from the run's seed, the step and the rank."""
    config, total_steps = run.config, run.total_steps
    learning_rate = learning_rate_at(
        step - 1,
        peak=config.optimizer.peak_learning_rate(config.engine.global_batch_size),
        final=0.0,
        warmup_steps=min(run.steps_after(config.schedule.warmup_epochs), total_steps - 1),
        total_steps=total_steps,
    )
    set_learning_rate(run.optimizer.param_groups, learning_rate)
    torch.manual_seed(dropout_seed(config.seed, step, distributed.rank()))
    return learning_rate


def report(run: FinetuneRun, row: Mapping[str, float], step: int, tracker: Tracker, progress: ProgressLine) -> None:
    """Log and print a row of metrics, and check the number of unusable samples."""
    tracker.log(row, step)
    progress.print_metrics(row, step)
    progress.print_bottleneck(describe_bottleneck(dict(row), run.config.data.num_workers))
    run.quarantine.check(step * run.config.engine.global_batch_size)


def check_finite(row: Mapping[str, float], step: int, best: Best | None, model_folder: Path) -> None:
    """Check the loss and the gradient norm in a row of metrics.

    Raises:
        DivergedError: If one of them is not finite.
    """
    if not math.isfinite(row["train/loss"] + row["optim/grad_norm"]):
        saved = f". The best model so far, from epoch {best.epoch}, is in {model_folder}" if best else ""
        raise DivergedError(
            f"step {step}: the loss or the gradient norm is NaN or infinite; lower optimizer.learning_rate{saved}"
        )


def evaluate_run(run: FinetuneRun, should_stop: Callable[[], bool]) -> Evaluation | None:
    """Evaluate the current model on the validation data (collective); return None if a rank was asked to stop.

    The result is that of the saved model: computed in float32 and without compilation, whatever training uses.
    """
    # The statistics of batch normalization differ between ranks; those of the main rank are evaluated and saved.
    distributed.broadcast_from_main(run.classifier.buffers())
    evaluation = evaluate(
        run.classifier,
        run.validation,
        run.preprocessor,
        batch_size=run.config.engine.micro_batch_size,
        num_workers=run.config.data.num_workers,
        batches_ahead=run.config.data.batches_ahead,
        device=run.accelerator.device,
        quarantine=run.quarantine,
        should_stop=should_stop,
    )
    set_training_mode(run.model, freeze_backbone=run.config.freeze_backbone)
    return evaluation


def report_evaluation(evaluation: Evaluation, epoch: int, step: int, tracker: Tracker, progress: ProgressLine) -> None:
    """Log and print the result of an evaluation."""
    row = {"validation/loss": evaluation.loss, "validation/top1": evaluation.top1, "train/epoch": epoch}
    tracker.log(row, step)
    progress.print_message(f"epoch {epoch}  validation loss {evaluation.loss:.4f}  top-1 {evaluation.top1:.4f}")


def keep_best(run: FinetuneRun, evaluation: Evaluation, epoch: int, best: Best | None) -> Best:
    """Save the model if it is better than the best one so far, and return the best one (collective)."""
    if best is not None and evaluation.top1 <= best.top1:
        return best

    def save_on_main() -> None:
        if distributed.is_main():
            card = model_card(run.config, run.classifier.config.model_type, run.training, evaluation, epoch)
            save_folder(run.classifier, run.preprocessor, card, run.model_folder)

    distributed.on_all_ranks(save_on_main)
    return Best(evaluation.top1, epoch)


def set_training_mode(model: nn.Module, *, freeze_backbone: bool) -> None:
    """Put the model into training mode; with a frozen backbone it stays in evaluation mode, without dropout."""
    model.train(not freeze_backbone)


def _summary(run: FinetuneRun) -> str:
    ranks = distributed.world_size()
    return (
        f"{run.num_samples} training and {sum(run.validation.shard_sizes)} validation images, "
        f"{len(run.training.class_names)} classes, {ranks} {'rank' if ranks == 1 else 'ranks'} on "
        f"{run.accelerator.device.type}, {run.total_steps} steps, "
        f"{run.config.optimizer.describe_learning_rate(run.config.engine.global_batch_size)}"
    )


def _describe(result: FinetuneResult, config: FinetuneConfig) -> str:
    """Return how training ended, where its model is, and what to do next."""
    best, stopped, model_folder = result.best, result.stopped_after, config.run_dir / MODEL_FOLDER
    if best is None:
        return f"stopped after step {stopped}, before the first evaluation: no model was saved"
    saved = f"best top-1 {best.top1:.4f} after epoch {best.epoch}: {model_folder}"
    if stopped is not None:
        return f"stopped after step {stopped}; {saved}"
    predict = f"{shlex.join(['vitrail', 'predict', str(model_folder)])} IMAGE..."
    return summary(f"done: {saved}", {**records_of(config.run_dir, config.tracking), "next": predict})
