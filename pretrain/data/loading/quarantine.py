"""The record of samples that could not be used, and the limits beyond which a run stops.

A row of `quarantine.jsonl` describes one bad sample: its shard and key, the reason, and the position in the run at
which another sample replaced it. The position is -1 for a validation sample, which is not replaced.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from pretrain.config import FaultBudget
from pretrain.data.loading.loader import VALIDATION_POSITION, BadSample
from pretrain.errors import DataError
from pretrain.journal import Journal

QUARANTINE_FILE = "quarantine.jsonl"
MIN_SAMPLES = 1_000  # the allowed share is always taken of at least this many samples
SHARDS_SHOWN = 5


class Quarantine:
    """The bad samples of a run. All ranks keep the same record, so that they stop together; the main rank writes it.

    Args:
        path: File of the record.
        budget: Limits for bad samples.
        resume_position: Position at which the run resumes; later rows of the file are removed, since these samples will
            be read again.
        writes: Whether this rank writes the file.
    """

    def __init__(self, path: Path, budget: FaultBudget, resume_position: int, *, writes: bool) -> None:
        self.path = path
        self.budget = budget
        self.journal = Journal(path, lambda row: row["position"] < resume_position, writes=writes)
        self.bad_samples = {_identity(bad): bad for bad in (BadSample(**row) for row in self.journal.kept)}

    def __len__(self) -> int:
        """Return the number of the run's positions that had a bad sample."""
        return len(self._positions())

    def add(self, bad_samples: Iterable[BadSample]) -> None:
        """Record the samples that are new, in the order of the run."""
        new = {_identity(bad): bad for bad in sorted(bad_samples) if _identity(bad) not in self.bad_samples}
        self.bad_samples |= new
        self.journal.add(bad._asdict() for bad in new.values())

    def check(self, num_samples: int) -> None:
        """Compare the record with the limits.

        Args:
            num_samples: Number of samples that the run has read so far.

        Raises:
            DataError: If too many samples were bad, in total or in a row; the message lists the worst shards.
        """
        positions = self._positions()
        allowed = self.budget.max_bad_fraction * max(num_samples, MIN_SAMPLES)
        if len(positions) > allowed:
            share = f"{len(positions)} of {num_samples} samples could not be used, more than data.max_bad_fraction"
            raise DataError(f"{share}={self.budget.max_bad_fraction:g} allows\n{self._report()}")
        if (longest := _longest_run(positions)) > self.budget.max_bad_consecutive:
            row = f"{longest} samples in a row could not be used, more than data.max_bad_consecutive"
            raise DataError(f"{row}={self.budget.max_bad_consecutive} allows\n{self._report()}")

    def _positions(self) -> list[int]:
        return sorted({bad.position for bad in self.bad_samples.values()} - {VALIDATION_POSITION})

    def _report(self) -> str:
        """List the shards with the most bad samples, with an example of each."""
        counts = Counter(bad.shard for bad in self.bad_samples.values())
        examples = {bad.shard: bad for bad in self.bad_samples.values()}
        lines = [
            f"  {count} in {shard}, for example {examples[shard].key}: {examples[shard].reason}"
            for shard, count in counts.most_common(SHARDS_SHOWN)
        ]
        if len(counts) > SHARDS_SHOWN:
            lines.append(f"  and {len(counts) - SHARDS_SHOWN} more shards")
        return "\n".join([*lines, f"{self.path} lists all of them; repair the data, or raise the limit in the config"])


def _identity(bad: BadSample) -> tuple[int, str, str]:
    return bad.position, bad.shard, bad.key


def _longest_run(positions: list[int]) -> int:
    """Return the length of the longest run of consecutive numbers in a sorted list."""
    longest = run = min(len(positions), 1)
    for before, after in pairwise(positions):
        run = run + 1 if after == before + 1 else 1
        longest = max(longest, run)
    return longest
