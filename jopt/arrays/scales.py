"""How large a level is: which elements share a scale, their range, and its scale.

Elements that share a scale form a group, with the range [low, high] that contains zero:

    symmetric    scale = max(-low, high) / largest level
    full range   scale = -(low or high, whichever is farther from 0) / 2^(bits - 1)
    asymmetric   scale = (high - low) / (2^bits - 1)
                 zero_point = round(lowest code - low / scale)
    mean         scale = mean |w|                               (ternary, binary)
    mxfp8/4      scale = 2^(floor(log2 max |w|) - exponent of the largest level)
    nvfp4        scale * outer_scale, the outer one for the whole matrix

A scale is rounded to `scale_dtype`. bfloat16 loses nothing that matters (an error of
0.2 % of a level), halves the scales' bytes, and makes `code * scale` exact in float32,
so that a quantized array quantizes to itself. An asymmetric scale is rounded up, so
that both ends of the range stay within half a step of the grid.

No group of ordinary numbers becomes all zeros: a scale is never so small that the
smallest level times it leaves the normal float32 numbers. A group of zeros has scale 1
(mean formats 0); a group with NaN or infinity has scale NaN, so all of it reads NaN.
In nvfp4 alone a group may vanish, if it is 2^19 times smaller than the largest number
of its matrix: the format has no smaller number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jopt.arrays import axes
from jopt.arrays.formats import Format
from jopt.arrays.specs import QuantSpec, group_axis, scale_shape

_TINY = float(np.finfo(np.float32).tiny)
_LARGEST = 2.0**127 * (2 - 2.0**-7)  # of bfloat16
_E4M3_SMALLEST, _E4M3_LARGEST = 2.0**-6, 448.0


class Scale(NamedTuple):
    """What turns levels into numbers; each of the array's rank, sizes divide its."""

    scale: jax.Array
    zero_point: jax.Array | None = None  # asymmetric specs: int8 or uint8, as codes
    outer_scale: jax.Array | None = None  # nvfp4: float32


def reduce_groups(
    x: jax.Array, shape: tuple[int, ...], reduce: Callable[..., jax.Array]
) -> jax.Array:
    """Reduce an array to the shape of its scales.

    Args:
        x: an array.
        shape: as many sizes as `x` has, each dividing its.
        reduce: `reduce(x, axis=axes)`, such as `jnp.max`.

    Returns:
        The reduced array, of the given shape.
    """
    sizes = list(zip(x.shape, shape, strict=True))
    for axis in reversed(range(x.ndim)):
        size, kept = sizes[axis]
        if kept not in (1, size):
            x = axes.split_axis(x, axis, size // kept)
    reduced: list[int] = []
    gone: list[int] = []
    place = 0  # of the axis in the split array
    for axis, (size, kept) in enumerate(sizes):
        if kept not in (1, size):
            place += 1
            reduced.append(place)
        elif size != kept:
            reduced.append(place)
            gone.append(axis)
        place += 1
    return jnp.expand_dims(reduce(x, axis=tuple(reduced)), gone)


def sum_groups(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum an array over the elements that share a scale, in float32.

    Args:
        x: an array.
        shape: of the scales.

    Returns:
        float32 sums of the given shape.

    >>> sum_groups(jnp.ones((4, 3)), (2, 1))
    Array([[6.],
           [6.]], dtype=float32)
    """
    return reduce_groups(
        x, shape, lambda x, axis: jnp.sum(x, axis=axis, dtype=jnp.float32)
    )


def spread_groups(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat scales until they broadcast with their array.

    Args:
        scale: an array whose sizes divide those of `shape`.
        shape: of the array that the scales belong to.

    Returns:
        An array whose sizes are 1 or those of `shape`.
    """
    for axis, (size, kept) in enumerate(zip(shape, scale.shape, strict=True)):
        if kept in (1, size):
            continue
        scale = axes.repeat(scale, size // kept, axis)
    return scale


def compute_range(
    w: jax.Array, spec: QuantSpec, *, path: str = "w"
) -> tuple[jax.Array, jax.Array]:
    """Return the range of every group, which always contains zero.

    Args:
        w: float array of any shape.
        spec: which elements make a group.
        path: what errors call the array.

    Returns:
        (low, high), float32 of `scale_shape(w.shape, spec)`: the smallest and largest
        element or zero; for ternary and binary minus and plus the mean magnitude.

    Raises:
        ValueError: the spec does not fit the shape.

    >>> from jopt.arrays import formats
    >>> w = jnp.array([[1.0, 2.0], [-3.0, 0.5]])
    >>> low, high = compute_range(w, QuantSpec(formats.int8))
    >>> low.tolist(), high.tolist()
    ([[-3.0, 0.0]], [[1.0, 2.0]])
    """
    shape = scale_shape(w.shape, spec, path=path)
    # Two reductions that read w itself: |w| would be written out first on a CPU.
    low = reduce_groups(w, shape, lambda x, axis: jnp.min(x, axis=axis, initial=0))
    high = reduce_groups(w, shape, lambda x, axis: jnp.max(x, axis=axis, initial=0))
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    if spec.format.scale_rule == "mean":
        high = _mean_magnitude(w, jnp.maximum(-low, high))
        low = -high
    return low, high


def _mean_magnitude(w: jax.Array, absmax: jax.Array) -> jax.Array:
    """Return mean |w|, or the magnitude of a group that has one and zeros only.

    So what is ternary already keeps its scale, also where weights that an update moved
    there missed by some ulps of their dtype. Shares r = |w| / max |w| neither overflow
    nor underflow in a sum.
    """
    largest = spread_groups(absmax, w.shape)
    share = quotient(jnp.abs(w.astype(jnp.float32)), largest)
    count = max(w.size // max(absmax.size, 1), 1)
    mean = sum_groups(share, absmax.shape) / count
    off = jnp.minimum(share, 1.0 - share)
    off = reduce_groups(
        off, absmax.shape, lambda x, axis: jnp.max(x, axis=axis, initial=0)
    )
    # The stub of `jnp.finfo`, which knows bfloat16, has no types.
    finfo: Any = jnp.finfo
    eps = max(float(finfo(dtype).eps) for dtype in (w.dtype, jnp.float32))
    is_on_grid = off <= 8 * eps
    return jnp.where(is_on_grid, absmax, jnp.maximum(absmax * mean, _TINY))


def compute_scale(
    low: jax.Array, high: jax.Array, spec: QuantSpec, *, bits: ArrayLike | None = None
) -> Scale:
    """Return the scales of groups with the given ranges.

    Args:
        low: lower ends of the ranges, float32 of the shape of the scales.
        high: upper ends.
        spec: the format and the dtype of scales.
        bits: a width that replaces that of an integer format, 2 to 16 (asymmetric: 2 to
            8); it may be traced, and is rounded to a whole number.

    Returns:
        The scales, see the module; zero points where the spec is asymmetric, outer
        scales for nvfp4.

    Raises:
        ValueError: `bits` is out of range, or the format has no width to replace.

    >>> from jopt.arrays import formats
    >>> spec = QuantSpec(formats.int4)
    >>> compute_scale(jnp.array([-7.0]), jnp.array([3.5]), spec).scale
    Array([1], dtype=bfloat16)
    """
    if not spec.symmetric:
        return _asymmetric_scale(low, high, spec, bits)
    absmax = jnp.maximum(-low, high).astype(jnp.float32)
    if spec.scale_dtype == jnp.float8_e8m0fnu:
        return Scale(_power_of_two_scale(absmax, spec.format))
    if spec.scale_dtype == jnp.float8_e4m3fn:
        return _two_level_scale(absmax, spec)
    top = highest_level(spec, bits) + (not spec.is_narrow)
    if spec.format.scale_rule == "mean":
        scale = jnp.minimum(absmax, _LARGEST)
    else:
        scale = jnp.where(absmax == 0, 1.0, quotient(absmax, top))
        largest = _masked(_LARGEST / top, 0xFFFF0000)  # a bfloat16, rounded down
        scale = jnp.clip(scale, smallest_scale(spec.format), largest)
    rounded = round_scale(scale, spec.scale_dtype)
    if bits is not None:  # rounded down, 10 bits and more would not reach the ends
        above = _round_up(scale, spec.scale_dtype)
        rounded = jnp.where(top < 2**9 - 1, rounded, above)
    if not spec.is_narrow:  # the lowest code is for the end that is farther out
        rounded = jnp.where(high > -low, -rounded, rounded)
    return Scale(_or_nan(rounded, absmax).astype(spec.scale_dtype))


def highest_level(spec: QuantSpec, bits: ArrayLike | None = None) -> jax.Array:
    """Return how many levels a range spans: from 0 up, asymmetric from the lowest up.

    Args:
        spec: the spec.
        bits: as in `compute_scale`.

    Returns:
        A float32 scalar: 127 for int8, 255 for asymmetric int8 and uint8.

    Raises:
        ValueError: `bits` is out of range, or the format has no width to replace.
    """
    if bits is None:
        if spec.format.kind == "integer":
            levels = 2.0**spec.format.bits - 1
            return jnp.float32(spec.format.max_value if spec.symmetric else levels)
        return jnp.float32(spec.format.max_value)
    widest = 16 if spec.symmetric else 8
    if spec.format.kind != "integer":
        raise ValueError(
            f"bits must be None for {spec.format}, which is no integer format, got "
            f"{bits}: its width is fixed"
        )
    if isinstance(bits, int | float | np.generic) and not 2 <= bits <= widest:
        raise ValueError(f"bits must be in 2 to {widest} for {spec}, got {bits}")
    width = jnp.clip(jnp.round(jnp.asarray(bits)).astype(jnp.int32), 2, widest)
    span = (1 << (width - 1)) - 1 if spec.symmetric else (1 << width) - 1
    return span.astype(jnp.float32)


def lowest_code(spec: QuantSpec, top: jax.Array) -> jax.Array:
    """Return the lowest code of a spec whose range spans `top` levels."""
    if spec.symmetric:
        return -top if spec.is_narrow else -(top + 1)
    return -(top + 1) / 2 if spec.format.signed else jnp.zeros_like(top)


def effective_scale(scale: Scale) -> jax.Array:
    """Return scale times outer scale in float32, what one level is worth.

    Args:
        scale: of an array.

    Returns:
        float32 of the shape of `scale.scale`.
    """
    # Rounded again, because compilers may drop a narrow dtype between two wide ones.
    step = round_scale(scale.scale.astype(jnp.float32), scale.scale.dtype)
    return step if scale.outer_scale is None else step * scale.outer_scale


def round_scale(scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round float32 scales to what `dtype` can hold, as float32."""
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(scale, 8, 7)
    return scale


def _round_up(scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the next scale up, or the same, that `dtype` can hold."""
    if dtype == jnp.bfloat16:
        return _masked(scale, 0xFFFF0000, add=0xFFFF)
    return scale


def quotient(x: jax.Array, divisor: ArrayLike) -> jax.Array:
    """Return x / divisor, rounded once; 0 where x is 0, whatever the divisor.

    Compilers turn a division by a constant or by a broadcast array into a product with
    the reciprocal, which is rounded twice and is zero for divisors beyond 2^126. A
    divisor that depends on every element is left alone.
    """
    return x / jnp.where(x == 0, 1.0, divisor)


def _or_nan(scale: jax.Array, range_end: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(range_end), scale, jnp.nan)


def _masked(x: jax.Array, mask: int, *, add: int = 0) -> jax.Array:
    """Return float32 x with some bits of its pattern only, such as its power of two."""
    pattern = lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(add)
    return lax.bitcast_convert_type(pattern & np.uint32(mask), jnp.float32)


def smallest_scale(format: Format) -> float:
    """The power of two at which the smallest level is still a normal float32."""
    return _TINY * 2.0 ** float(np.ceil(-np.log2(format.min_value)))


def _asymmetric_scale(
    low: jax.Array, high: jax.Array, spec: QuantSpec, bits: ArrayLike | None
) -> Scale:
    top = highest_level(spec, bits)
    low = jnp.minimum(low, 0.0).astype(jnp.float32)
    high = jnp.maximum(high, 0.0).astype(jnp.float32)
    is_zero = (low == 0) & (high == 0)
    scale = jnp.where(is_zero, 1.0, quotient(high, top) - quotient(low, top))
    scale = jnp.clip(scale, _TINY, _LARGEST)
    scale = _or_nan(_round_up(scale, spec.scale_dtype), high - low)
    lowest = lowest_code(spec, top)
    zero_point = jnp.clip(jnp.round(lowest - low / scale), lowest, lowest + top)
    zero_point = jnp.where(jnp.isnan(scale), 0.0, zero_point)
    return Scale(
        scale.astype(spec.scale_dtype), zero_point.astype(spec.format.code_dtype)
    )


def _power_of_two_scale(absmax: jax.Array, format: Format) -> jax.Array:
    """OCP MX: the exponent of the largest magnitude less that of the largest level.

    What lies between the largest level and the next power of two is clipped.
    """
    largest_exponent = int(np.floor(np.log2(format.max_value)))
    power = _masked(absmax, 0x7F800000)
    power = jnp.maximum(power, smallest_scale(format) * 2.0**largest_exponent)
    scale = jnp.where(absmax == 0, 1.0, power * np.float32(2.0**-largest_exponent))
    return _or_nan(scale, absmax).astype(jnp.float8_e8m0fnu)


def _two_level_scale(absmax: jax.Array, spec: QuantSpec) -> Scale:
    """NVFP4: e4m3 scales per group, in units of a float32 scale per matrix.

    The outer scale takes the largest number of the matrix to the largest level times
    the largest scale. It is rounded to 8 bits of mantissa, which makes products of
    level, scale and outer scale exact. Leading axes keep outer scales of their own.
    """
    format, ndim = spec.format, absmax.ndim
    along = ndim + (group_axis(ndim, spec) or -1)
    matrix = tuple(range(min(along, max(ndim - 2, 0)), ndim))
    largest = jnp.max(absmax, axis=matrix, keepdims=True, initial=0)
    outer = quotient(largest, format.max_value * _E4M3_LARGEST)
    outer = jnp.where(largest == 0, 1.0, outer)
    smallest = smallest_scale(format) / _E4M3_SMALLEST
    outer = lax.reduce_precision(jnp.maximum(outer, smallest), 8, 7)
    outer = _or_nan(outer, largest)
    scale = quotient(quotient(absmax, outer), format.max_value)
    scale = jnp.clip(scale, _E4M3_SMALLEST, _E4M3_LARGEST)
    scale = jnp.where(absmax == 0, 1.0, scale)
    step = _masked(scale, 0x7F800000) * np.float32(2.0**-3)
    scale = jnp.round(scale / step) * step  # e4m3, by hand: see effective_scale
    scale = _or_nan(scale, absmax)
    return Scale(scale.astype(jnp.float8_e4m3fn), None, outer)
