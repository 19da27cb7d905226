"""What the run has learned so far: losses of the validation set, probes of the frozen encoder, and pictures."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain import distributed
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.loading.loader import BadSample, LoadedBatch, evaluation_batches
from pretrain.data.transforms.batch import to_device
from pretrain.errors import DataError
from pretrain.metrics.feature_rank import effective_rank, feature_spread
from pretrain.metrics.knn import predict_knn
from pretrain.metrics.linear_probe import predict_linear_probe
from pretrain.objectives.objective import Output
from pretrain.outcome import Outcome
from pretrain.run import Run
from pretrain.tracking.progress import ProgressLine
from pretrain.tracking.tracker import PICTURES_FOLDER, Tracker, picture_name

NUM_PICTURES, LEAST_PICTURE = 8, 96  # pixels of its height; smaller ones are enlarged
GAP, PAPER = 4, 1.0  # pixels between pictures, and their color
PROBES = {"knn_top1": predict_knn, "linear_top1": predict_linear_probe}


class _StoppedError(Exception):
    """Some rank was asked to stop; raised on all of them."""


def is_due(run: Run) -> bool:
    """Say whether anything is to be evaluated after the step that was just taken."""
    return _validation_is_due(run) or _probe_is_due(run)


def is_owed(run: Run, rows: Iterable[Mapping[str, float]]) -> bool:
    """Say whether a run that begins at its end was ended in its last evaluation; `rows` are what it has logged."""
    step = run.state.step
    done = any(row["step"] == step and "validation/loss" in row for row in rows)
    return _is_last(run) and run.data.validation is not None and not distributed.any_over_ranks(done)


def evaluate(run: Run, tracker: Tracker, progress: ProgressLine, stopping: Callable[[], bool]) -> Outcome:
    """Evaluate what is due, on all ranks together, unless one of them is asked to stop.

    Args:
        run: whose average of the weights, if it keeps one, is evaluated in their place.
        tracker: is given the numbers.
        progress: shows them.
        stopping: says whether this rank was asked to stop.
    """
    row: dict[str, float] = {}
    validation = run.data.validation
    if validation is None:
        return Outcome.DONE
    outcome = Outcome.STOPPED
    with _frozen(run):
        if _validation_is_due(run):
            row |= _validate(run, validation, stopping)
        if _probe_is_due(run):
            started = time.monotonic()
            row |= _probe(run, validation, stopping)
            _draw(run, validation)
            row["probe/seconds"] = time.monotonic() - started
        outcome = Outcome.DONE
    if row and outcome is Outcome.DONE:
        tracker.log(row, run.state.step)
        progress.print_message(
            f"step {run.state.step}  " + "  ".join(f"{name} {value:.4f}" for name, value in row.items())
        )
    return outcome


def _validation_is_due(run: Run) -> bool:
    every = run.config.evaluation.every_steps
    return _is_last(run) or bool(every and run.state.step % every == 0)


def _probe_is_due(run: Run) -> bool:
    every = run.config.evaluation.probe_every_steps
    return bool(every and (_is_last(run) or run.state.step % every == 0))


def _is_last(run: Run) -> bool:
    return run.state.step == run.config.schedule.total_steps


@contextmanager
def _frozen(run: Run) -> Iterator[None]:
    """Hold the model still, with the average of its weights in their place, until all is done or a stop is asked."""
    run.engine.eval()
    with torch.no_grad(), run.ema.swapped_in(), suppress(_StoppedError):
        yield
    run.engine.train()


def _batches(
    run: Run, samples: Dataset, stopping: Callable[[], bool], output: Output, max_samples: int | None = None
) -> Iterator[tuple[LoadedBatch, dict[str, Tensor]]]:
    """Yield this rank's batches and what the objective answers."""
    batches = evaluation_batches(
        samples,
        run.objective.evaluation_view(),
        batch_size=run.config.engine.micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=run.config.data.num_workers,
        max_samples=max_samples,
    )
    faults: list[BadSample] = []
    for loaded in batches:
        run.watch.enter("evaluate")  # each a turn of its own, so that a long evaluation is no hang
        if distributed.any_over_ranks(stopping()):
            batches.close()
            raise _StoppedError
        faults += loaded.bad_samples
        yield loaded, run.engine(to_device(loaded.tensors, run.engine.device), output=output)
    run.quarantine.add(chain.from_iterable(distributed.gather(faults)))


def _validate(run: Run, validation: Dataset, stopping: Callable[[], bool]) -> dict[str, float]:
    """Go through the validation set, every sample once over all ranks."""
    sums: dict[str, Tensor] = {}
    for loaded, answers in _batches(run, validation, stopping, "losses"):
        count = loaded.tensors["weight"].sum().to(run.engine.device)
        for name, value in (answers | {"count": count}).items():
            sums[name] = sums.get(name, 0.0) + value.double()
    totals = distributed.sum_over_ranks(torch.stack([*sums.values()])).tolist()
    if not totals[-1]:
        raise DataError(f"{run.config.data.validation}: no sample can be used; {run.quarantine.path} says why")
    means = {name: total / totals[-1] for name, total in zip(sums, totals, strict=True)}
    return {f"validation/{name}": mean for name, mean in means.items() if name != "count"}


def _probe(run: Run, validation: Dataset, stopping: Callable[[], bool]) -> dict[str, float]:
    """Ask what the features are good for; each rank answers for its own part of the validation set."""
    own = _features(run, run.data.training, stopping, run.config.evaluation.probe_samples)
    unknown, truth, _ = _features(run, validation, stopping)
    everyone = distributed.gather([part.cpu() for part in own])  # a GPU's tensor would arrive on that very GPU
    known, labels, positions = (torch.cat(part).to(run.engine.device) for part in zip(*everyone, strict=True))
    order = positions.argsort()  # so that nothing depends on the number of ranks
    known, labels = known[order], labels[order]
    if not known.isfinite().all():
        return {}
    row = {"probe/feature_rank": effective_rank(known), "probe/feature_spread": feature_spread(known)}
    names = run.data.training.class_names
    if names and names == validation.class_names:
        right = [(probe(known, labels, unknown) == truth).sum() for probe in PROBES.values()]
        totals = distributed.sum_over_ranks(torch.stack([*right, torch.tensor(len(truth)).to(truth)])).tolist()
        row |= {f"probe/{name}": total / totals[-1] for name, total in zip(PROBES, totals, strict=False)}
    return row


def _features(
    run: Run, samples: Dataset, stopping: Callable[[], bool], max_samples: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features [N, D], labels [N] and positions [N] of this rank's usable samples."""
    features, labels, positions = [], [], []
    for loaded, answers in _batches(run, samples, stopping, "features", max_samples):
        kept = loaded.tensors["weight"] > 0
        features.append(answers["features"][kept.to(run.engine.device)])
        labels.append(loaded.tensors["label"][kept])
        positions.append(loaded.tensors["position"][kept])
    return torch.cat(features), torch.cat(labels).to(run.engine.device), torch.cat(positions)


def _draw(run: Run, validation: Dataset) -> None:
    """Draw the same images each time; every rank computes them, since ZeRO 3 needs all of them."""
    view, number = run.objective.evaluation_view(), NUM_PICTURES
    batches = evaluation_batches(
        validation, view, batch_size=number, rank=0, world_size=1, num_workers=0, max_samples=number
    )
    for loaded in batches:
        pictures = run.engine(to_device(loaded.tensors, run.engine.device), output="pictures")["pictures"]
        if distributed.is_main():
            try:
                _save_picture(lay_out(pictures.cpu()), run)
            except OSError as error:  # of a full disk: no reason to end a run
                print(f"no picture of step {run.state.step}: {error}", file=sys.stderr, flush=True)


def lay_out(pictures: Tensor) -> Image.Image:
    """Lay pictures [rows, columns, C, H, W] out on a page, with gaps between them; small ones are enlarged."""
    times = max(1, LEAST_PICTURE // pictures.shape[-2])
    enlarged = pictures.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)
    framed = F.pad(enlarged, (0, GAP, 0, GAP), value=PAPER)  # [R, K, C, H, W]
    page = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [R H, K W, C]
    return Image.fromarray(np.asarray(page[:-GAP, :-GAP].mul(255).round().to(torch.uint8)))


def _save_picture(page: Image.Image, run: Run) -> None:
    path = run.config.run_dir / PICTURES_FOLDER / picture_name(run.state.step)
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".partial")
    page.save(aside, "PNG")
    aside.rename(path)
