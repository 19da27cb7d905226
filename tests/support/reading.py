"""Datasets as training reads them."""

from pathlib import Path

from pretrain.config import AugmentConfig, DataConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_cache, open_dataset
from pretrain.data.loading.loader import BatchPlan, training_batches
from pretrain.data.transforms.views import TrainView


def opened(place: str, cache_dir: Path, **settings: object) -> Dataset:
    """Open a dataset as training does, with a cache in `cache_dir`."""
    config = DataConfig(train=place, cache_dir=cache_dir, **settings)  # type: ignore[arg-type]
    return open_dataset(config.train, cache=open_cache(config))


def pixels_of_two_epochs(samples: Dataset, num_workers: int = 2) -> dict[int, bytes]:
    """Return the pixels of two epochs by position; assert that no sample is bad."""
    seen = {}
    for loaded in training_batches(
        samples,
        TrainView(AugmentConfig(), 8),
        BatchPlan(seed=0, shuffle_window=3, global_batch_size=16, num_workers=num_workers),
        start=0,
        stop=2 * sum(samples.shard_sizes) // 16 * 16,
    ):
        assert not loaded.bad_samples, loaded.bad_samples
        for i, position in enumerate(loaded.tensors["position"].tolist()):
            seen[position] = loaded.tensors["image"][i].numpy().tobytes()
    return seen
