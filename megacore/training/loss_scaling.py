"""fp16's dynamic loss scale, which DeepSpeed keeps: read for a checkpoint, and set from one."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megacore.checkpoint.manifest import LossScaling
from megacore.errors import MegacoreError


def read_loss_scaling(optimizer: Any) -> LossScaling | None:
    """Return where the loss scale of a DeepSpeed optimizer stands; ``None`` where it is constant."""
    scaler = optimizer.loss_scaler
    if not isinstance(scaler, DynamicLossScaler):
        return None
    return LossScaling(
        scale=scaler.cur_scale,
        step=scaler.cur_iter,
        last_overflow=scaler.last_overflow_iter,
        hysteresis=scaler.cur_hysteresis,
    )


def set_loss_scaling(optimizer: Any, saved: LossScaling | None) -> None:
    """Go on from where a checkpoint's loss scale stood."""
    scaler = optimizer.loss_scaler
    if saved is not None and isinstance(scaler, DynamicLossScaler):
        scaler.cur_scale, scaler.cur_iter = saved.scale, saved.step
        scaler.last_overflow_iter, scaler.cur_hysteresis = saved.last_overflow, saved.hysteresis


def check_loss_scale(optimizer: Any, step: int) -> None:
    """Refuse to go on where overflows have brought the scale down to its least.

    Raises:
        MegacoreError: naming what to do.
    """
    scaler = optimizer.loss_scaler
    if isinstance(scaler, DynamicLossScaler) and scaler.cur_scale <= scaler.min_scale:
        raise MegacoreError(
            f"step {step}: fp16 gradients overflow down to the least scale, {scaler.min_scale}; training diverged: "
            "lower learning_rate, raise warmup_steps or set dtype=bf16, and run again to go on from the last checkpoint"
        )
