"""Fit the data workers of a run to the machine on which its ranks are."""

from collections.abc import Sequence

from pretrain import distributed
from pretrain.data.loading.limits import Data, batch_size_of, fit_workers, machine_limits
from pretrain.data.transforms.views import View


def fit_to_machine(data: Data, views: Sequence[View], micro_batch_size: int) -> Data:
    """Return the `data` section with as many data workers as the machine allows, and print what changed (collective).

    Args:
        data: The `data` section of a run.
        views: View of each loader that is open at the same time.
        micro_batch_size: Images per batch.

    Raises:
        UserError: If a single worker does not fit into /dev/shm and the limit of open files.
    """
    batches = [batch_size_of(view, micro_batch_size) for view in views]
    data, note = distributed.on_all_ranks(
        lambda: fit_workers(data, batches, machine_limits(), distributed.ranks_on_this_machine())
    )
    if note and distributed.is_main():
        print(note, flush=True)
    return data
