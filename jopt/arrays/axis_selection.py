"""The exact k largest along one axis, for all other indices at once, without sorting.

    t_j = max { v : count_i(scores_ij >= v) >= k_j },    mask_ij = scores_ij >= t_j

The search of `selection`, for a matrix of columns: each column has a bracket of its
own, four probes part it in five, and one read of the matrix counts for all columns.
Fourteen reads part 2^32 keys. Of the elements equal to t_j those of the lowest index
are kept.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jopt.arrays import axes, scans

_PARTS = 5  # of a bracket, by four probes
_ROWS = 8  # read in one step
_NARROW = 64  # columns below which a loop over rows has too little to do


def top_k_along(scores: ArrayLike, k: ArrayLike, *, axis: int = -1) -> jax.Array:
    """Masks exactly the k largest scores along an axis, ties to the lower index.

    Args:
      scores: An array of at least one axis; NaN ranks below every number.
      k: How many to keep, an integer or one for each index of the other axes (may be
        traced); clipped to the length of the axis.
      axis: The axis that is ranked along.

    Returns:
      A boolean mask of the shape of the scores, True = keep.

    Raises:
      TypeError: If the scores or k are of a type that is not ordered.
      ValueError: If there is no such axis.

    >>> top_k_along(jnp.array([[1.0, 3.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]]), 2)
    Array([[False,  True,  True, False],
           [ True,  True, False, False]], dtype=bool)
    """
    scores = jnp.asarray(scores)
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"axis must be an axis of the scores, got {axis} for shape {scores.shape}"
        )
    k = jnp.asarray(k)
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"k must be an integer or integers, got {k.dtype}")
    front = jnp.moveaxis(scores, axis, 0)
    if not scores.size:
        return jnp.zeros_like(scores, jnp.bool_)
    mask = _mask(front, jnp.clip(k, 0, front.shape[0]).astype(jnp.int32))
    return jnp.moveaxis(mask, 0, axis)


@jax.jit
def _mask(scores: jax.Array, k: jax.Array) -> jax.Array:
    """Masks along the first axis."""
    columns = scores if scores.ndim > 1 else scores[:, None]
    # XLA for CPU misreads a constant that is transposed and then read in a loop.
    columns = lax.optimization_barrier(columns)  # type: ignore[no-untyped-call]
    k = jnp.broadcast_to(k, columns.shape[1:])
    largest = jnp.uint32(scans.largest_key(scores.dtype))
    zero = jnp.zeros_like(columns[0], jnp.uint32)
    low, high = zero, zero + largest

    def unfinished(bracket: tuple[jax.Array, jax.Array]) -> jax.Array:
        low, high = bracket
        return jnp.any(low < high)

    def tighten(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        probes = _probes(low, high)
        found = _count(columns, probes)
        for probe, count in zip(probes, found, strict=True):  # ascending
            low = jnp.where(count >= k, jnp.maximum(low, probe), low)
            high = jnp.where(count < k, jnp.minimum(high, probe - 1), high)
        return low, high

    threshold, _ = lax.while_loop(unfinished, tighten, (low, high))
    beyond = jnp.where(threshold < largest, threshold + 1, largest)
    above = _count(columns, jnp.stack([beyond] * (_PARTS - 1)))[0]
    need = k - jnp.where(threshold < largest, above, 0)
    return _keep(columns, threshold, need).reshape(scores.shape)


def _probes(low: jax.Array, high: jax.Array) -> jax.Array:
    """Parts (low, high] evenly: uint32 [4, ...], ascending."""
    width = high - low
    whole, rest = width // _PARTS, width % _PARTS
    steps = [whole * i + rest * i // _PARTS for i in range(1, _PARTS)]
    # Where the bracket is closed a probe past it changes nothing.
    return jnp.stack([low + jnp.minimum(jnp.maximum(s, 1), width) for s in steps])


def _is_plain(columns: jax.Array) -> bool:
    is_small = columns[0].size < _NARROW or columns.shape[0] < _ROWS
    return is_small or axes.is_sharded(columns)


def _count(columns: jax.Array, probes: jax.Array) -> jax.Array:
    """Counts in each column what is at least each probe: int32 [4, ...]."""
    if _is_plain(columns):
        return _count_plainly(columns, probes)
    return lax.platform_dependent(
        columns, probes, cpu=_count_by_rows, default=_count_plainly
    )


def _count_plainly(columns: jax.Array, probes: jax.Array) -> jax.Array:
    keys = scans.ordered_keys(columns).astype(jnp.uint32)
    return jnp.stack(
        [jnp.sum(keys >= p[None], axis=0, dtype=jnp.int32) for p in probes]
    )


def _count_by_rows(columns: jax.Array, probes: jax.Array) -> jax.Array:
    """Adds rows up one after another: XLA for CPU has no temporary array then."""
    length = columns.shape[0]

    def add(rows: jax.Array, found: jax.Array) -> jax.Array:
        keys = scans.ordered_keys(rows).astype(jnp.uint32)
        for i in range(rows.shape[0]):
            found = found + (keys[i][None] >= probes).astype(jnp.int32)
        return found

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        return add(lax.dynamic_slice_in_dim(columns, i * _ROWS, _ROWS), found)

    found = jnp.zeros_like(probes, jnp.int32)
    found = lax.fori_loop(0, length // _ROWS, step, found)
    rest = length % _ROWS
    return add(columns[length - rest :], found) if rest else found


def _keep(columns: jax.Array, threshold: jax.Array, need: jax.Array) -> jax.Array:
    """Keeps what is above the threshold, and the first `need` of what equals it."""
    if _is_plain(columns):
        return _keep_plainly(columns, threshold, need)
    return lax.platform_dependent(
        columns, threshold, need, cpu=_keep_by_rows, default=_keep_plainly
    )


def _keep_plainly(
    columns: jax.Array, threshold: jax.Array, need: jax.Array
) -> jax.Array:
    keys = scans.ordered_keys(columns).astype(jnp.uint32)
    ties = keys == threshold[None]
    earlier = jnp.cumsum(ties, axis=0, dtype=jnp.int32) - ties
    return (keys > threshold[None]) | (ties & (earlier < need[None]))


def _keep_by_rows(
    columns: jax.Array, threshold: jax.Array, need: jax.Array
) -> jax.Array:
    def keep(left: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = scans.ordered_keys(row).astype(jnp.uint32)
        is_tie = key == threshold
        kept = (key > threshold) | (is_tie & (left > 0))
        return left - is_tie.astype(jnp.int32), kept

    return lax.scan(keep, need, columns)[1]
