"""Lossless growth: maps per named axis, the plan, its execution across ranks, and its proof."""
