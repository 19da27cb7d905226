"""What `vitrail shards` does, a file for each verb: shards are made, indexed, checked, counted and tried out."""
