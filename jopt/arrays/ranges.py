"""Ranges between which an array is rounded, and the gradients of their ends.

    symmetric    [-high, high],   scale = high / largest level
    asymmetric   [low, high],     scale = (high - low) / (2^bits - 1)

The gradients of the ends are those of LSQ (Esser et al., arXiv:1902.08153) or of PACT
(Choi et al., arXiv:1805.06085), with q the rounded x:

    LSQ    dq/dhigh = (q - x) / high inside the range, 1 above it, -1 below -high,
    PACT   dq/dhigh = 0              inside the range, 1 above it, -1 below -high

LSQ multiplies its gradient by levels^2 / sqrt(features * levels), which is its own
1 / sqrt(features * levels) for a step of the scale.

A step of an optimizer may carry an end through zero, where there is no scale. So the
ends that count are max(|high|, 2^-126) and -|low|: beyond zero a range is mirrored, its
gradient with it, and what has become as small as can be clips all numbers and grows
again as soon as the loss asks for it.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jopt.arrays.quantized import fake_quantize
from jopt.arrays.scales import Scale, compute_scale, highest_level, spread_groups
from jopt.arrays.specs import QuantSpec
from jopt.arrays.straight_through import straight_through

Rule = Literal["learned", "pact"]

_TINY = np.finfo(np.float32).tiny


class Range(NamedTuple):
    """The ends of a range, float32 scalars or of the shape of the scales.

    Attributes:
        high: the upper end.
        low: the lower end; None for `-high`.
    """

    high: jax.Array
    low: jax.Array | None = None


def scale_of(ends: Range, spec: QuantSpec, ndim: int) -> Scale:
    """Compute the scales that a range asks for.

    Args:
        ends: of the range, of any sign: their magnitudes count.
        spec: the format.
        ndim: of the array that is quantized.

    Returns:
        The scales, with `ndim` axes.
    """
    ends = _around_zero(ends)
    low = -ends.high if ends.low is None else ends.low
    scale = compute_scale(low, ends.high, spec)
    if scale.scale.ndim == ndim:
        return scale
    return jax.tree.map(lambda leaf: leaf.reshape((1,) * ndim), scale)


def learned_fake_quantize(
    x: jax.Array, spec: QuantSpec, ends: Range, rule: Rule, num_features: int
) -> jax.Array:
    """Round an array to a range whose ends get gradients.

    Args:
        x: float array.
        spec: the format.
        ends: of the range.
        rule: "learned" for LSQ's gradient, "pact" for PACT's.
        num_features: elements per example, or of the weight: LSQ's normalization.

    Returns:
        What `fake_quantize` with the scales of the range returns, bit for bit.
    """
    scale = lax.stop_gradient(scale_of(ends, spec, x.ndim))
    value = fake_quantize(lax.stop_gradient(x), spec, scale=scale)
    wide = x.astype(jnp.float32)
    levels = highest_level(spec)
    if rule == "learned":
        weight = levels**2 / jnp.sqrt(num_features * levels)
        ends = jax.tree.map(lambda end: _scaled_gradient(end, weight), ends)
    ends = _around_zero(ends)
    high = _like(ends.high, wide)
    low = -high if ends.low is None else _like(ends.low, wide)
    span = high if ends.low is None else high - low
    above, below = wide > high, wide < low
    inside = wide
    if rule == "learned":
        error = value.astype(jnp.float32) - wide
        # Outside, where it is not used, it may overflow, and 0 * inf is a NaN.
        residual = jnp.where(above | below, 0.0, error / span)
        inside = wide + lax.stop_gradient(residual) * span
    surrogate = jnp.where(above, high, jnp.where(below, low, inside))
    return straight_through(value, surrogate.astype(x.dtype))


def _around_zero(ends: Range) -> Range:
    """Return ends on both sides of zero, whose gradients are nowhere zero."""
    # |x| has no gradient at zero, nor a maximum below its floor.
    mirrored = jnp.where(ends.high < 0, -ends.high, ends.high)
    high = straight_through(jnp.maximum(mirrored, _TINY), mirrored)
    low = None if ends.low is None else jnp.where(ends.low > 0, -ends.low, ends.low)
    return Range(high, low)


def _scaled_gradient(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return x with `weight` times its gradient."""
    return straight_through(x, x * lax.stop_gradient(weight))


def _like(end: jax.Array, x: jax.Array) -> jax.Array:
    if end.ndim != x.ndim:
        return end.reshape((1,) * x.ndim)
    return spread_groups(end, x.shape)
