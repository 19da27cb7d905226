"""Labeled images by (shard, row), and the order in which they are visited."""
