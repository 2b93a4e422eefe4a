"""The exact k largest of an array, without sorting it.

A mask that keeps k elements needs one number, the k-th largest score

    t = max { v : count(scores >= v) >= k },     mask = scores >= t,

and a count is one read of the array (`scans`). The search brackets t: quantiles of a
small sorted sample are the first four probes, one read counts what is at least each of
them, and the next four stand where interpolation between the ends of the tightened
bracket puts the k-th element, give or take its uncertainty. About four reads do for 10M
elements. Of the elements equal to t those of the lowest index are kept.

Sampling to select goes back to Floyd and Rivest, "Expected time bounds for selection"
(CACM 1975).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jopt.arrays import axes, counts, scans
from jopt.arrays.counts import AxisName, Count, num_pruned
from jopt.arrays.scans import ordered_keys

__all__ = [
    "Count",
    "Threshold",
    "find_threshold",
    "mask_above",
    "num_pruned",
    "ordered_keys",
    "top_k_mask",
    "top_k_masks",
]

_SAMPLE = _SORTED = 1024
_FIRST_SPREAD = np.array([-3.0, -0.7, 0.7, 3.0], np.float32)  # in deviations
_SPREAD = np.array([-2.2, -0.6, 0.6, 2.2], np.float32)
_EVEN = np.array([0.2, 0.4, 0.6, 0.8], np.float32)


class _Bracket(NamedTuple):
    """The k-th largest key is in [low, high], where the next probes are."""

    low: jax.Array
    high: jax.Array
    at_least: Count  # elements >= low, at least k
    above: Count  # elements > high, fewer than k
    outside: jax.Array  # the smaller of k and total - k, float32
    probes: jax.Array  # uint32 [4] in (low, high], ascending


def top_k_mask(
    scores: ArrayLike, k: ArrayLike | Count, *, axis_name: AxisName | None = None
) -> jax.Array:
    """Masks exactly the k largest scores, ties to the lower index.

    Args:
      scores: An array of any shape; NaN ranks below every number.
      k: How many to keep, an integer (may be traced) or a `Count`; clipped to the
        number of scores.
      axis_name: Inside `shard_map` or `pmap`, the mapped axis or axes that the array
        is split over: k counts over all of it, and ties go to the lower
        (axis index, local index).

    Returns:
      A boolean mask of the shape of the scores, True = keep.

    Raises:
      TypeError: If the scores or k are of a type that is not ordered.

    >>> top_k_mask(jnp.array([1.0, 3.0, 2.0, 2.0]), 2)
    Array([False,  True,  True, False], dtype=bool)
    """
    return top_k_masks([scores], k, axis_name=axis_name)[0]


def top_k_masks(
    scores: Sequence[ArrayLike],
    k: ArrayLike | Count,
    *,
    axis_name: AxisName | None = None,
) -> list[jax.Array]:
    """Masks the k largest scores of several arrays ranked together.

    One threshold serves all arrays; their counts are added, nothing is concatenated.

    Args:
      scores: Arrays of any shapes, all of one type or all floating point.
      k: As in `top_k_mask`, over all arrays.
      axis_name: As in `top_k_mask`.

    Returns:
      One mask per array; ties go to the earlier array, then to the lower index.

    Raises:
      TypeError: If the scores or k are of a type that is not ordered.

    >>> top_k_masks([jnp.array([1.0, 3.0]), jnp.array([2.0])], 2)
    [Array([False,  True], dtype=bool), Array([ True], dtype=bool)]
    """
    arrays = [jnp.asarray(array) for array in scores]
    filled = _filled(arrays)
    masks = iter(_masks(filled, counts.as_count(k), axis_name) if filled else [])
    return [
        next(masks).reshape(a.shape) if a.size else jnp.zeros_like(a, jnp.bool_)
        for a in arrays
    ]


class Threshold(NamedTuple):
    """Every key above `key` is kept, and of those equal to it the first `need`."""

    key: jax.Array  # uint32, an ordered key
    need: Count | None
    split: jax.Array | None  # whether some of the equal ones are not kept; None if not


def find_threshold(
    scores: Sequence[ArrayLike],
    k: ArrayLike | Count,
    *,
    axis_name: AxisName | None = None,
) -> Threshold:
    """Finds what divides the k largest scores of several arrays from the others.

    Args:
      scores: Arrays of any shapes, all of one type or all floating point, not all
        empty.
      k: As in `top_k_mask`, over all arrays.
      axis_name: As in `top_k_mask`.

    Returns:
      The threshold.

    Raises:
      TypeError: If the scores or k are of a type that is not ordered.

    >>> found = find_threshold([jnp.array([1.0, 2.0]), jnp.array([2.0])], 1)
    >>> bool(found.split), int(found.need.low)
    (True, 1)
    """
    arrays = _filled([jnp.asarray(array) for array in scores])
    return _find_threshold(arrays, counts.as_count(k), axis_name)


def mask_above(scores: ArrayLike, threshold: Threshold) -> jax.Array:
    """Masks what is above a threshold, and as many of those on it as it needs.

    Args:
      scores: An array of any shape.
      threshold: Of scores of the same type, with the need of this array.

    Returns:
      A boolean mask of the shape of the scores, True = keep.

    >>> found = find_threshold([jnp.array([1.0, 2.0, 2.0])], 1)
    >>> mask_above(jnp.array([1.0, 2.0, 2.0]), found)
    Array([False,  True, False], dtype=bool)
    """
    array = jnp.asarray(scores)
    if not array.size:
        return jnp.zeros_like(array, jnp.bool_)
    if threshold.need is None or threshold.split is None:
        keys = scans.ordered_keys(array)
        return keys >= threshold.key.astype(keys.dtype)
    filled = array.reshape(array.shape or (1,))
    return scans.keep_ties(
        filled, threshold.key, threshold.need, threshold.split
    ).reshape(array.shape)


@functools.partial(jax.jit, static_argnums=2)
def _find_threshold(
    arrays: list[jax.Array], k: Count, axis_name: AxisName | None
) -> Threshold:
    total = sum(array.size for array in arrays)
    if axis_name is not None:
        total *= lax.axis_size(axis_name)
        k = counts.agree(k, axis_name)
    k = counts.smaller(k, counts.as_count(total))
    if axis_name is None and total <= _SORTED and not any(map(axes.is_sharded, arrays)):
        return _by_sorting(arrays, k, total)
    count = functools.partial(_count_all, arrays, axis_name)
    bracket = _search(count, k, _start(arrays, k, total, axis_name))
    split = counts.less(k, bracket.at_least)
    need = counts.subtract(k, bracket.above)
    return Threshold(bracket.low, counts.where(split, need, k), split)


def _by_sorting(arrays: list[jax.Array], k: Count, total: int) -> Threshold:
    """Reads the threshold off a sample that is all there is: a third to compile."""
    sample = jnp.concatenate([scans.sample(array, array.size) for array in arrays])
    key = jnp.sort(sample)[total - jnp.maximum(counts.clip_to_int(k, total), 1)]
    at_least, above = map(counts.sum_of_booleans, (sample >= key, sample > key))
    split = counts.less(k, at_least)
    return Threshold(key, counts.where(split, counts.subtract(k, above), k), split)


def _filled(arrays: list[jax.Array]) -> list[jax.Array]:
    """Drops empty arrays, and gives scalars an axis and all arrays a common type."""
    return _as_common_type([a.reshape(a.shape or (1,)) for a in arrays if a.size])


def _as_common_type(arrays: list[jax.Array]) -> list[jax.Array]:
    """Widens floating types to one that orders them all the same."""
    types = {array.dtype for array in arrays}
    if len(types) <= 1:
        return arrays
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in types):
        raise TypeError(
            "scores ranked together must have one type, got "
            f"{sorted(map(str, types))}: convert them to float32"
        )
    return [array.astype(jnp.result_type(*types)) for array in arrays]


@functools.partial(jax.jit, static_argnums=2)
def _masks(
    arrays: list[jax.Array], k: Count, axis_name: AxisName | None
) -> list[jax.Array]:
    """Masks one array after the other, each with the ties that those before it left."""
    # XLA for CPU misreads a constant that is transposed, read in a loop and beside it.
    arrays = lax.optimization_barrier(arrays)  # type: ignore[no-untyped-call]
    key, need, split = _find_threshold(arrays, k, axis_name)
    masks = []
    for i, array in enumerate(arrays):
        mine = need
        if axis_name is not None or i + 1 < len(arrays):
            mine, need = _share(array, key, need, split, axis_name)
        masks.append(scans.keep_ties(array, key, mine, split))
    return masks


def _count_all(
    arrays: list[jax.Array], axis_name: AxisName | None, probes: jax.Array
) -> Count:
    """Counts what is at least each probe, over all arrays and mapped devices."""
    found = [scans.count_at_least(array, probes) for array in arrays]
    total = functools.reduce(counts.add, found)
    return total if axis_name is None else counts.psum(total, axis_name)


def _share(
    array: jax.Array,
    threshold: jax.Array,
    need: Count,
    split: jax.Array,
    axis_name: AxisName | None,
) -> tuple[Count, Count]:
    """Returns the need when this device's ties come up, and what the array leaves."""
    ties = lax.cond(
        split,
        lambda: scans.count_ties(array, threshold),
        lambda: counts.as_count(scans.zero_like(array) + (threshold & 0)),
    )
    if axis_name is None:
        return need, counts.subtract(need, ties)
    everyone = Count(*(lax.all_gather(limb, axis_name).reshape(-1) for limb in ties))
    before = np.arange(lax.axis_size(axis_name)) < lax.axis_index(axis_name)
    earlier = counts.total(counts.where(before, everyone, counts.as_count(0)))
    rest = counts.subtract(need, counts.psum(ties, axis_name))
    return counts.subtract(need, earlier), rest


def _start(
    arrays: list[jax.Array], k: Count, total: int, axis_name: AxisName | None
) -> _Bracket:
    """Brackets every key, and probes first where a sample has its quantiles."""
    zero = jnp.uint32(0)
    if axis_name is None:  # inside shard_map, a type that varies as the arrays do
        zero += sum((scans.zero_like(array) for array in arrays), k.low & 0)
    high = zero + np.uint32(scans.largest_key(arrays[0].dtype))
    nothing_to_keep = counts.equal(k, counts.as_count(0))
    low = jnp.where(nothing_to_keep, high, zero)
    at_least, above = counts.as_count(total), counts.as_count(zero)
    at_least = counts.add(at_least, above)
    probes = _first_probes(arrays, k, total, axis_name)
    probes = _ascend(probes + zero, low, high)
    rest = counts.subtract(at_least, k)
    outside = jnp.maximum(counts.to_float(counts.smaller(k, rest)), 1)
    return _Bracket(low, high, at_least, above, outside, probes)


def _first_probes(
    arrays: list[jax.Array], k: Count, total: int, axis_name: AxisName | None
) -> jax.Array:
    """Picks the quantiles of a sample around the k-th largest."""
    parts = 1 if axis_name is None else lax.axis_size(axis_name)
    sizes = [max(1, _SAMPLE * array.size // total) for array in arrays]
    keys = [
        scans.sample(array, min(max(size, 64 // parts), array.size))
        for array, size in zip(arrays, sizes, strict=True)
        if not axes.is_sharded(array)
    ]
    if not keys:
        return jnp.asarray(_EVEN * scans.largest_key(arrays[0].dtype), jnp.uint32)
    sample = jnp.concatenate(keys)
    if axis_name is not None:
        sample = lax.all_gather(sample, axis_name).reshape(-1)
    fraction = 1 - counts.to_float(k) / np.float32(total)
    deviation = jnp.sqrt(sample.size * fraction * (1 - fraction)) + 0.5
    positions = sample.size * fraction - 0.5 + deviation * _FIRST_SPREAD
    positions = jnp.clip(jnp.round(positions), 0, sample.size - 1)
    probes = jnp.sort(sample)[positions.astype(jnp.int32)]
    if axis_name is None:
        return probes
    return lax.pmax(probes, axis_name)  # type: ignore[no-untyped-call]


def _search(
    count: Callable[[jax.Array], Count], k: Count, bracket: _Bracket
) -> _Bracket:
    """Tightens the bracket until it holds one key, or no ties are to be split."""

    def unfinished(bracket: _Bracket) -> jax.Array:
        return (bracket.low < bracket.high) & ~counts.equal(bracket.at_least, k)

    def tighten(bracket: _Bracket) -> _Bracket:
        found = count(bracket.probes)
        i = jnp.sum(~counts.less(found, k), dtype=jnp.int32)  # these come first
        tighter = _Bracket(
            low=_prepend(bracket.low, bracket.probes)[i],
            high=_append(bracket.probes - 1, bracket.high)[i],
            at_least=Count(*map(_prepend, bracket.at_least, found)).at(i),
            above=Count(*map(_append, found, bracket.above)).at(i),
            outside=bracket.outside,
            probes=bracket.probes,
        )
        probes = _next_probes(tighter, _inside(bracket), k, i == 0)
        return tighter._replace(probes=probes)

    return lax.while_loop(unfinished, tighten, bracket)


def _prepend(first: jax.Array, rest: jax.Array) -> jax.Array:
    return jnp.concatenate([first[None], rest])


def _append(rest: jax.Array, last: jax.Array) -> jax.Array:
    return jnp.concatenate([rest, last[None]])


def _next_probes(
    bracket: _Bracket, was_inside: jax.Array, k: Count, too_high: jax.Array
) -> jax.Array:
    """Places probes where the k-th largest is likely, or by halves if that failed.

    The rank of the k-th is uncertain as a binomial is, and for the density is not even:
    by a part of the bracket as large as the bracket is beside what lies outside.
    """
    inside = _inside(bracket)
    rank = counts.to_float(counts.subtract(bracket.at_least, k))
    deviation = jnp.sqrt(rank * (1 - rank / jnp.maximum(inside, 1)) + 0.5)
    deviation += inside * inside / (16 * bracket.outside)
    likely = _between(bracket, (rank + 0.5 + deviation * _SPREAD) / (inside + 1))
    probes = jnp.where(inside > was_inside / 2, _halves(bracket), likely)
    # All probes too high: the key may be `low`, shared by many, and low + 1 decides.
    probes = probes.at[0].set(jnp.where(too_high, bracket.low + 1, probes[0]))
    return _ascend(probes, bracket.low, bracket.high)


def _inside(bracket: _Bracket) -> jax.Array:
    return counts.to_float(counts.subtract(bracket.at_least, bracket.above))


def _between(bracket: _Bracket, fractions: jax.Array) -> jax.Array:
    """Returns the keys at fractions of the way from low to high."""
    width = (bracket.high - bracket.low).astype(jnp.float32)
    steps = jnp.clip(fractions, 0, 1 - 2.0**-20) * width
    return bracket.low + 1 + steps.astype(jnp.uint32)


def _halves(bracket: _Bracket) -> jax.Array:
    """Probes where many scores may be equal: the roundest key and the one after it.

    The roundest key in (low, high] ends in the most zeros. Scores that were rounded, or
    widened from fewer bits, are round keys, so it is one of them or parts them.
    """
    differing = lax.clz(bracket.low ^ bracket.high)
    ending = jnp.uint32(0x7FFFFFFF) >> jnp.minimum(differing, 31)
    roundest = bracket.high & ~ending
    first, last = _between(bracket, jnp.array([0.25, 0.75], jnp.float32))
    first, last = jnp.minimum(first, roundest), jnp.maximum(last, roundest + 1)
    return jnp.stack([first, roundest, roundest + 1, last])


def _ascend(probes: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Moves probes into (low, high] and apart, as far as there is room."""
    ascending = [jnp.clip(probes[0], jnp.minimum(low, high - 1) + 1, high)]
    for i in range(1, scans.PROBES):
        next_one = jnp.minimum(ascending[-1], high - 1) + 1
        ascending.append(jnp.clip(probes[i], next_one, high))
    return jnp.stack(ascending)
