"""The micro-batches of each optimizer step."""

from collections.abc import Generator, Iterable, Iterator
from functools import partial
from itertools import chain

from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.loading.loader import BatchPlan, BatchSource, IndexedBatches, LoadedBatch
from pretrain.data.loading.meters import Meter
from pretrain.data.loading.prefetch import Prefetcher
from pretrain.data.loading.stream import TarStream, TarStreamBatches
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.data.transforms.device_decode import Decoder, decode_on_device
from pretrain.heartbeat.watch import Watch
from pretrain.objectives.objective import Objective
from pretrain.schedules import split_by_image_size
from pretrain.state import TrainState


class Batches:
    """This rank's micro-batches, from the run's current position to its last step.

    Args:
        config: Resolved run configuration.
        dataset: Training data, indexed or a stream.
        objective: Objective, whose view transforms the images.
        state: State of the run: the position to start at and the ranges to leave out.
        decoder: JPEG decoder of the GPU, or None if the data workers decode.
        watch: Watch of this rank; it records when the rank waits for data and when the forward pass begins.

    Attributes:
        accumulation_steps: Number of micro-batches per optimizer step.
        meter: Loading statistics and unusable samples since the last row of metrics.
    """

    def __init__(
        self,
        config: PretrainConfig,
        dataset: Dataset | TarStream,
        objective: Objective,
        state: TrainState,
        decoder: Decoder | None,
        watch: Watch,
    ) -> None:
        self.config = config
        self.objective = objective
        self.decoder = decoder
        self.watch = watch
        self.device = distributed.device()
        self.accumulation_steps = config.engine.accumulation_steps(distributed.world_size())
        self.global_batch_size = config.engine.global_batch_size
        plan = BatchPlan(
            seed=config.seed,
            shuffle_window=config.data.shuffle_window,
            global_batch_size=self.global_batch_size,
            accumulation_steps=self.accumulation_steps,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=config.data.num_workers,
            batches_ahead=config.data.batches_ahead,
            num_threads=config.data.num_threads,
            group_size=objective.group_size,
            views_per_image=config.data.repeats,
            decodes_jpegs=decoder is None,
        )
        self._source: BatchSource = (
            TarStreamBatches(dataset, plan, state.next_tar)
            if isinstance(dataset, TarStream)
            else IndexedBatches(dataset, plan)
        )
        self.meter = Meter()
        self._prefetcher = Prefetcher(self.device)
        self._open: Generator[LoadedBatch, None, None] | None = None  # batches of the current range
        num_samples = (config.schedule.total_steps - state.step) * self.global_batch_size
        size_changes = config.schedule.size_changes(self.global_batch_size)
        self._loaded = chain.from_iterable(
            self._load(*piece)
            for start, stop in state.upcoming_ranges(num_samples)
            for piece in split_by_image_size(start, stop, size_changes, config.model.image_size)
        )

    def next_step(self, step: int) -> Iterator[tuple[Batch, float, bool]]:
        """Load the micro-batches of one optimizer step.

        Args:
            step: Number of the step, which the heartbeat shows.

        Yields:
            The micro-batch on the device, its weight in the mean loss, and whether it is the last one of the step.
        """
        for number in range(self.accumulation_steps):
            self.watch.enter("data", step)
            loaded = self.meter.next_batch(self._loaded)
            batch = self._prefetcher.prepare(partial(self._to_device, loaded.tensors))
            self.watch.enter("forward")
            yield batch, loaded.weight, number == self.accumulation_steps - 1

    def sample_names(self, position: int) -> Iterable[tuple[str, str]]:
        """Return the shard and the key of each sample of the step that starts at `position` (collective)."""
        names = self._source.sample_names(position)
        if self._source.is_stream:  # each rank knows its own samples only
            return chain.from_iterable(distributed.gather(list(names)))
        return names

    def next_tar(self) -> int:
        """Return the number of the first tar that no rank has opened; 0 for indexed data (collective)."""
        if self._source.is_stream:
            return max(distributed.gather(self._source.next_tar))
        return 0

    def epochs(self, state: TrainState) -> dict[str, float]:
        """Return how many epochs of each dataset a run in this state has read, as metrics."""
        epochs = self._source.epochs(state.position, state.next_tar)
        return {f"data/epoch_{i}" if len(epochs) > 1 else "data/epoch": epoch for i, epoch in enumerate(epochs)}

    def close(self) -> None:
        """Stop the data workers."""
        if self._open is not None:
            self._open.close()

    def _load(self, start: int, stop: int, image_size: int) -> Generator[LoadedBatch, None, None]:
        """Start loading the positions from `start` to before `stop` as images of one size (collective for a stream)."""
        view = self.objective.train_view(image_size)
        self._open = self._source.load(view, start, stop, self.next_tar())
        return self._open

    def _to_device(self, batch: Batch) -> Batch:
        if self.decoder is not None:
            batch = decode_on_device(batch, self.config.model.image_size, self.device, self.decoder)
        return to_device(batch, self.device)
