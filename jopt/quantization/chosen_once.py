"""The grid of weights whose codes are chosen once, and stored with their scales.

Training must find the scales again from numbers on the grid, and there one spec serves
weights and inputs, so symmetric integers leave their lowest code unused. Where codes
are chosen once all of them lose less: a fifth to a quarter of the error of int4, two
thirds of that of int2. A leaf that lies on the narrow grid keeps it, since there it
loses nothing: weights that were trained to it, or codes times powers of two.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.codes import compute_levels, scale_levels
from jopt.arrays.scales import compute_range, compute_scale
from jopt.arrays.specs import QuantSpec


def with_all_codes(leaf: jax.Array, spec: QuantSpec) -> QuantSpec:
    """Decide for all codes where a spec leaves it open.

    Args:
        leaf: of floats. Where its values are unknown, inside `jit`, nothing is known to
            be on a grid.
        spec: as a person wrote it, its axes resolved.

    Returns:
        The spec, with `narrow_range=False` where it was None, there are more codes to
        use, and the leaf is not on the narrow grid.

    >>> from jopt.arrays import formats
    >>> with_all_codes(jnp.array([[-8.0], [2.4]]), QuantSpec(formats.int4))
    QuantSpec(int4, narrow_range=False)
    >>> with_all_codes(jnp.array([[7.0], [2.0]]), QuantSpec(formats.int4))
    QuantSpec(int4)
    """
    is_open = spec.narrow_range is None and spec.symmetric
    if not is_open or spec.format.kind != "integer":
        return spec
    if not isinstance(leaf, jax.core.Tracer) and bool(_is_on_grid(leaf, spec)):
        return spec
    return dataclasses.replace(spec, narrow_range=False)


@functools.partial(jax.jit, static_argnums=1)
def _is_on_grid(leaf: jax.Array, spec: QuantSpec) -> jax.Array:
    """Tell whether rounding moves no number by more than an update may miss it by."""
    scale = compute_scale(*compute_range(leaf, spec), spec)
    wide = leaf.astype(jnp.float32)
    values = scale_levels(compute_levels(wide, scale, spec), scale, jnp.float32)
    # The stub of `jnp.finfo`, which knows bfloat16, has no types.
    finfo: Any = jnp.finfo
    eps = max(float(finfo(dtype).eps) for dtype in (leaf.dtype, jnp.float32))
    return jnp.all(jnp.abs(wide - values) <= 2 * eps * jnp.abs(wide))
