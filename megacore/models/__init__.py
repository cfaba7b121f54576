"""Whole models, their losses and what they cost."""
