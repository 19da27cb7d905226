"""The ledger of samples that could not be used, and the budget above which a run stops.

A row of `quarantine.jsonl` is one fault: which sample, why, and at which position of the run another took its place
(-1 in the validation set, where none does).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from pretrain.config import FaultBudget
from pretrain.data.loading.loader import VALIDATION, Fault
from pretrain.errors import DataError
from pretrain.journal import Journal

QUARANTINE_FILE = "quarantine.jsonl"
FEWEST_SAMPLES = 1_000  # a share is not judged on fewer
SHARDS_SHOWN = 5


class Quarantine:
    """Every rank keeps the same ledger, so that all stop together; the main rank writes it.

    Args:
        path: of the ledger.
        budget: how much may be bad.
        resume_position: faults from here on belong to a past that did not last; they are taken out.
        writes: whether this rank writes the file.
    """

    def __init__(self, path: Path, budget: FaultBudget, resume_position: int, *, writes: bool) -> None:
        self.path = path
        self.budget = budget
        self.journal = Journal(path, lambda row: row["position"] < resume_position, writes=writes)
        self.faults = {_identity(fault): fault for fault in (Fault(**row) for row in self.journal.kept)}

    def __len__(self) -> int:
        """Return how many positions of the run had a bad sample."""
        return len(self._positions())

    def add(self, faults: Iterable[Fault]) -> None:
        """Note the faults that are new, in the order of the run."""
        fresh = {_identity(fault): fault for fault in sorted(faults) if _identity(fault) not in self.faults}
        self.faults |= fresh
        self.journal.add(fault._asdict() for fault in fresh.values())

    def check(self, samples: int) -> None:
        """Hold the ledger against the budget, after so many samples of the run.

        Raises:
            DataError: too many were bad, or too many in a row; the sentence is a report.
        """
        positions = self._positions()
        allowed = self.budget.max_bad_fraction * max(samples, FEWEST_SAMPLES)
        if len(positions) > allowed:
            share = f"{len(positions)} of {samples} samples could not be used, more than data.max_bad_fraction"
            raise DataError(f"{share}={self.budget.max_bad_fraction:g} allows\n{self._report()}")
        if (longest := _longest_run(positions)) > self.budget.max_bad_consecutive:
            row = f"{longest} samples in a row could not be used, more than data.max_bad_consecutive"
            raise DataError(f"{row}={self.budget.max_bad_consecutive} allows\n{self._report()}")

    def _positions(self) -> list[int]:
        return sorted({fault.position for fault in self.faults.values()} - {VALIDATION})

    def _report(self) -> str:
        """Say which shards are worst, with an example of each."""
        counts = Counter(fault.shard for fault in self.faults.values())
        examples = {fault.shard: fault for fault in self.faults.values()}
        lines = [
            f"  {count} in {shard}, such as {examples[shard].key}: {examples[shard].reason}"
            for shard, count in counts.most_common(SHARDS_SHOWN)
        ]
        if len(counts) > SHARDS_SHOWN:
            lines.append(f"  and {len(counts) - SHARDS_SHOWN} more shards")
        return "\n".join([*lines, f"all are in {self.path}; mend the data, or allow more in the config"])


def _identity(fault: Fault) -> tuple[int, str, str]:
    return fault.position, fault.shard, fault.key


def _longest_run(positions: list[int]) -> int:
    """Return the length of the longest run of consecutive numbers in a sorted list."""
    longest = run = min(len(positions), 1)
    for before, after in pairwise(positions):
        run = run + 1 if after == before + 1 else 1
        longest = max(longest, run)
    return longest
