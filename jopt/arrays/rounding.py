"""To a neighbour on the grid: to the nearest, or up with the fitting probability.

Rounding to any grid is rounding to an integer. Between two neighbouring levels v0 < v1
a number x has the position t = (x - v0) / (v1 - v0), and a rounding rule is a function
`rule(x, key) -> whole numbers` that is given t plus some integer: the number itself on
an integer grid, the number in units of its last bit on a float grid, t in a table.

    nearest      round(x), a half to the even neighbour
    stochastic   floor(x) + 1 with probability x - floor(x): the expectation is x, and a
                 level stays put

So one rule, of a line, serves integer, float and table formats alike.

References:
    Gupta et al., Deep Learning with Limited Numerical Precision, arXiv:1502.02551.
"""

import itertools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jopt.arrays.formats import Format

Rounding: TypeAlias = Callable[[jax.Array, jax.Array | None], jax.Array]


def nearest(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Round to the nearest whole number, a half to the even one.

    Args:
        x: float numbers of any shape.
        key: not used.

    Returns:
        Whole numbers, same shape and dtype.

    >>> nearest(jnp.array([0.5, 1.5, -2.7]))
    Array([ 0.,  2., -3.], dtype=float32)
    """
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def stochastic(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Round up with probability `x - floor(x)`, else down: unbiased.

    Args:
        x: float numbers of any shape.
        key: a PRNG key.

    Returns:
        Whole numbers, same shape and dtype; a whole number stays as it is.

    Raises:
        ValueError: there is no key.

    >>> x = stochastic(jnp.full(10_000, 0.3), jax.random.key(0))
    >>> bool(jnp.abs(x.mean() - 0.3) < 0.02)
    True
    """
    if key is None:
        raise ValueError(
            "key must be a PRNG key for stochastic rounding, got None: pass "
            "key=jax.random.key(seed)"
        )
    below = jnp.floor(x)
    # In few bits the share would be rounded, and uniform numbers be few.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    share = x.astype(wide) - below.astype(wide)
    # Compared, not added: floor(x + uniform) would move 127 for the largest uniforms.
    up = jax.random.uniform(key, x.shape, wide) < share
    return below + up.astype(x.dtype)


def down(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Round to the whole number below: on a grid, to the level below.

    Args:
        x: float numbers of any shape.
        key: not used.

    Returns:
        Whole numbers, same shape and dtype.

    >>> down(jnp.array([0.5, 2.0]))
    Array([0., 2.], dtype=float32)
    """
    return jnp.floor(x)


def up(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Round to the whole number above; see `down`.

    Args:
        x: float numbers of any shape.
        key: not used.

    Returns:
        Whole numbers, same shape and dtype.

    >>> up(jnp.array([0.5, 2.0]))
    Array([1., 2.], dtype=float32)
    """
    return jnp.ceil(x)


def round_to_grid(
    x: jax.Array,
    format: Format,
    *,
    ends: tuple[ArrayLike, ArrayLike] | None = None,
    rounding: Rounding = nearest,
    key: jax.Array | None = None,
) -> jax.Array:
    """Round numbers to the levels of a format; what lies beyond the ends is clipped.

    Args:
        x: float32 numbers in units of the scale, any shape.
        format: the grid.
        ends: the lowest and highest level of an integer format, where they are not the
            format's own; they broadcast with `x`.
        rounding: `nearest`, `stochastic` or any function like them.
        key: a PRNG key, for rules that need one.

    Returns:
        float32 levels of the same shape; NaN stays NaN.

    >>> from jopt.arrays import formats
    >>> round_to_grid(jnp.array([0.7, 2.4, 100.0]), formats.fp4_e2m1)
    Array([0.5, 2. , 6. ], dtype=float32)
    """
    if format.kind == "codebook":
        return _round_to_table(x, format.values, rounding, key)
    if format.kind == "float":
        return _round_to_float(x, format, rounding, key)
    if ends is None:
        ends = -format.max_value if format.signed else 0.0, format.max_value
    low, high = ends
    levels = rounding(jnp.clip(x, low, high), key)
    # Codes have no -0, so levels have none either, whether or not codes are made.
    return jnp.where(levels == 0, 0.0, levels)


def _round_to_float(
    x: jax.Array, format: Format, rounding: Rounding, key: jax.Array | None
) -> jax.Array:
    """Round to multiples of the last mantissa bit, a power of two."""
    x = jnp.clip(x, -format.max_value, format.max_value)
    exponent_field = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000)
    power = lax.bitcast_convert_type(exponent_field, jnp.float32)  # 2^floor(log2 |x|)
    power = jnp.maximum(power, np.float32(2.0**format.min_exponent))
    step = power * np.float32(2.0**-format.mantissa_bits)
    # A number rounded to zero keeps its sign, as float codes do.
    return jnp.copysign(rounding(x / step, key) * step, x)


def _round_to_table(
    x: jax.Array, values: tuple[float, ...], rounding: Rounding, key: jax.Array | None
) -> jax.Array:
    table = np.array(values, np.float32)
    if rounding is nearest:
        middles = table[:-1] + np.diff(table) / 2
        levels = jnp.full_like(x, table[0])
        for middle, value in zip(middles, table[1:], strict=True):
            levels = jnp.where(x >= middle, value, levels)
    else:
        inside = jnp.clip(x, table[0], table[-1])
        below = jnp.full_like(x, table[0])
        above = jnp.full_like(x, table[1])
        for value, after in itertools.pairwise(table[1:]):
            below = jnp.where(inside >= value, value, below)
            above = jnp.where(inside >= value, after, above)
        goes_up = rounding((inside - below) / (above - below), key) > 0
        levels = jnp.where(goes_up, above, below)
    return jnp.where(jnp.isnan(x), x, levels)
