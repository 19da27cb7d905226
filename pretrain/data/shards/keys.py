"""Find sample keys that occur twice in a set, using 8 bytes per sample, so that a billion samples fit into memory."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.uint64]
ShardRow = tuple[int, int]  # shard, row


def digest_keys(keys: Sequence[str]) -> Digests:
    """Return 64 bits of each key's BLAKE2b digest [N]."""
    data = b"".join(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest() for key in keys)
    return np.frombuffer(data, np.uint64)


def find_repeated(shards: Sequence[Digests]) -> list[tuple[ShardRow, ShardRow]]:
    """Return the location of each repeated digest and that of its first occurrence, ordered by location.

    Two different keys share a digest with a probability of 2^-64; a caller that has the keys can compare them.

    Args:
        shards: Digests of the keys of each shard.
    """
    if not shards:
        return []
    digests = np.concatenate(shards)
    order = np.argsort(digests, kind="stable")
    is_new = np.ones(len(order), bool)
    is_new[1:] = digests[order[1:]] != digests[order[:-1]]
    first = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    repeated = sorted(zip(order[~is_new].tolist(), first[~is_new].tolist(), strict=True))
    ends = np.cumsum([len(shard) for shard in shards])

    def location(position: int) -> ShardRow:
        shard = int(np.searchsorted(ends, position, side="right"))
        return shard, position - int(ends[shard] - len(shards[shard]))

    return [(location(later), location(earlier)) for later, earlier in repeated]
