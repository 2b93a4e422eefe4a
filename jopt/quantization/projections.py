"""From float weights to a grid gradually: softness 1 is the latent, 0 the grid.

    binary_relax   w = s u + (1 - s) q
    parq           w = clip(m + (u - m) / s, below, above),   m = (below + above) / 2

with u the latent, s the softness, q the nearest level, and `below` and `above` the
levels around u. BinaryRelax is the proximal map of a growing multiple of the squared
distance to the grid; PARQ that of a convex, piecewise-affine penalty, whose pieces are
flat at levels and steep between them: what is close to a level lies on it early.

    softness = jopt.schedules.sigmoid_softness(begin_step=100, end_step=1000)
    jopt.quantize_weights(inner, spec, projection=jopt.projections.parq(softness))

From the count on at which s is 0, params lie on the grid exactly.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays.arguments import check_share
from jopt.arrays.rounding import down, up
from jopt.quantization.grids import Grid, GridProjection, as_grid_projection
from jopt.quantization.oscillations import (
    freeze_oscillations as freeze_oscillations,
)


def binary_relax(softness: float | optax.Schedule) -> GridProjection:
    """Mix latents with their nearest levels.

    w = s u + (1 - s) q;   with lambda = 1 / s - 1,  w = (u + lambda q) / (1 + lambda)

    Args:
        softness: s in [0, 1], a number or a schedule count -> s that ends at 0, such as
            `optax.linear_schedule(1.0, 0.0, 1000)`; what lies outside is clipped.

    Returns:
        For `jopt.quantize_weights(..., projection=...)`.

    Raises:
        TypeError: `softness` is neither a number nor a schedule.
        ValueError: a number is not in [0, 1].

    References:
        Yin et al., BinaryRelax, arXiv:1801.06313.

    >>> import optax, jopt
    >>> int2 = jopt.QuantSpec(jopt.formats.int2)
    >>> half = binary_relax(0.5)
    >>> tx = jopt.quantize_weights(optax.sgd(0.1), int2, projection=half)
    >>> params = {"w": jnp.array([[1.0], [0.75], [0.25]])}
    >>> updates, _ = tx.update({"w": jnp.zeros((3, 1))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].ravel()
    Array([1.   , 0.875, 0.125], dtype=float32)
    """

    def land(u: jax.Array, grid: Grid, count: Any) -> jax.Array:
        s, q = _value(softness, count), grid.snap(u)
        wide, level = u.astype(jnp.float32), q.astype(jnp.float32)
        mixed = (s * wide + (1.0 - s) * level).astype(u.dtype)
        # Zeros that a mask made stay zeros, and s=0 is the grid to the last bit.
        return jnp.where(s > 0, mixed, q)

    _check(softness)
    return as_grid_projection(land)


def parq(softness: float | optax.Schedule) -> GridProjection:
    """Pull latents to their levels by a piecewise-affine map that steepens.

    w = clip(m + (u - m) / s, below, above)

    Args:
        softness: s in [0, 1], the inverse of the slope between levels, a number or a
            schedule count -> s that ends at 0, such as
            `jopt.schedules.sigmoid_softness`; what lies outside is clipped.

    Returns:
        For `jopt.quantize_weights(..., projection=...)`.

    Raises:
        TypeError: `softness` is neither a number nor a schedule.
        ValueError: a number is not in [0, 1].

    References:
        Jin et al., PARQ: Piecewise-Affine Regularized Quantization, arXiv:2503.15748.

    >>> import optax, jopt
    >>> tx = jopt.quantize_weights(
    ...     optax.sgd(0.1), jopt.QuantSpec(jopt.formats.int2), projection=parq(0.5)
    ... )
    >>> params = {"w": jnp.array([[1.0], [0.625], [0.25]])}
    >>> updates, _ = tx.update({"w": jnp.zeros((3, 1))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].ravel()
    Array([1.  , 0.75, 0.  ], dtype=float32)
    """

    def land(u: jax.Array, grid: Grid, count: Any) -> jax.Array:
        s = _value(softness, count)
        # Levels fall as values rise where a full range has a scale below zero.
        one, other = (grid.snap(u, rounding=r).astype(jnp.float32) for r in (down, up))
        below, above = jnp.minimum(one, other), jnp.maximum(one, other)
        middle = below + (above - below) / 2
        steep = middle + (u.astype(jnp.float32) - middle) / jnp.where(s > 0, s, 1.0)
        mixed = jnp.clip(steep, below, above).astype(u.dtype)
        return jnp.where(s > 0, mixed, grid.snap(u))

    _check(softness)
    return as_grid_projection(land)


def _value(softness: float | optax.Schedule, count: Any) -> jax.Array:
    value = softness(count) if callable(softness) else softness
    return jnp.clip(jnp.asarray(value, jnp.float32), 0.0, 1.0)


def _check(softness: Any) -> None:
    if not callable(softness):
        check_share("softness", softness, "1 is the latent, 0 the grid")
