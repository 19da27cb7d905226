"""Index local tars that have no index before a run opens them."""

import sys
from collections.abc import Callable, Sequence

from pretrain import distributed
from pretrain.config import SourceConfig
from pretrain.data.shards.first_use import index_tars, tars_without_index
from pretrain.tracking.progress import Advance, progress_bar


def index_new_tars(
    config: SourceConfig,
    *data: str | Sequence[str] | None,
    labels_required: bool,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Index local tars that have no index yet, with a progress bar on rank 0 (collective).

    Rank 0 indexes while the other ranks wait. Afterwards, the first rank of each machine that still does not see an
    index, because the tars or the cache folder are on a local disk, writes its own.

    Args:
        config: Section with the cache folder, which holds the index of read-only tars.
        data: Paths or URLs of training and validation data; anything but local tars is skipped.
        labels_required: Whether every sample must have a label. Otherwise labels are read only if some of the first
            samples have one.
        on_progress: Function called on every rank after each tar.
    """
    paths = [path for each in data if each for path in ([each] if isinstance(each, str) else each)]

    def index(report_progress: Callable[[], None]) -> None:
        for tars in tars_without_index(paths, config.cache_dir):
            with progress_bar(f"indexing {tars.folder.name}", None, "tars") as advance:

                def show_and_report(amount: int, total: int, advance: Advance = advance) -> None:
                    advance(amount, total)
                    report_progress()

                notes = index_tars(tars, config.cache_dir, labels_required=labels_required, progress=show_and_report)
            for note in notes:
                print(note, file=sys.stderr, flush=True)

    distributed.while_others_wait(index if distributed.is_main() else None, on_progress)
    distributed.while_others_wait(index if distributed.local_rank() == 0 else None, on_progress)
