"""Train a Transformer small, grow its sharded checkpoint without losing anything, go on training."""
