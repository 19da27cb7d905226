"""Copy the next batch to the device while the device still computes the step before."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor

from pretrain.data.transforms.batch import Batch


class Prefetcher:
    """Prepares batches on the device on a stream of their own.

    The host runs ahead of a GPU: when it asks for a batch, it has queued the previous step, which the GPU is still
    computing. A copy on the same stream would start after that step and delay the next one. On a stream of its own it
    runs at the same time, so no batch has to be requested before it is needed. On a CPU, batches are prepared as usual.
    Not yet run on a GPU.

    Args:
        device: Device that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def prepare(self, work: Callable[[], Batch]) -> Batch:
        """Return the batch that `work` makes, which the current stream uses only once it is complete.

        Args:
            work: Function that queues the copies of a batch from pinned memory, and perhaps the decoding of its images.
        """
        if self._stream is None:
            return work()
        current = torch.cuda.current_stream(self._device)
        with cast(AbstractContextManager[None], torch.cuda.stream(self._stream)):
            batch = work()
        current.wait_stream(self._stream)
        for tensor in _tensors(batch):
            tensor.record_stream(current)  # its memory must not be reused before the current stream is done with it
        return batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    """Yield all tensors of a batch, including those of its crops."""
    for value in batch.values():
        if isinstance(value, dict):
            yield from _tensors(cast(Batch, value))
        else:
            yield cast(Tensor, value)
