"""Bytes on disk or far away: the index, tar archives, local and remote reads, the cache."""
