"""Find keys that stand twice in a set, eight bytes a sample, so that a billion samples fit into memory."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.uint64]
Place = tuple[int, int]  # shard, row


def digest_keys(keys: Sequence[str]) -> Digests:
    """Return 64 bits of each key's BLAKE2b."""
    data = b"".join(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest() for key in keys)
    return np.frombuffer(data, np.uint64)


def find_repeated(shards: Sequence[Digests]) -> list[tuple[Place, Place]]:
    """Return the places of digests that stood before, each with its first place; in the order of the places.

    Two keys have the same digest by chance once in 2^64; the caller, who has the keys, compares them.
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

    def place(position: int) -> Place:
        shard = int(np.searchsorted(ends, position, side="right"))
        return shard, position - int(ends[shard] - len(shards[shard]))

    return [(place(later), place(earlier)) for later, earlier in repeated]
