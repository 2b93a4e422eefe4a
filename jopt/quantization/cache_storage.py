"""What a key-value cache stores of keys, or of values: codes, or floats, and how.

A block is what becomes final at once: a token, or the tokens that share scales. Blocks
are written where a row's next ones belong,

    place = number of full blocks of the row + 0, 1, ...,

by a scatter along the axis of tokens alone, so rows and heads stay on their devices,
and what is not to be stored has a place beyond the end, where a scatter writes nothing.
Tokens that wait for their block to fill are floats, the residual.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jopt.arrays import axes
from jopt.arrays.quantized import QuantizedArray, quantize_array
from jopt.arrays.specs import QuantSpec, check_spec, group_axis, scale_shape

TOKENS = -3  # the axis of [..., tokens, heads, features]
Stored = QuantizedArray | jax.Array


def empty(
    shape: tuple[int, ...], spec: QuantSpec | None, dtype: DTypeLike, name: str
) -> tuple[Stored, jax.Array | None]:
    """Make room for tokens.

    Args:
        shape: `[..., capacity, heads, features]`.
        spec: how tokens are quantized; None for floats.
        dtype: of what is read, and of floats.
        name: what errors call it.

    Returns:
        What is stored, which reads zeros, and the residual of specs whose scales are
        shared by tokens, else None.
    """
    if spec is None:
        return jnp.zeros(shape, dtype), None
    spec = _cache_spec(spec, shape, name)
    # By its parts, because a float array of the shape is what there is no room for.
    like: QuantizedArray = jax.eval_shape(
        lambda: quantize_array(jnp.zeros(shape, dtype), spec, path=name)
    )
    parts: dict[str, Any] = {
        part: jnp.zeros(x.shape, x.dtype)
        for part in ("codes", "scale", "zero_point")
        if (x := getattr(like, part)) is not None
    }
    if like.scale.dtype == jnp.float8_e8m0fnu:  # has no zero, but code 0 is one there
        parts["scale"] = jnp.ones(like.scale.shape, like.scale.dtype)
    if like.outer_scale is not None:
        parts["outer_scale"] = jnp.ones(like.outer_scale.shape)
    stored = dataclasses.replace(like, **parts)
    size = _tokens_per_block(stored)
    if size == 1:
        return stored, None
    return stored, jnp.zeros((*shape[:TOKENS], size, *shape[-2:]), dtype)


def _cache_spec(spec: QuantSpec, shape: tuple[int, ...], name: str) -> QuantSpec:
    """Return the spec with the axes of one array named, or raise if it has no use."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(
            f"spec must be a jopt.QuantSpec or None for floats, got {spec!r} for the "
            f"{name}: jopt.QuantSpec(jopt.formats.int8), for example"
        )
    if not np.isfinite(spec.format.max_error):
        raise ValueError(
            f"spec must have a format with scales from ranges, got {spec.format} for "
            f"the {name}, whose mean scales clip without a bound: use int2, or fp4_e2m1"
        )
    ndim = len(shape)
    per_group = group_axis(ndim, _with_leading_axes(spec, ndim)) == TOKENS
    size = spec.group_size if per_group and spec.group_size else 1
    if shape[TOKENS] % size:
        raise ValueError(
            f"shape must have a capacity in whole groups where tokens share scales, "
            f"got {shape[TOKENS]} tokens and {spec} for the {name}: use a capacity of "
            f"{-(-shape[TOKENS] // size) * size}, or a group_size that divides it"
        )
    if spec.axis is not None:
        check_spec(shape, spec, path=name)
    spec = _with_leading_axes(spec, ndim)
    scales = scale_shape(shape, spec, path=name)
    if scales[TOKENS] == 1 < shape[TOKENS] and (
        not per_group or spec.group_size is None
    ):
        raise ValueError(
            f"spec must keep scales per token, or per group of tokens, got {spec} for "
            f"the {name} of shape {shape}: leave axis out, or give axis=(-2, -1) a "
            "group_size"
        )
    if per_group and spec.format.scale_type == "float8_e4m3fn":
        raise ValueError(
            f"spec must keep scales per token for {spec.format}, whose outer scale "
            f"would be shared by all tokens of the {name}, got {spec}: leave axis out"
        )
    if per_group and (spec.group_size or 1) * spec.format.bits % 8:
        raise ValueError(
            f"group_size must fill whole bytes with the codes of tokens, got {spec} "
            f"for the {name}: use a multiple of 8"
        )
    return spec


def _with_leading_axes(spec: QuantSpec, ndim: int) -> QuantSpec:
    """Name axes from the end, leading ones among them, as many as there are now."""
    kept = (-3, -2) if spec.axis is None else spec.axis
    kept = kept if isinstance(kept, tuple) else (kept,)
    counted = {a - ndim if a >= 0 else a for a in kept}
    axis = (a for a in range(-ndim, 0) if a < TOKENS or a in counted)
    return dataclasses.replace(spec, axis=tuple(axis))


def _tokens_per_block(stored: Stored) -> int:
    """Return how many tokens share a scale."""
    if not isinstance(stored, QuantizedArray):
        return 1
    return int(stored.shape[TOKENS] // stored.scale.shape[TOKENS])


def append(
    stored: Stored,
    residual: jax.Array | None,
    new: jax.Array,
    length: jax.Array,
    count: jax.Array,
    window: bool,
) -> tuple[Stored, jax.Array | None]:
    """Write what becomes final, and keep what waits for its block to fill.

    Args:
        stored: as `empty` made it.
        residual: as `empty` made it.
        new: floats `[..., n, heads, features]`.
        length: int32 `[...]`: tokens of each row so far.
        count: int32 `[...]`: how many of the n are to be stored.
        window: whether places are counted modulo the capacity.

    Returns:
        What is stored then, and the residual.
    """
    size = _tokens_per_block(stored)
    if residual is None:
        blocks, first, num_done = new, length, count
    else:
        blocks, held = _joined(residual, new, length, count, size)
        first, num_done = length // size, held // size
    num_blocks = blocks.shape[TOKENS] // size
    index = jnp.arange(num_blocks).reshape((1,) * length.ndim + (num_blocks,))
    place, limit = first[..., None] + index, stored.shape[TOKENS] // size
    place = place % limit if window else place
    place = jnp.where(index < num_done[..., None], place, limit)  # dropped
    if isinstance(stored, QuantizedArray):
        fresh: Any = quantize_array(
            blocks, _with_leading_axes(stored.spec, blocks.ndim)
        )
        parts = [
            _write(old, part, place, limit)
            for old, part in zip(
                jax.tree.leaves(stored), jax.tree.leaves(fresh), strict=True
            )
        ]
        result: Stored = jax.tree.unflatten(jax.tree.structure(stored), parts)
    else:
        result = _write(stored, blocks.astype(stored.dtype), place, limit)
    if residual is None:
        return result, None
    groups = axes.split_axis(blocks, blocks.ndim + TOKENS, size)
    last = jnp.minimum(num_done, num_blocks - 1)
    return result, _over_rows(_block, length.ndim)(groups, last)


def _joined(
    residual: jax.Array, new: jax.Array, length: jax.Array, count: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Put new tokens behind those that wait, in as many groups as there may be."""
    num_new = new.shape[TOKENS]
    room = -(-(size - 1 + num_new) // size) * size
    widths = [(0, 0)] * residual.ndim
    widths[TOKENS] = (0, room - size)
    index = jnp.arange(num_new).reshape((1,) * length.ndim + (num_new,))
    place = (length % size)[..., None] + index
    place = jnp.where(index < count[..., None], place, room)
    buffer = _write(jnp.pad(residual, widths), new.astype(residual.dtype), place, room)
    return buffer, length % size + count


def _write(old: jax.Array, new: jax.Array, place: jax.Array, limit: int) -> jax.Array:
    """Write blocks of tokens at the places of each row, those beyond `limit` nowhere.

    Args:
        old: `[..., limit * size, heads, features]`.
        new: `[..., blocks * size, heads, features]`.
        place: int `[..., blocks]`.
        limit: how many blocks there is room for.
    """
    if jnp.issubdtype(old.dtype, jnp.floating) and old.dtype.itemsize == 1:
        # As bits, because a CPU would write all of it as wider floats and back.
        bits = [jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (old, new)]
        written = _write(bits[0], bits[1], place, limit)
        return jax.lax.bitcast_convert_type(written, old.dtype)
    axis = old.ndim + TOKENS
    size = old.shape[axis] // limit

    def write(old: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
        return old.at[place].set(new, mode="drop")

    if size == 1:  # an axis of one would be moved about
        return _over_rows(write, axis)(old, new, place)
    blocks = axes.split_axis(old, axis, size), axes.split_axis(new, axis, size)
    return axes.merge_axis(_over_rows(write, axis)(*blocks, place), axis)


def _block(blocks: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(blocks, index, 0, keepdims=False)


def _over_rows(function: Callable[..., jax.Array], ndim: int) -> Callable[..., Any]:
    """Map a function over leading axes."""
    for _ in range(ndim):
        function = jax.vmap(function)
    return function


def tiled(residual: jax.Array, capacity: int) -> jax.Array:
    """Repeat what waits, so that a token stands in its slot whatever its group is."""
    axis = residual.ndim + TOKENS
    times = capacity // residual.shape[axis]
    lanes = jnp.expand_dims(residual, axis)
    shape = (*residual.shape[:axis], times, *residual.shape[axis:])
    return axes.merge_axis(jnp.broadcast_to(lanes, shape), axis)
