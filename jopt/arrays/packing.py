"""Dense storage of small values: masks at one bit, codes at a few bits per element.

A boolean array costs a byte per element. Packed along its last axis,

    packed[..., j] = sum_i mask[..., 8 j + i] << i        (little endian)

it costs an eighth, and unpacking is a shift that XLA fuses into whatever uses the
mask. An array whose last axis 8 does not divide stays boolean: so the dtype alone
says how to read it, and no size has to be remembered beside it.

Codes of 1 to 8 bits form a little-endian bit stream along one axis; their number has to
be remembered, because the last byte may not be full.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jopt.arrays import axes


def pack_mask(mask: ArrayLike) -> jax.Array:
    """Stores a mask at one bit per element where 8 divides its last axis.

    On an explicit mesh, where 8 divides the part of it that a device holds.

    `packed[..., j] = sum_i mask[..., 8 j + i] << i`.

    Args:
      mask: A boolean array `[..., size]`.

    Returns:
      uint8 `[..., size // 8]` where 8 divides `size`; otherwise (and for a scalar
      or an empty mask) the boolean mask itself.

    Raises:
      TypeError: If `mask` is not boolean: packed bytes or numbers are no mask.

    >>> pack_mask(jnp.array([True, False, False, False, False, False, True, True]))
    Array([193], dtype=uint8)
    >>> pack_mask(jnp.array([True, False]))
    Array([ True, False], dtype=bool)
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean, got {mask.dtype}{list(mask.shape)}: compare it "
            "with zero first, or unpack it if it is packed already"
        )
    if mask.ndim == 0 or mask.size == 0:
        return mask
    if mask.shape[-1] // axes.num_parts(mask, -1) % 8:
        return mask
    return jnp.packbits(mask, axis=-1, bitorder="little")


def is_mask_of(mask: jax.Array, shape: tuple[int, ...]) -> bool:
    """Say whether a mask, packed or not, belongs to an array of a shape.

    >>> is_mask_of(jnp.zeros((2, 1), jnp.uint8), (2, 8))
    True
    """
    if mask.dtype == jnp.bool_:
        return mask.shape == shape
    packed = (*mask.shape[:-1], 8 * mask.shape[-1]) if mask.ndim else ()
    return mask.dtype == jnp.uint8 and packed == shape


def require_mask_of(mask: Any, shape: tuple[int, ...], path: str) -> None:
    """Raises for what is no mask of an array of a shape.

    Args:
      mask: What should be a mask, packed or not.
      shape: Of the array.
      path: Of the array, for the error.

    Raises:
      ValueError: If it is none.
    """
    is_array = hasattr(mask, "dtype") and hasattr(mask, "shape")
    if not is_array or not is_mask_of(mask, shape):
        got = f"{mask.dtype}{list(mask.shape)}" if is_array else repr(mask)
        raise ValueError(
            f"masks must fit {path!r} of shape {shape} as bool, or packed as uint8, "
            f"got {got}; compare numbers with zero, or pass what jopt.get_masks or "
            "jopt.make_masks returned"
        )


def unpack_mask(packed: ArrayLike) -> jax.Array:
    """Restores the boolean mask that `pack_mask` stored.

    Args:
      packed: uint8 `[..., size // 8]` or a boolean array.

    Returns:
      The boolean mask `[..., size]`; a boolean argument is returned as it is.

    Raises:
      TypeError: If `packed` is neither uint8 nor boolean.

    >>> unpack_mask(jnp.array([193], jnp.uint8)).astype(int)
    Array([1, 0, 0, 0, 0, 0, 1, 1], dtype=int32)
    """
    packed = jnp.asarray(packed)
    if packed.dtype == jnp.bool_:
        return packed
    if packed.dtype != jnp.uint8:
        raise TypeError(
            f"packed must be uint8 or boolean, got {packed.dtype}{list(packed.shape)}: "
            "pass what pack_mask returned"
        )
    return jnp.unpackbits(packed, axis=-1, bitorder="little").astype(jnp.bool_)


def pack_codes(codes: ArrayLike, bits: int, *, axis: int = -1) -> jax.Array:
    """Stores integer codes of a few bits as one little-endian bit stream per line.

    Along `axis`, code i takes the bits `bits * i` to `bits * (i + 1) - 1`; bit b of the
    stream is bit `b % 8` of byte `b // 8`. Eight codes of 3 bits take 3 bytes. The last
    byte is filled up with zeros.

    Args:
      codes: int8 or uint8 `[..., size, ...]`; of a negative code the lower `bits` bits
        of its two's complement are kept.
      bits: 1 to 8.
      axis: the axis along which codes share bytes.

    Returns:
      uint8 `[..., ceil(size * bits / 8), ...]`.

    Raises:
      TypeError: If codes are not int8 or uint8.
      ValueError: If bits is not in 1 to 8, or codes are a scalar.

    >>> pack_codes(jnp.array([1, -1, 2], jnp.int8), 4)
    Array([241,   2], dtype=uint8)
    """
    codes = jnp.asarray(codes)
    if codes.dtype not in (jnp.int8, jnp.uint8):
        raise TypeError(
            f"codes must be int8 or uint8, got {codes.dtype}{list(codes.shape)}: "
            "convert them to bytes first"
        )
    axis = _check_stream(codes, bits, axis)
    size = codes.shape[axis]
    codes = lax.bitcast_convert_type(codes, jnp.uint8) & np.uint8(2**bits - 1)
    num_codes, num_bytes = _unit(bits)
    codes = axes.split_axis(_fill(codes, axis, num_codes), axis, num_codes)
    parts = [
        lax.index_in_dim(codes, i, axis + 1, keepdims=False) for i in range(num_codes)
    ]
    packed = []
    for byte in range(num_bytes):
        starts = [bits * i - 8 * byte for i in range(num_codes)]
        shared = [
            part << np.uint8(start) if start >= 0 else part >> np.uint8(-start)
            for part, start in zip(parts, starts, strict=True)
            if -bits < start < 8
        ]
        packed.append(functools.reduce(lax.bitwise_or, shared))
    stream = axes.merge_axis(jnp.stack(packed, axis + 1), axis)
    return lax.slice_in_dim(stream, 0, -(-size * bits // 8), axis=axis)


def unpack_codes(
    packed: ArrayLike, bits: int, size: int, *, axis: int = -1, signed: bool
) -> jax.Array:
    """Restores the codes that `pack_codes` stored.

    Args:
      packed: uint8 `[..., ceil(size * bits / 8), ...]`.
      bits: 1 to 8.
      size: how many codes there are along `axis`.
      axis: the axis along which codes share bytes.
      signed: whether the highest bit of a code is its sign.

    Returns:
      int8 (signed) or uint8 codes `[..., size, ...]`.

    Raises:
      TypeError: If packed is not uint8.
      ValueError: If bits is not in 1 to 8, or size does not fit the bytes.

    >>> unpack_codes(jnp.array([241, 2], jnp.uint8), 4, 3, signed=True)
    Array([ 1, -1,  2], dtype=int8)
    """
    packed = jnp.asarray(packed)
    if packed.dtype != jnp.uint8:
        raise TypeError(
            f"packed must be uint8, got {packed.dtype}{list(packed.shape)}: pass what "
            "pack_codes returned"
        )
    axis = _check_stream(packed, bits, axis)
    if packed.shape[axis] != -(-size * bits // 8):
        raise ValueError(
            f"size must fill ceil(size * {bits} / 8) = {packed.shape[axis]} bytes of "
            f"axis {axis}, got {size}: pass the size before packing"
        )
    num_codes, num_bytes = _unit(bits)
    units = axes.split_axis(_fill(packed, axis, num_bytes), axis, num_bytes)
    if num_bytes == 1:  # whole codes in every byte
        lane = [1] * units.ndim
        lane[axis + 1] = num_codes
        shifts = (np.arange(num_codes, dtype=np.uint8) * bits).reshape(lane)
        codes = units >> shifts
    else:
        codes = _codes_across_bytes(units, bits, axis)
    stream = lax.slice_in_dim(axes.merge_axis(codes, axis), 0, size, axis=axis)
    stream = stream & np.uint8(2**bits - 1)
    if not signed:
        return stream
    spare = np.uint8(8 - bits)
    as_int8 = lax.bitcast_convert_type(stream << spare, jnp.int8)
    return as_int8 >> spare.astype(np.int8)  # fills with the sign


def _codes_across_bytes(units: jax.Array, bits: int, axis: int) -> jax.Array:
    """Cuts units of several bytes `[..., num_bytes, ...]` into codes and dirt above."""
    num_codes, num_bytes = _unit(bits)
    parts = [
        lax.index_in_dim(units, i, axis + 1, keepdims=False) for i in range(num_bytes)
    ]
    codes = []
    for i in range(num_codes):
        byte, start = divmod(bits * i, 8)
        code = parts[byte] >> np.uint8(start)
        if start + bits > 8:
            code = code | parts[byte + 1] << np.uint8(8 - start)
        codes.append(code)
    return jnp.stack(codes, axis + 1)


def _unit(bits: int) -> tuple[int, int]:
    """Returns how many codes fill how many bytes exactly."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _check_stream(array: jax.Array, bits: int, axis: int) -> int:
    """Returns the axis counted from the front."""
    if bits not in range(1, 9):
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(
            f"axis must be an axis of the codes, got axis {axis} for shape "
            f"{array.shape}: a scalar has no line of codes to pack"
        )
    return axis % array.ndim


def _fill(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Fills an axis up with zeros to a multiple of a length."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)
