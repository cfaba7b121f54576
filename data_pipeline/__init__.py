"""From text to pretraining shards, and from shards to batches."""
