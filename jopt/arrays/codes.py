"""From numbers to codes under given scales, and back.

    codes = clip(round(w / scale) + zero_point),     w ~ (codes - zero_point) * scale

In between stand *levels*, float32 numbers on the grid of the format without zero point:
codes are levels written down, and rounding to the grid without writing codes is
`scale_levels(compute_levels(w, scale, spec), scale)`. All arithmetic is float32, and
each step is one exact operation or one rounding, so results do not depend on how a
compiler fuses them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jopt.arrays.formats import decode_levels, encode_levels
from jopt.arrays.rounding import Rounding, nearest, round_to_grid
from jopt.arrays.scales import (
    Scale,
    effective_scale,
    highest_level,
    lowest_code,
    quotient,
    round_scale,
    spread_groups,
)
from jopt.arrays.specs import QuantSpec, check_spec, scale_shape


def compute_codes(
    w: ArrayLike,
    scale: Scale,
    spec: QuantSpec,
    *,
    bits: ArrayLike | None = None,
    rounding: Rounding = nearest,
    key: jax.Array | None = None,
) -> jax.Array:
    """Return the codes of an array under given scales.

    codes = clip(round(w / scale) + zero_point)

    Args:
        w: float array of any shape.
        scale: its scales, of the same rank.
        spec: the format.
        bits: a width up to the format's that replaces it, integer formats only; may be
            traced.
        rounding: `nearest`, `stochastic` or a function like them.
        key: a PRNG key, for rules that need one.

    Returns:
        Unpacked codes of `spec.format.code_dtype`, of the shape of `w`.

    >>> from jopt.arrays import formats
    >>> compute_codes(
    ...     jnp.array([1.0, -2.6]), Scale(jnp.ones(1)), QuantSpec(formats.int4)
    ... )
    Array([ 1, -3], dtype=int8)
    """
    if bits is not None:
        if isinstance(bits, int | float | np.generic) and bits > spec.format.bits:
            raise ValueError(
                f"bits must be at most {spec.format.bits} for codes of {spec.format}, "
                f"got {bits}: use a wider format, or fake_quantize, without codes"
            )
        bits = jnp.minimum(bits, spec.format.bits)
    levels = compute_levels(
        jnp.asarray(w), scale, spec, bits=bits, rounding=rounding, key=key
    )
    if scale.zero_point is not None:
        levels += _spread_zero_point(scale.zero_point, levels.shape)
    return encode_levels(levels, spec.format)


def decode(
    codes: jax.Array, scale: Scale, spec: QuantSpec, dtype: Any = jnp.float32
) -> jax.Array:
    """Return the numbers that unpacked codes stand for.

    w = (level(codes) - zero_point) * scale

    Args:
        codes: unpacked codes of `spec.format.code_dtype`.
        scale: their scales.
        spec: the format.
        dtype: of the result.

    Returns:
        An array of the shape of the codes.

    >>> from jopt.arrays import formats
    >>> scale = Scale(jnp.full(1, 0.5))
    >>> decode(jnp.array([1, -3], jnp.int8), scale, QuantSpec(formats.int4))
    Array([ 0.5, -1.5], dtype=float32)
    """
    levels = decode_levels(codes, spec.format)
    if scale.zero_point is not None:
        levels -= _spread_zero_point(scale.zero_point, levels.shape)
    return scale_levels(levels, scale, dtype)


def compute_levels(
    w: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    *,
    bits: ArrayLike | None = None,
    rounding: Rounding = nearest,
    key: jax.Array | None = None,
) -> jax.Array:
    """Return the levels that an array rounds to: codes less the zero point.

    Args:
        w: float array of any shape.
        scale: its scales, of the same rank.
        spec: the format.
        bits: a width that replaces that of an integer format; may be traced.
        rounding: `nearest`, `stochastic` or a function like them.
        key: a PRNG key, for rules that need one.

    Returns:
        float32 levels of the shape of `w`; NaN stays NaN.
    """
    return round_to_grid(
        _in_steps(w, scale),
        spec.format,
        ends=_end_levels(scale, spec, bits, w.shape),
        rounding=rounding,
        key=key,
    )


def scale_levels(levels: jax.Array, scale: Scale, dtype: Any) -> jax.Array:
    """Return levels * scale, rounded once to `dtype`.

    Args:
        levels: float32 levels without zero point.
        scale: their scales.
        dtype: of the result.

    Returns:
        An array of the shape of the levels.
    """
    step = spread_groups(effective_scale(scale), levels.shape)
    return round_to_dtype(levels * step, dtype)


def round_to_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    """Round float32 numbers to a dtype; float16 saturates.

    Args:
        x: float32 numbers.
        dtype: a float dtype.

    Returns:
        The numbers in `dtype`.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16:  # not left to a cast, which compilers may drop
        x = lax.reduce_precision(x, 8, 7)
    if dtype == jnp.float16:  # a level beside its largest number may lie beyond it
        largest = float(np.finfo(np.float16).max)
        x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest))
    return x.astype(dtype)


def is_inside_range(
    w: jax.Array, scale: Scale, spec: QuantSpec, *, bits: ArrayLike | None = None
) -> jax.Array | None:
    """Tell which elements round without being clipped.

    Args:
        w: float array of any shape.
        scale: its scales.
        spec: the format.
        bits: as in `compute_levels`.

    Returns:
        A boolean array of the shape of `w`, False where it is more than half a step
        beyond the last level; None where scales are means and not ranges.
    """
    if spec.format.scale_rule == "mean":
        return None
    ends = _end_levels(scale, spec, bits, w.shape)
    low: ArrayLike
    high: ArrayLike
    low, high = spec.format.clip_range
    if ends is not None:
        low, high = ends[0] - 0.5, ends[1] + 0.5
    x = _in_steps(w, scale)
    return (x >= low) & (x <= high)


def _in_steps(w: jax.Array, scale: Scale) -> jax.Array:
    """Return w / scale."""
    step = spread_groups(effective_scale(scale), w.shape)
    return quotient(w.astype(jnp.float32), step)


def _end_levels(
    scale: Scale, spec: QuantSpec, bits: ArrayLike | None, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array] | None:
    """Return the lowest and highest level of an integer format, None for others."""
    if spec.format.kind != "integer" and bits is None:
        return None
    top = highest_level(spec, bits)
    if scale.zero_point is None:
        return lowest_code(spec, top), top
    low = lowest_code(spec, top) - _spread_zero_point(scale.zero_point, shape)
    return low, low + top


def _spread_zero_point(zero_point: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return spread_groups(zero_point.astype(jnp.float32), shape)


def check_array(w: ArrayLike, spec: QuantSpec, path: str) -> jax.Array:
    """Return `w` as an array, or raise if it cannot be quantized by `spec`."""
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"w must be a float array, got {w.dtype} of shape {w.shape} for {path!r}: "
            "leave it out of the selection"
        )
    check_spec(w.shape, spec, path=path)
    return w


def check_scale(
    scale: Scale | ArrayLike, spec: QuantSpec, shape: tuple[int, ...], path: str
) -> Scale:
    """Return given scales in the spec's dtype, or raise if they do not fit."""
    given = scale if isinstance(scale, Scale) else Scale(jnp.asarray(scale))
    sizes, wanted = jnp.shape(given.scale), scale_shape(shape, spec, path=path)
    if sizes != wanted:
        raise ValueError(
            f"scale must have the shape {wanted} that {spec} asks of {path!r}, whose "
            f"shape is {shape}, got {sizes}: pass scales of the same spec and shape"
        )
    if (given.zero_point is None) != spec.symmetric:
        raise ValueError(
            "scale must carry a zero point where the spec is asymmetric, and only "
            f"there, got {spec} for {path!r}: pass the Scale of compute_scale"
        )
    step = jnp.asarray(given.scale)
    if spec.format.scale_type is not None and step.dtype != spec.scale_dtype:
        raise ValueError(
            f"scale must be {spec.scale_dtype} for {spec.format}, got {step.dtype} for "
            f"{path!r}: pass the Scale that compute_scale returned"
        )
    step = round_scale(step.astype(jnp.float32), spec.scale_dtype)
    return given._replace(scale=step.astype(spec.scale_dtype))
