"""One threshold for many arrays, and what each of their layers has around it.

For allocations: ranking layers against each other needs how many elements of each are
kept, not the masks.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import counts, scans, selection
from jopt.arrays.counts import Count


class Threshold(NamedTuple):
    """Keep every key above `key`, and the first `need` of those equal to it."""

    key: jax.Array  # uint32
    need: Count


def find_threshold(scores: Sequence[jax.Array], k: Count) -> Threshold:
    """Find the key that divides the k largest scores of all arrays from the others.

    >>> scores = [jnp.array([1.0, 2.0]), jnp.array([2.0])]
    >>> found = find_threshold(scores, counts.as_count(1))
    >>> int(found.need.low)
    1
    """
    arrays = selection._as_common_type(list(scores))
    total = sum(array.size for array in arrays)
    k = counts.smaller(k, counts.as_count(total))
    count = functools.partial(selection._count_all, arrays, None)
    bracket = selection._search(count, k, selection._start(arrays, k, total, None))
    split = counts.less(k, bracket.at_least)
    # Without ties to split, all keys from `low` on are kept: the divide is one below.
    key = jnp.where(split, bracket.low, bracket.low - 1)
    need = counts.where(split, counts.subtract(k, bracket.above), counts.as_count(0))
    return Threshold(key, need)


def count_around(array: jax.Array, threshold: Threshold) -> tuple[Count, Count]:
    """Count the elements above the threshold, and those that lie on it."""
    largest = np.uint32(scans.largest_key(array.dtype))
    above = jnp.minimum(threshold.key, largest - np.uint32(1)) + 1
    probes = jnp.stack([threshold.key, above, above, above])
    found = scans.count_at_least(array, probes)
    from_it, over = (Count(found.high[i], found.low[i]) for i in (0, 1))
    over = counts.where(threshold.key >= largest, counts.as_count(0), over)
    return over, counts.subtract(from_it, over)


def count_numbers(array: jax.Array) -> Count:
    """Count the elements that are not NaN."""
    found = scans.count_at_least(array, jnp.ones(scans.PROBES, jnp.uint32))
    return Count(found.high[0], found.low[0])
