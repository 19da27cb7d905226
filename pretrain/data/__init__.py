"""From images to shards, from shards to batches: every sample once per epoch, on any number of ranks."""
