"""File to shard to passages: inputs, formats and the deterministic plan of shards."""
