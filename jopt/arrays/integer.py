"""Products of int8 codes in int32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def integer_dot(x: jax.Array, w: jax.Array, dimension_numbers: Any) -> jax.Array:
    """Multiply int8 codes as `lax.dot_general` does, into int32."""
    return lax.dot_general(x, w, dimension_numbers, preferred_element_type=jnp.int32)


def integer_conv(x: jax.Array, w: jax.Array, **params: Any) -> jax.Array:
    """Convolve int8 codes as `lax.conv_general_dilated` does, into int32."""
    return lax.conv_general_dilated(x, w, preferred_element_type=jnp.int32, **params)
