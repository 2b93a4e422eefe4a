"""Allocations: how many units each layer of each leaf keeps.

An allocation is a function `(units, sparsity) -> kept`. A unit is what lives and dies
together: a weight, a block or a channel. `units` is a list of `Units`, layers of one
shape each; `kept` has one `Count` of shape [layers] for each of them, and the sum over
all is the count asked for.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import axes, counts, selection, thresholds
from jopt.arrays.counts import Count


class Units(NamedTuple):
    """The scores of some layers of one shape, and where these layers stand."""

    scores: jax.Array  # [layers, ...], higher = keep
    positions: tuple[int, ...]  # of each layer, in the order of leaves and layers
    names: tuple[str, ...] = ()  # of each layer: its leaf's path, "[i]" if stacked
    shape: tuple[int, ...] = ()  # of one layer of the leaf, before blocks are pooled


Allocation = Callable[[Sequence[Units], Any], list[Count]]


def uniform(units: Sequence[Units], sparsity: Any) -> list[Count]:
    """Prune the same fraction of every layer: n - round(sparsity * n) of n units stay.

    >>> import jax.numpy as jnp
    >>> (kept,) = uniform([Units(jnp.ones((2, 10)), (0, 1))], 0.9)
    >>> kept.low
    Array([1, 1], dtype=uint32)
    """
    return [
        _each_layer(
            _num_kept(math.prod(u.scores.shape[1:]), sparsity), len(u.positions)
        )
        for u in units
    ]


def _each_layer(count: Count, num_layers: int) -> Count:
    return Count(*(jnp.broadcast_to(limb, (num_layers,)) for limb in count))


def _num_kept(size: int, sparsity: Any) -> Count:
    pruned = counts.as_count(counts.num_pruned(size, sparsity))
    return counts.subtract(counts.as_count(size), pruned)


def global_ranking(units: Sequence[Units], sparsity: Any) -> list[Count]:
    """Let all layers of all leaves compete: one threshold over everything.

    Scores should be comparable across leaves. Ties go to the earlier leaf, then to the
    lower index. What a search exchanges between devices is counts, some dozens of bytes
    per read, whatever the size of the model.

    >>> import jax.numpy as jnp
    >>> a = Units(jnp.array([[1.0, 2.0]]), (0,))
    >>> b = Units(jnp.array([[3.0, 4.0]]), (1,))
    >>> [int(kept.low[0]) for kept in global_ranking([a, b], 0.5)]
    [0, 2]
    """
    dtype = jnp.result_type(*(u.scores.dtype for u in units))
    lots: dict[Any, list[int]] = {}
    for i, u in enumerate(units):
        kind = (u.scores.shape[1:], axes.named_sharding(u.scores))
        lots.setdefault(kind, []).append(i)
    stacked = [
        jnp.concatenate([units[i].scores.astype(dtype) for i in lot])
        for lot in lots.values()
    ]
    size = sum(scores.size for scores in stacked)
    threshold = selection.find_threshold(stacked, _num_kept(size, sparsity))
    around = [_count_around(layers, threshold) for layers in stacked]
    above, ties = jax.tree.map(lambda *c: jnp.concatenate(c), *around)
    # Ties are dealt out in the order in which the layers stand.
    order = np.argsort([p for lot in lots.values() for i in lot for p in units[i][1]])
    dealt = counts.deal(threshold.need, Count(*(limb[order] for limb in ties)))
    back = np.argsort(order)
    kept = counts.add(above, Count(*(limb[back] for limb in dealt)))
    shares: list[Any] = [None] * len(units)
    start = 0
    for i in (i for lot in lots.values() for i in lot):
        stop = start + len(units[i].positions)
        shares[i] = Count(kept.high[start:stop], kept.low[start:stop])
        start = stop
    return shares


def _count_around(
    layers: jax.Array, threshold: selection.Threshold
) -> tuple[Count, Count]:
    """Count each layer; on a mesh all at once, or a loop would gather the layers."""

    def count(layer: jax.Array) -> tuple[Count, Count]:
        return thresholds.count_around(layer, threshold)

    if axes.is_sharded(layers):
        return jax.tree.map(axes.gather_values, jax.vmap(count)(layers))
    return jax.lax.map(count, layers)


def erk(units: Sequence[Units], sparsity: Any) -> list[Count]:
    """Prune the same fraction of every layer, until Erdos-Renyi-Kernel is merged."""
    return uniform(units, sparsity)
