"""One unit: a dataset shard through all teachers."""
