"""Evaluate a model in training: losses on the validation set, probes of the frozen encoder, and pictures."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from PIL import Image
from torch import Tensor

from pretrain import distributed
from pretrain.captions import caption_of_class
from pretrain.config import PretrainConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.loading.loader import BadSample, LoadedBatch, evaluation_batches
from pretrain.data.loading.prefetch import Prefetcher
from pretrain.data.loading.quarantine import Quarantine
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.delayed_flag import DelayedFlag
from pretrain.engine.ema import Ema
from pretrain.engine.protocol import TrainingEngine
from pretrain.errors import DataError
from pretrain.heartbeat.watch import Watch
from pretrain.metrics.feature_rank import effective_rank, feature_spread
from pretrain.metrics.knn import predict_knn
from pretrain.metrics.linear_probe import predict_linear_probe
from pretrain.objectives.objective import Objective, Output
from pretrain.tracking.pictures import add_captions, make_grid, save_picture

NUM_PICTURES = 8  # images of the validation set that pictures are made of
PROBES = {"knn_top1": predict_knn, "linear_top1": predict_linear_probe}

ShouldStop = Callable[[], bool]  # whether this rank, or any rank, was asked to stop


@dataclass(frozen=True)
class Features:
    """Features of this rank's usable samples.

    Attributes:
        values: CLS tokens of the encoder, float [N, D], on the device.
        labels: Class of each sample, int [N], on the device.
        positions: Row of each sample in its dataset, int [N], on the CPU.
    """

    values: Tensor
    labels: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the model at certain steps. Every rank must call the same methods in the same order.

    Attributes:
        config: Resolved run configuration.
        training: Training data, on whose features the probes are fitted; None for a stream, which has no probes.
        validation: Validation data, or None to evaluate nothing.
        objective: Model in training.
        engine: DeepSpeed engine around the objective.
        ema: Moving average of the weights; if the run keeps one, it is evaluated in place of the weights.
        quarantine: List of unusable samples.
        watch: Heartbeat of this rank.
    """

    config: PretrainConfig
    training: Dataset | None
    validation: Dataset | None
    objective: Objective
    engine: TrainingEngine
    ema: Ema
    quarantine: Quarantine
    watch: Watch

    def is_due(self, step: int) -> bool:
        """Return whether to evaluate after `step` steps."""
        return self._validation_is_due(step) or self._probe_is_due(step)

    def final_is_missing(self, rows: Iterable[Mapping[str, float]], step: int) -> bool:
        """Return whether the run took its last step but was ended during the final evaluation (collective).

        Args:
            rows: Metrics that the run has logged; only the main rank needs them.
            step: Number of steps of the run's checkpoint.
        """
        is_logged = any(row["step"] == step and "validation/loss" in row for row in rows)
        return self._is_last(step) and self.validation is not None and not distributed.any_over_ranks(is_logged)

    def evaluate(self, step: int, should_stop: ShouldStop) -> dict[str, float] | None:
        """Evaluate what is due after `step` steps (collective).

        Args:
            step: Number of steps so far.
            should_stop: Tells whether this rank was asked to stop; it is called before every batch.

        Returns:
            The metrics, or None if any rank was asked to stop before the last batch.
        """
        if self.validation is None:
            return {}
        row: dict[str, float] = {}
        flag = DelayedFlag(self.engine.device)

        def ranks_stop() -> bool:
            return flag.any_over_ranks(should_stop())

        with self._evaluation_mode():
            if self._validation_is_due(step):
                losses = self._validate(self.validation, ranks_stop)
                if losses is None:
                    return None
                row |= losses
            if self._probe_is_due(step):
                started = time.monotonic()
                scores = self._probe(self.validation, ranks_stop)
                if scores is None:
                    return None
                self._save_pictures(self.validation, step)
                row |= scores | {"probe/seconds": time.monotonic() - started}
        return row

    def _validation_is_due(self, step: int) -> bool:
        every = self.config.evaluation.every_steps
        return self._is_last(step) or bool(every and step % every == 0)

    def _probe_is_due(self, step: int) -> bool:
        every = self.config.evaluation.probe_every_steps
        return bool(every and (self._is_last(step) or step % every == 0))

    def _is_last(self, step: int) -> bool:
        return step == self.config.schedule.total_steps

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Switch to evaluation mode and to the averaged weights inside the block (collective)."""
        self.engine.eval()
        with torch.no_grad(), self.ema.swapped_in():
            yield
        self.engine.train()

    def _for_each_batch(
        self,
        dataset: Dataset,
        output: Output,
        consume: Callable[[LoadedBatch, Batch, dict[str, Tensor]], None],
        ranks_stop: ShouldStop,
        max_samples: int | None = None,
    ) -> bool:
        """Pass this rank's share of a dataset through the model (collective).

        The host queues a batch while the device still computes the one before, and waits for neither.

        Args:
            dataset: Data to evaluate.
            output: Output of the objective to compute.
            consume: Function that is called with every batch, its tensors on the device, and the objective's output.
            ranks_stop: Tells whether any rank was asked to stop; the same on all ranks.
            max_samples: Largest number of samples over all ranks; None for the whole dataset.

        Returns:
            Whether all batches were consumed; False if any rank was asked to stop before.
        """
        batches = evaluation_batches(
            dataset,
            self.objective.evaluation_view(),
            batch_size=self.config.engine.micro_batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=self.config.data.num_workers,
            batches_ahead=self.config.data.batches_ahead,
            max_samples=max_samples,
        )
        bad_samples: list[BadSample] = []
        prefetcher = Prefetcher(self.engine.device)
        for loaded in batches:
            self.watch.enter("evaluate")  # once per batch, so that a long evaluation does not look like a hang
            if ranks_stop():
                batches.close()
                return False
            bad_samples += loaded.bad_samples
            batch = prefetcher.prepare(partial(to_device, loaded.tensors, self.engine.device))
            consume(loaded, batch, self.engine(batch, output=output))
        self.quarantine.add(chain.from_iterable(distributed.gather(bad_samples)))
        return True

    def _validate(self, validation: Dataset, ranks_stop: ShouldStop) -> dict[str, float] | None:
        """Return the mean of each loss and metric over the validation set; None if a rank was asked to stop."""
        sums: dict[str, Tensor] = {}

        def add(loaded: LoadedBatch, batch: Batch, outputs: dict[str, Tensor]) -> None:
            for name, value in (outputs | {"count": batch["weight"].sum()}).items():
                sums[name] = sums.get(name, 0.0) + value.double()

        if not self._for_each_batch(validation, "losses", add, ranks_stop):
            return None
        totals = distributed.sum_over_ranks(torch.stack([*sums.values()])).tolist()
        count = totals[-1]
        if not count:
            raise DataError(
                f"{self.config.data.validation}: no sample of the validation set is usable; see {self.quarantine.path}"
            )
        means = {name: total / count for name, total in zip(sums, totals, strict=True)}
        return {f"validation/{name}": mean for name, mean in means.items() if name != "count"}

    def _probe(self, validation: Dataset, ranks_stop: ShouldStop) -> dict[str, float] | None:
        """Return how well simple classifiers work on frozen features; None if a rank was asked to stop.

        Every rank has the features of all training samples and predicts the classes of its own validation samples.
        """
        assert self.training is not None  # the config refuses probes of a stream
        fitted_on = self._features(self.training, ranks_stop, self.config.evaluation.probe_samples)
        tested_on = self._features(validation, ranks_stop) if fitted_on else None
        if fitted_on is None or tested_on is None:
            return None
        # On the CPU, because `gather` would place a tensor of another rank on that rank's GPU.
        own = fitted_on.values.cpu(), fitted_on.labels.cpu(), fitted_on.positions
        gathered = zip(*distributed.gather(own), strict=True)
        features, labels, positions = (torch.cat(parts).to(self.engine.device) for parts in gathered)
        order = positions.argsort()  # the same on any number of ranks
        features, labels = features[order], labels[order]
        if not features.isfinite().all():
            return {}
        row = {"probe/feature_rank": effective_rank(features), "probe/feature_spread": feature_spread(features)}
        names = self.training.class_names
        if names and names == validation.class_names:
            num_correct = [
                (predict(features, labels, tested_on.values) == tested_on.labels).sum() for predict in PROBES.values()
            ]
            count = torch.tensor(len(tested_on.labels)).to(tested_on.labels)
            totals = distributed.sum_over_ranks(torch.stack([*num_correct, count])).tolist()
            row |= {f"probe/{name}": total / totals[-1] for name, total in zip(PROBES, totals, strict=False)}
        return row

    def _features(self, dataset: Dataset, ranks_stop: ShouldStop, max_samples: int | None = None) -> Features | None:
        """Return the features of this rank's usable samples; None if a rank was asked to stop."""
        values, labels, positions, weights = [], [], [], []

        def add(loaded: LoadedBatch, batch: Batch, outputs: dict[str, Tensor]) -> None:
            values.append(outputs["features"])
            labels.append(loaded.tensors["label"])
            positions.append(loaded.tensors["position"])
            weights.append(loaded.tensors["weight"])

        if not self._for_each_batch(dataset, "features", add, ranks_stop, max_samples):
            return None
        usable = torch.cat(weights).nonzero().squeeze(1)  # on the host, which would wait for the result of a device
        on_device = usable.to(self.engine.device)
        return Features(
            torch.cat(values)[on_device],
            torch.cat(labels)[usable].to(self.engine.device),
            torch.cat(positions)[usable],
        )

    def _save_pictures(self, validation: Dataset, step: int) -> None:
        """Save the objective's pictures of the same few images at every step.

        Every rank computes all of them, because ZeRO stage 3 needs all ranks in a forward pass.
        """
        batches = evaluation_batches(
            validation,
            self.objective.evaluation_view(),
            batch_size=NUM_PICTURES,
            rank=0,
            world_size=1,
            num_workers=0,
            max_samples=NUM_PICTURES,
        )
        for loaded in batches:
            outputs = self.engine(to_device(loaded.tensors, self.engine.device), output="pictures")
            if distributed.is_main():
                page = self._captioned(outputs["pictures"].cpu(), loaded, validation, step)
                try:
                    save_picture(page, self.config.run_dir, step)
                except OSError as error:  # a full disk must not end the run
                    print(f"step {step}: the picture could not be saved: {error}", file=sys.stderr, flush=True)

    def _captioned(self, pictures: Tensor, loaded: LoadedBatch, validation: Dataset, step: int) -> Image.Image:
        """Arrange pictures under a title, with headings and, if the data has labels, the class of each image."""
        count = min(len(pictures), sum(validation.shard_sizes))  # a batch that is too large repeats its last image
        labels, weights = loaded.tensors["label"][:count].tolist(), loaded.tensors["weight"][:count].tolist()
        names = [
            caption_of_class(validation.class_names[label], label) if weight else "unusable image"
            for label, weight in zip(labels, weights, strict=True)
            if validation.class_names
        ]
        title = f"{self.config.run_dir.name}, step {step} ({self.config.objective.name}): validation images"
        return add_captions(make_grid(pictures[:count]), title, self.objective.picture_headings(), names)
