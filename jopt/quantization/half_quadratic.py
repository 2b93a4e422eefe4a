"""Scales and zero points that fit weights in a norm which large errors do not rule.

    minimise ||W - Q||_p^p,   Q = s (codes - z),   p < 1

By half-quadratic splitting an error E of its own is put beside Q: in turns

    E = shrink(W - Q),         shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    s = <L, W - E> / <L, L>,   L the levels of Q, per group
    z = round(mean(codes - (W - E) / s))                      (asymmetric)

with beta growing by 1 % a turn, from 10 for weights in units of their scale. The best
turn of each group is kept. Badri and Shaji, Half-Quadratic Quantization of Large
Machine Learning Models, 2023; Geman and Reynolds, Constrained Restoration and the
Recovery of Discontinuities, 1992.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays.codes import compute_levels, scale_levels
from jopt.arrays.scales import (
    Scale,
    compute_range,
    compute_scale,
    effective_scale,
    round_scale,
    spread_groups,
    sum_groups,
)
from jopt.arrays.specs import QuantSpec

_BETA, _GROWTH = 10.0, 1.01


@functools.partial(jax.jit, static_argnames=("spec", "norm", "num_steps"))
def fit(weights: jax.Array, spec: QuantSpec, *, norm: float, num_steps: int) -> Scale:
    """Fit the scales of an array.

    Args:
        weights: float, of any shape.
        spec: of an integer format.
        norm: p.
        num_steps: turns.

    Returns:
        The scales, of the shape that the spec asks for.

    >>> from jopt.arrays import formats
    >>> w = jnp.array([[1.0], [2.0], [3.0], [3.2], [30.0]])
    >>> fit(w, QuantSpec(formats.int3), norm=0.7, num_steps=20).scale.shape
    (1, 1)
    """
    w = weights.astype(jnp.float32)
    start = compute_scale(*compute_range(w, spec), spec)
    shape = start.scale.shape

    def rounded(scale: Scale) -> tuple[jax.Array, jax.Array]:
        levels = compute_levels(w, scale, spec)
        return levels, scale_levels(levels, scale, jnp.float32)

    def objective(values: jax.Array) -> jax.Array:
        return sum_groups(jnp.abs(w - values) ** norm, shape)

    def turn(_: jax.Array, carry: Any) -> Any:
        scale, best, least, beta = carry
        levels, values = rounded(scale)
        step = spread_groups(effective_scale(scale), w.shape)
        error = (w - values) / step
        size = jnp.abs(error)
        pull = jnp.where(size > 0, size, 1.0) ** (norm - 1.0) / beta
        stays = jnp.sign(error) * jnp.maximum(size - pull, 0.0) * step
        target = w - stays
        top = sum_groups(levels * target, shape)
        bottom = sum_groups(levels * levels, shape)
        new = jnp.where((bottom > 0) & (top > 0), top / bottom, effective_scale(scale))
        new = round_scale(new, spec.scale_dtype).astype(spec.scale_dtype)
        zero_point = scale.zero_point
        if zero_point is not None:
            zero_point = _zero_point(levels, target, new, zero_point, spec)
        scale = Scale(new, zero_point)
        now = objective(rounded(scale)[1])
        is_better = now < least
        best = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), scale, best)
        return scale, best, jnp.minimum(now, least), beta * _GROWTH

    least = objective(rounded(start)[1])
    carry = (start, start, least, jnp.float32(_BETA))
    return lax.fori_loop(0, num_steps, turn, carry)[1]


def _zero_point(
    levels: jax.Array,
    target: jax.Array,
    scale: jax.Array,
    before: jax.Array,
    spec: QuantSpec,
) -> jax.Array:
    """Fit zero points to codes under scales: the mean of codes less target / scale."""
    shape = scale.shape
    count = levels.size // max(scale.size, 1)
    codes = levels + spread_groups(before.astype(jnp.float32), levels.shape)
    step = spread_groups(scale.astype(jnp.float32), levels.shape)
    fitted = sum_groups(codes - target / step, shape) / count
    lowest = -(2.0 ** (spec.format.bits - 1)) if spec.format.signed else 0.0
    highest = lowest + 2.0**spec.format.bits - 1.0
    return jnp.clip(jnp.round(fitted), lowest, highest).astype(before.dtype)
