"""What one layer has around a threshold that many layers share.

For allocations: ranking layers against each other needs how many elements of each are
kept, not the masks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import counts, scans
from jopt.arrays.counts import Count
from jopt.arrays.selection import Threshold


def count_around(array: jax.Array, threshold: Threshold) -> tuple[Count, Count]:
    """Count the elements above the threshold, and those that lie on it.

    >>> from jopt.arrays import selection
    >>> scores = jnp.array([1.0, 2.0, 2.0, 3.0])
    >>> found = selection.find_threshold([scores], counts.as_count(2))
    >>> [int(count.low) for count in count_around(scores, found)]
    [1, 2]
    """
    largest = np.uint32(scans.largest_key(array.dtype))
    above = jnp.minimum(threshold.key, largest - np.uint32(1)) + 1
    probes = jnp.stack([threshold.key, above, above, above])
    found = scans.count_at_least(array, probes)
    from_it, over = (Count(found.high[i], found.low[i]) for i in (0, 1))
    over = counts.where(threshold.key >= largest, counts.as_count(0), over)
    return over, counts.subtract(from_it, over)


def count_numbers(array: jax.Array) -> Count:
    """Count the elements that are not NaN.

    >>> int(count_numbers(jnp.array([1.0, jnp.nan, jnp.inf])).low)
    2
    """
    found = scans.count_at_least(array, jnp.ones(scans.PROBES, jnp.uint32))
    return Count(found.high[0], found.low[0])
