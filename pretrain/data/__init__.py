"""From images to shards, from shards to batches: every sample once an epoch, on any number of ranks."""
