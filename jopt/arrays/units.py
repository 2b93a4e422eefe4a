"""Units in which numbers of any magnitude have squares.

Squares of float32 numbers beyond 1.8e19 are infinite, and below 1e-19 zero. In units of
a power of two near the largest, sums of squares are numbers, with the digits that they
have in other units, and their ratios are what they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def unit_of(x: jax.Array) -> jax.Array:
    """Return the power of two just below the largest magnitude.

    2^floor(log2 max |x|), between 2^-126 and 2^126, whose reciprocals are no subnormals

    Args:
        x: float array of any shape.

    Returns:
        A float32 scalar; 1 where x has no numbers but zeros, or NaN or infinity.

    >>> unit_of(jnp.array([0.3, -5.0]))
    Array(4., dtype=float32)
    """
    # In two steps: |x| would be written out first on a CPU.
    largest = jnp.maximum(jnp.max(x, initial=0), -jnp.min(x, initial=0))
    pattern = lax.bitcast_convert_type(largest.astype(jnp.float32), jnp.uint32)
    power = lax.bitcast_convert_type(pattern & np.uint32(0x7F800000), jnp.float32)
    power = jnp.where(jnp.isfinite(power) & (power > 0), power, 1.0)
    return jnp.clip(power, 2.0**-126, 2.0**126)
