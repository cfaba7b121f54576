"""How far apart the logits of two models may be that are to compute the same, relative to the largest logit.

Two things make exactly equal functions differ: the arithmetic, which sums in another order, and the rounding of the
grown weights to the type in which they are stored. A type with unit roundoff u (half its spacing at one) puts a
relative error of at most u on each number that is rounded. These errors are independent and of both signs; a sublayer
passes on those of the sublayers before and adds its own, so they add up as the root of the number of sublayers. With
the factor 8 all families stay a factor of two or more below the limit (measured on small trained models, where errors
average out least), and a mistake in a growth rule, which changes weights by percents at least, stays far above it in
every type but bfloat16, where it has to be larger than that type's own error.

Weights that growth only repeats and halves (even copies by powers of two), or that it splits so that the parts sum up
exactly, are not rounded: then the arithmetic's limit holds in bfloat16, too.
"""

from __future__ import annotations

import math

from megacore.model_config import ModelConfig

_UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}
_ARITHMETIC = {"float64": 1e-12, "float32": 1e-5}
_GATES = 1e-6
"""DeepSpeed computes the gates of a mixture of experts in float32, whatever the type of the rest."""
_FACTOR = 8.0


def tolerance(arithmetic: str, model: ModelConfig, stored: str | None) -> float:
    """Return the largest relative difference of logits that two equal functions may have.

    Args:
        arithmetic: the type in which both are computed.
        model: the configuration of the larger one.
        stored: the type to which the weights of one of them were rounded; ``None`` if none were.
    """
    # In bfloat16 what is computed is rounded as weights are, at both ends of each product.
    limits = [_ARITHMETIC.get(arithmetic) or 2 * _rounding(arithmetic, model)]
    if stored is not None:
        limits.append(_rounding(stored, model))
    if model.num_experts:
        limits.append(_GATES)
    return max(limits)


def _rounding(dtype: str, model: ModelConfig) -> float:
    sublayers = 2 * model.layers_of("encoder") + 2 * model.layers_of("decoder")
    if model.architecture == "encoder_decoder":
        sublayers += model.layers_of("decoder")
    return _FACTOR * _UNIT_ROUNDOFF[dtype] * math.sqrt(sublayers + 1)
