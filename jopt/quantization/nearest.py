"""Rounding to nearest, as the others are: one matrix to the grid."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.codes import compute_levels, scale_levels
from jopt.arrays.scales import Scale
from jopt.arrays.specs import QuantSpec
from jopt.quantization.layer_solving import Solved


def round_to_nearest(
    weights: jax.Array,
    prepared: Any,
    squares: jax.Array,
    scale: Scale,
    spec: QuantSpec,
) -> Solved:
    """Round one matrix, whatever is known of its inputs.

    Args:
        weights: [inputs, outputs], float32.
        prepared: of no account.
        squares: of no account.
        scale: fields [groups, outputs].
        spec: of the matrix.

    Returns:
        The weights on the grid, and the scales.
    """
    del prepared, squares
    levels = compute_levels(weights, scale, spec)
    return Solved(scale_levels(levels, scale, jnp.float32), scale)
