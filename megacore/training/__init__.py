"""Training under DeepSpeed: the loop and what it needs."""
