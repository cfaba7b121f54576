"""Checkpoints to and from other layouts and other programs' formats."""
