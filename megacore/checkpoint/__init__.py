"""Sharded checkpoints: virtual global tensors over safetensors files and one manifest."""
