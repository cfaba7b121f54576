"""The learning rate as a pure function of the step."""

from __future__ import annotations

from megacore.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of a stage's step (counted from zero): linear warm-up, constant, linear decay.

    The constant middle (Hu et al. 2024, warm-up-stable-decay) is what growth wants: a small model stops before its
    decay, and the grown one goes on at the same rate.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    left = config.train_steps - step
    if left <= config.decay_steps:
        return floor + (peak - floor) * left / (config.decay_steps + 1)
    return peak
