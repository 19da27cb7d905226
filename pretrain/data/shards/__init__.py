"""Create and inspect shard sets: the work behind `vitrail shards`."""
