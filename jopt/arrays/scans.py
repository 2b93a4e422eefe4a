"""Reads of one array that selection is made of: ordered keys, counts, the last tie.

Scores are compared as unsigned integers in the order of the scores, made where they are
read: a float compare would flush subnormals, and an array of keys would cost memory.

    count(t) = sum_i [ key_i >= t ]

A count is written twice. On one CPU device XLA turns `jnp.sum(keys >= t)` into a
temporary array of integers; adding rows of the array into lanes, chunk after chunk,
needs none and runs at the speed of the memory, with four thresholds in the four bytes
of a lane. Other devices fuse the plain reduction, and over a mesh only that stays
local: a loop over slices would gather the array. The search for the last tie to keep is
written twice for the same reason.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jopt.arrays import axes, counts
from jopt.arrays.counts import Count

PROBES = 4  # thresholds counted in one read
_BITS = 8  # of a lane for each probe
_ROWS = 8  # added to the lanes in one step
_LANES = 1 << 15
_STEPS = 255 // _ROWS  # until eight bits are full
_TIE_CHUNK = 1 << 16  # a power of two


def ordered_keys(scores: ArrayLike) -> jax.Array:
    """Maps scores to unsigned integers in the same order.

    A float is sign and magnitude, so `2^31 + magnitude` or `2^31 - magnitude` orders
    float32 by value: -0 equals +0, -inf < finite < +inf, subnormals keep their order.
    Every NaN becomes 0, below all numbers.

    Args:
      scores: float32, bfloat16, float16, boolean or integers of up to 32 bits.

    Returns:
      uint16 for bfloat16 and float16, else uint32, of the shape of the scores.

    Raises:
      TypeError: If the scores are of another type.

    >>> ordered_keys(jnp.array([jnp.nan, -1.0, -0.0, 0.0], jnp.bfloat16))
    Array([    0, 16512, 32768, 32768], dtype=uint16)
    """
    scores = jnp.asarray(scores)
    return _keys_of(_bits_of(scores), scores.dtype)


def _bits_of(scores: jax.Array) -> jax.Array:
    """Views floats as unsigned integers, and returns integers as they are."""
    dtype = scores.dtype
    if dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        return lax.bitcast_convert_type(scores, np.dtype(f"uint{8 * dtype.itemsize}"))
    if dtype == jnp.bool_ or (
        jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize <= 4
    ):
        return scores
    raise TypeError(
        "scores must be float32, bfloat16, float16, boolean or integers of up to 32 "
        f"bits, got {dtype}{list(scores.shape)}: convert them first"
    )


def _keys_of(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Orders the bits of scores of a type."""
    if dtype == jnp.uint32:
        return bits
    if not jnp.issubdtype(dtype, jnp.floating):
        bits = lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.uint32)
        return bits ^ np.uint32(1 << 31)
    unsigned = bits.dtype.type
    sign = unsigned(1 << (8 * dtype.itemsize - 1))
    infinity = np.array(np.inf, dtype).view(unsigned)[()]
    magnitude = bits & unsigned(sign - 1)
    keys = jnp.where(bits < sign, sign + magnitude, sign - magnitude)
    return jnp.where(magnitude > infinity, unsigned(0), keys)


def _keys_in_slice(flat: jax.Array, begin: jax.Array, size: int) -> jax.Array:
    """Returns the keys of a slice, inside a loop over slices.

    XLA for CPU may widen all of an array of 16-bit floats to slice it, but not its
    bits; the barrier binds these to the loop, or all would be copied before it.
    """
    if flat.dtype.itemsize == 2:
        flat, begin = lax.optimization_barrier(  # type: ignore[no-untyped-call]
            (flat, begin)
        )
        bits = lax.dynamic_slice(_bits_of(flat), (begin,), (size,))
        return _keys_of(bits, flat.dtype)
    return ordered_keys(lax.dynamic_slice(flat, (begin,), (size,)))


def largest_key(dtype: np.dtype) -> int:
    """Returns the largest value that a key of this type of scores can take."""
    bits = 16 if dtype in (jnp.bfloat16, jnp.float16) else 32
    return int(2**bits - 1)


def _is_chunkable(array: jax.Array) -> bool:
    """Says whether the array may be read in slices of its flat view."""
    return array.size < 2**31 - 2 * _TIE_CHUNK and not axes.is_sharded(array)


def zero_like(array: jax.Array) -> jax.Array:
    """Returns a uint32 zero that varies over mapped axes as the array does."""
    return jnp.sum(jnp.zeros_like(array, jnp.uint32), dtype=jnp.uint32)


def sample(array: jax.Array, size: int) -> jax.Array:
    """Returns the keys of about `size` elements, at equal distances, as uint32.

    The distance has no divisor in common with the last axis, so that every column of a
    matrix has its turn.
    """
    stride = max(array.size // size, 1)
    while math.gcd(stride, array.shape[-1]) > 1:
        stride -= 1
    bits = _bits_of(array).reshape(-1)[: size * stride : stride]
    return _keys_of(bits, array.dtype).astype(jnp.uint32)


def count_at_least(array: jax.Array, probes: jax.Array) -> Count:
    """Counts the elements whose key is at least each of four probes, in one read."""
    if not _is_chunkable(array):
        return _count_plainly(array, probes)
    return lax.platform_dependent(
        array, probes, cpu=_count_in_chunks, default=_count_plainly
    )


def _count_plainly(array: jax.Array, probes: jax.Array) -> Count:
    keys = ordered_keys(array)
    probes = probes.astype(keys.dtype)
    found = [counts.sum_of_booleans(keys >= probes[i]) for i in range(PROBES)]
    return Count(
        jnp.stack([count.high for count in found]),
        jnp.stack([count.low for count in found]),
    )


def _count_in_chunks(array: jax.Array, probes: jax.Array) -> Count:
    """Adds rows into lanes, and full lanes into totals; a tail remains.

    The flat array is `panels x steps x rows x lanes` elements and less than one for
    each row more (sixteen where rows are long, which keeps them aligned).
    """
    flat = array.reshape(-1)
    panels = -(-flat.size // (_STEPS * _ROWS * _LANES))
    steps = -(-flat.size // (panels * _ROWS * _LANES))
    lanes = flat.size // (panels * steps * _ROWS)
    lanes -= lanes % 16 if lanes >= 256 else 0
    zero = (probes[0] & 0) + zero_like(flat[:1])

    def step(i: jax.Array, packed: jax.Array) -> jax.Array:
        for row in range(_ROWS):
            begin = (i * _ROWS + row) * lanes
            packed = packed + _pack_slice(flat, begin, lanes, probes)
        return packed

    def panel(i: jax.Array, totals: jax.Array) -> jax.Array:
        packed = jnp.broadcast_to(zero, (lanes,))
        packed = lax.fori_loop(i * steps, (i + 1) * steps, step, packed)
        return totals + _sum_packed(packed)

    tail = _bits_of(flat)[panels * steps * _ROWS * lanes :]
    tail = _keys_of(tail, flat.dtype)[None]
    reached = tail >= probes.astype(tail.dtype)[:, None]
    totals = zero + jnp.sum(reached, axis=1, dtype=jnp.uint32)
    if lanes:
        totals = lax.fori_loop(0, panels, panel, totals)
    return counts.as_count(totals)


@functools.partial(jax.jit, static_argnums=2)  # traced once for all rows
def _pack_slice(
    flat: jax.Array, begin: jax.Array, size: int, probes: jax.Array
) -> jax.Array:
    """Sets the lowest bit of byte j of a lane where the key is at least probe j."""
    keys = _keys_in_slice(flat, begin, size)
    lanes = jnp.zeros_like(keys, jnp.uint32)
    for j in range(PROBES):
        reached = (keys >= probes[j].astype(keys.dtype)).astype(jnp.uint32)
        lanes = lanes | (reached << (_BITS * j))
    return lanes


def _sum_packed(lanes: jax.Array) -> jax.Array:
    """Adds up each of the four bytes over the lanes."""
    shifts = np.arange(PROBES, dtype=np.uint32)[:, None] * _BITS
    bytes_of = (lanes[None] >> shifts) & np.uint32((1 << _BITS) - 1)
    return jnp.sum(bytes_of, axis=1, dtype=jnp.uint32)


def count_ties(array: jax.Array, threshold: jax.Array) -> Count:
    """Counts the elements whose key equals the threshold."""
    largest = np.uint32(largest_key(array.dtype))
    following = jnp.minimum(threshold, largest - 1) + 1
    found = count_at_least(array, jnp.stack([threshold] + [following] * (PROBES - 1)))
    above = counts.where(threshold < largest, found.at(1), counts.as_count(0))
    return counts.subtract(found.at(0), above)


def keep_ties(
    array: jax.Array, threshold: jax.Array, need: Count, split: jax.Array
) -> jax.Array:
    """Masks what exceeds the threshold, and of the ties the `need` first ones.

    Args:
      array: Scores of rank 1 or more.
      threshold: The uint32 key that divides the kept from the pruned.
      need: A `Count`, how many of the elements equal to the threshold to keep.
      split: Whether only some of the ties are kept; all are where it is False.

    Returns:
      The mask. Nothing is searched for where `split` is False.
    """
    if _is_chunkable(array):
        last = lax.platform_dependent(
            array, threshold, need, split, cpu=_last_in_chunks, default=_last_by_axis
        )
    else:
        last = _last_by_axis(array, threshold, need, split)
    keys = ordered_keys(array)
    threshold = threshold.astype(keys.dtype)
    first = _is_up_to(array, last)
    return (keys > threshold) | ((keys == threshold) & first)


def _is_up_to(array: jax.Array, last: tuple[jax.Array, ...]) -> jax.Array:
    """Says which indices are at or before the index `last`, in C order."""
    up_to = jnp.bool_(True)
    for axis in reversed(range(array.ndim)):
        index = _indices(array, axis)
        up_to = (index < last[axis]) | ((index == last[axis]) & up_to)
    return up_to


def _indices(array: jax.Array, axis: int) -> jax.Array:
    """Returns each element's index along an axis, sharded as the array is."""
    sharding = axes.named_sharding(array)
    return lax.broadcasted_iota(jnp.int32, array.shape, axis, out_sharding=sharding)


def _last_by_axis(
    array: jax.Array, threshold: jax.Array, need: Count, split: jax.Array
) -> tuple[jax.Array, ...]:
    """Finds the index of the last tie to keep, axis by axis, by plain reductions.

    The index i along an axis is the least with enough ties up to it; it is bisected,
    and the search goes on inside the slice i.
    """
    keys = ordered_keys(array)
    ties = keys == threshold.astype(keys.dtype)
    none = counts.equal(need, counts.as_count(0))
    zero = (need.low & 0).astype(jnp.int32)
    last = []
    for axis, size in enumerate(array.shape):
        index = _indices(array, axis)
        high = jnp.where(split & ~none, zero + (size - 1), zero)
        place = _bisect(zero, high, functools.partial(_is_short, ties, index, need))
        need = counts.subtract(need, counts.sum_of_booleans(ties & (index < place)))
        ties = ties & (index == place)
        last.append(place)
    last[0] = jnp.where(split, jnp.where(none, -1, last[0]), array.shape[0])
    return tuple(last)


def _is_short(
    ties: jax.Array, index: jax.Array, need: Count, last: jax.Array
) -> jax.Array:
    """Says whether the ties up to an index are fewer than needed."""
    return counts.less(counts.sum_of_booleans(ties & (index <= last)), need)


def _bisect(
    low: jax.Array, high: jax.Array, is_short: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns the least index in [low, high] that does not fall short, or high."""

    def halve(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        short = is_short(middle)
        return jnp.where(short, middle + 1, low), jnp.where(short, high, middle)

    ends = lax.while_loop(lambda ends: ends[0] < ends[1], halve, (low, high))
    return ends[0]


def _last_in_chunks(
    array: jax.Array, threshold: jax.Array, need: Count, split: jax.Array
) -> tuple[jax.Array, ...]:
    """Finds the index of the last tie to keep: walks on, and halves the step there."""
    flat = array.reshape(-1)
    size = flat.size
    chunk = min(_TIE_CHUNK, size)

    def ties_within(start: jax.Array, width: jax.Array) -> jax.Array:
        begin = jnp.minimum(start, size - chunk)
        keys = _keys_in_slice(flat, begin, chunk)
        index = begin + np.arange(chunk, dtype=np.int32)
        ties = (keys == threshold.astype(keys.dtype)) & (index >= start)
        return jnp.sum(ties & (index < start + width), dtype=jnp.uint32)

    def walk(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        start, width, left = state
        found = ties_within(start, width)
        enough = found >= left
        return (
            jnp.where(enough, start, start + width),
            jnp.where(enough, width // 2, width),
            jnp.where(enough, left, left - found),
        )

    left = counts.clip_to_int(need, size)
    start = (left & 0).astype(jnp.int32)
    width = jnp.where(split & (left > 0), start + _TIE_CHUNK, 0)
    last, _, _ = lax.while_loop(
        lambda state: (state[0] < size) & (state[1] > 0), walk, (start, width, left)
    )
    last = jnp.where(left > 0, jnp.minimum(last, size), -1)
    return _unravel(jnp.where(split, last, size), array.shape)


def _unravel(index: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Splits a flat index into one per axis; -1 and the size stay before and after."""
    stride = math.prod(shape)
    parts = []
    for size in shape:
        stride //= size
        parts.append(index // stride)
        index = index % stride
    return tuple(parts)
