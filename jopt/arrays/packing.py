"""Dense storage of small values: masks at one bit per element.

A boolean array costs a byte per element. Packed along its last axis,

    packed[..., j] = sum_i mask[..., 8 j + i] << i        (little endian)

it costs an eighth, and unpacking is a shift that XLA fuses into whatever uses the
mask. An array whose last axis 8 does not divide stays boolean: so the dtype alone
says how to read it, and no size has to be remembered beside it.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def pack_mask(mask: ArrayLike) -> jax.Array:
    """Stores a mask at one bit per element where 8 divides its last axis.

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
    if mask.ndim == 0 or mask.size == 0 or mask.shape[-1] % 8:
        return mask
    return jnp.packbits(mask, axis=-1, bitorder="little")


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
