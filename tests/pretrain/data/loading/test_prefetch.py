"""Batches are copied on a stream of their own. Streams that record the order of calls take its place without a GPU.

The test with a GPU has not yet been run on one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from pretrain.data.loading.loader import BadSample, LoadedBatch, LoadingStats
from pretrain.data.loading.prefetch import Prefetcher
from pretrain.data.transforms.batch import Batch


def crops() -> Batch:
    """Return a batch with tensors on two levels, as self-distillation has them."""
    crops = {"image": torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), "flip": torch.zeros(2, 2)}
    return cast(Batch, {"position": torch.arange(2), "global_crops": crops})


class Stream:
    """A stream that adds to a list what is asked of it."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls

    def wait_stream(self, other: "Stream") -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace torch's streams; return the list of what is asked of them."""
    calls: list[str] = []
    compute = Stream("compute", calls)

    @contextmanager
    def switched(stream: Stream) -> Iterator[None]:
        calls.append(f"begin {stream.name}")
        yield
        calls.append(f"end {stream.name}")

    monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream("side", calls))
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: compute)
    monkeypatch.setattr("torch.cuda.stream", switched)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: calls.append(f"keep {tensor.numel()} for {stream.name}")
    )
    return calls


def test_a_batch_is_made_on_the_side_stream_and_kept_for_the_compute_stream(calls: list[str]) -> None:
    batch = crops()

    def copy() -> Batch:
        calls.append("copy")
        return batch

    assert Prefetcher(torch.device("cuda", 0)).prepare(copy) is batch
    assert calls == [
        "begin side",
        "copy",
        "end side",
        "compute waits for side",
        "keep 2 for compute",
        "keep 768 for compute",
        "keep 4 for compute",
    ]


def test_on_a_cpu_no_stream_is_used(calls: list[str]) -> None:
    batch = crops()
    assert Prefetcher(torch.device("cpu")).prepare(lambda: batch) is batch
    assert not calls


def copies_on_a_stream_keep_their_values(device: torch.device, busy: Callable[[], object]) -> bool:
    """Copy batches while the device computes, use each, and free it; return whether all values arrived."""
    prefetcher, sums = Prefetcher(device), []
    batches = [torch.full((1024, 1024), number, dtype=torch.uint8) for number in range(20)]
    for host in batches:
        pinned = host.pin_memory() if device.type == "cuda" else host
        batch = prefetcher.prepare(lambda pinned=pinned: {"image": pinned.to(device, non_blocking=True)})
        busy()
        sums.append(batch["image"].sum())  # queued after the work, when the next copy may reuse the memory
        del batch
    return [int(total) for total in sums] == [number * 1024**2 for number in range(20)]


def test_copies_keep_their_values_on_a_cpu() -> None:
    assert copies_on_a_stream_keep_their_values(torch.device("cpu"), lambda: None)


@pytest.mark.gpu
def test_copies_beside_a_busy_gpu_keep_their_values() -> None:
    busy = partial(torch.cuda._sleep, 20_000_000)
    assert copies_on_a_stream_keep_their_values(torch.device("cuda", 0), busy)


def test_every_tensor_of_a_loaded_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unpinned tensor would be copied while the host waits. torch looks for them in the types that it knows."""
    pinned: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, device=None: pinned.append(tensor) or tensor)
    loaded = LoadedBatch(crops(), 1.0, [BadSample(0, "shard", "key", "damaged")], LoadingStats(), 0.0, [("a", "b")])
    again = pin_memory(loaded)
    assert len(pinned) == 3
    assert type(again) is LoadedBatch
    assert again._replace(tensors=loaded.tensors) == loaded
