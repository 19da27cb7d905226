"""Data errors reach the user as one message, even from a worker process of the loader."""

from functools import partial

import pytest
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from pretrain.data.storage.remote import StalledFetchError
from pretrain.errors import DataError
from pretrain.outcome import Outcome, outcome_of

SENTENCE = "a.tar: 3 samples could not be used\n  2 such as k: OSError: broken: truly"


class Broken(TorchDataset[int]):
    def __init__(self, error: type[DataError]) -> None:
        self.error = error

    def __getitem__(self, index: int) -> int:
        raise self.error(SENTENCE)


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("error", "outcome"), [(DataError, Outcome.USER_ERROR), (StalledFetchError, Outcome.FAILED)])
def test_error_from_a_loader_worker_keeps_its_message(
    error: type[DataError], outcome: Outcome, num_workers: int
) -> None:
    load = partial(next, iter(DataLoader(Broken(error), sampler=[0], num_workers=num_workers)))
    with pytest.raises(error) as caught:
        load()
    assert caught.value.summary == SENTENCE
    assert outcome_of(caught.value) is outcome  # the user cannot fix a stalled host
