"""OWL: layers with more outliers among their scores keep more.

    D_l = fraction of the scores of l above threshold * mean of the scores of l
    density of l = t + 2 * limit * (D_l - min D) / (max D - min D)

with t such that the layers, each weighted by its size, keep what was asked for: Yin et
al., "Outlier weighed layerwise sparsity", arXiv:2310.05175. There the densities have
the mean asked for without weights and lie within +-limit of it; so they do here for
layers of one size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import axes, counts
from jopt.arrays.counts import Count
from jopt.pruning.allocation.shares import fill
from jopt.pruning.allocation.units import (
    Allocation,
    Units,
    in_order,
    num_kept,
    ranks,
    take_apart,
    total_size,
)

_GRID = 2**20  # of the differences between densities


def owl(threshold: float = 5.0, limit: float = 0.08) -> Allocation:
    """Keep more of layers in which more scores stand out from the mean.

    Scores are magnitudes, or those of Wanda as in the paper. A layer is one matrix,
    where the paper gives all matrices of a block one density. Densities are cut to
    [0, 1]. The mean of a layer is a float32 sum: on a mesh its last bit may differ.

    Args:
        threshold: how many means a score must exceed to be an outlier, above 0.
        limit: half of the spread between the lowest and the highest density, in
            [0, 0.5].

    Returns:
        An allocation whose counts add up to the count asked for. `jopt.prune` keeps
        them; `jopt.wanda` rounds them to whole inputs per output.

    Raises:
        ValueError: a number is out of range.

    References:
        Yin et al., Outlier weighed layerwise sparsity (OWL), arXiv:2310.05175.

    >>> import jax.numpy as jnp
    >>> plain = Units(jnp.ones((1, 100)), (0,))
    >>> spiky = Units(jnp.ones((1, 100)).at[0, 0].set(50.0), (1,))
    >>> [int(kept.low[0]) for kept in owl()([plain, spiky], 0.5)]
    [42, 58]
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}; OWL has 5")
    if not 0 <= limit <= 0.5:
        raise ValueError(f"limit must be in [0, 0.5], got {limit}; OWL has 0.08")

    def allocate(units: Sequence[Units], sparsity: Any) -> list[Count]:
        found = [_outlier_ratio(u.scores, np.float32(threshold)) for u in units]
        place = np.concatenate([np.atleast_1d(p) for p in ranks(units)])
        ratios = jnp.concatenate(found)[np.argsort(place)]
        sizes = in_order(units, [u.size for u in units])
        kept = _fill_spread(
            ratios,
            np.float32(2 * limit * _GRID),
            np.array(sizes, np.float32),
            counts.as_counts(sizes),
            num_kept(total_size(units), sparsity),
        )
        return take_apart(units, kept)

    return allocate


@jax.jit
def _outlier_ratio(scores: jax.Array, threshold: jax.Array) -> jax.Array:
    """Return the fraction of outliers of each layer, [layers]."""

    def of_layer(layer: jax.Array) -> jax.Array:
        layer = layer.astype(jnp.float32)
        is_number = ~jnp.isnan(layer)
        mean = jnp.mean(layer, where=is_number)
        outliers = counts.sum_of_booleans(layer > threshold * mean)
        return counts.to_float(outliers) / np.float32(layer.size)

    return axes.gather_values(jax.vmap(of_layer)(scores))


@jax.jit
def _fill_spread(
    ratios: jax.Array, spread: jax.Array, numbers: jax.Array, sizes: Count, k: Count
) -> Count:
    lowest, highest = jnp.min(ratios), jnp.max(ratios)
    width = jnp.where(highest > lowest, highest - lowest, 1)
    # Whole parts of a power of two: adding them is exact however it is compiled.
    below = jnp.round((highest - ratios) / width * spread) / _GRID
    return fill(
        lambda level: jnp.round(jnp.clip(level - below, 0, 1) * numbers), sizes, k
    )
