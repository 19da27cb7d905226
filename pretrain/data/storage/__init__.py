"""Bytes of shards, local or remote: the index format, tar reading, range reads, downloads and the node's cache."""
