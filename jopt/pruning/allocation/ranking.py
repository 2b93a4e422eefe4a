"""Layers compete: one threshold over the scores of all of them.

    t = the k-th largest of all scores;   kept of layer l = |{ u in l : score(u) >= t }|

with ties to the earlier leaf, then to the lower index. `global_ranking` compares the
scores as they are, `lamp` by what they weigh among the rest of their layer (Lee et al.,
"Layer-adaptive sparsity for the magnitude-based pruning", arXiv:2010.07611).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import axes, counts, selection, thresholds
from jopt.arrays.counts import Count
from jopt.arrays.selection import Threshold
from jopt.pruning.allocation.units import (
    Allocation,
    Units,
    num_kept,
    ranks,
    take_apart,
    total_size,
)

_Lots = tuple[tuple[int, ...], ...]
_LOT_SIZE = 1 << 22  # scores; more are not copied to save code


def global_ranking(units: Sequence[Units], sparsity: Any) -> list[Count]:
    """Let all layers of all leaves compete: one threshold over everything.

    Scores should be comparable across leaves. Ties go to the earlier leaf, then to the
    lower index. What a search exchanges between devices is counts, some dozens of bytes
    per read, whatever the size of the model.

    Args:
        units: layers, with scores [layers, ...].
        sparsity: fraction to prune of all units, a number or a traced scalar.

    Returns:
        For each of `units` a `Count` of shape [layers]; they add up to the count asked
        for.

    >>> import jax.numpy as jnp
    >>> a = Units(jnp.array([[1.0, 2.0]]), (0,))
    >>> b = Units(jnp.array([[3.0, 4.0]]), (1,))
    >>> [int(kept.low[0]) for kept in global_ranking([a, b], 0.5)]
    [0, 2]
    """
    return _rank(units, [u.scores for u in units], sparsity)


def lamp(units: Sequence[Units], sparsity: Any) -> list[Count]:
    """Let layers compete by LAMP, the weight of a score among its layer's rest.

        lamp(u) = s_u^2 / sum of s_v^2 over all v with s_v >= s_u in the layer

    The largest unit of every layer has 1, so no layer is pruned away while there is a
    unit for each. Scores are magnitudes: what is negative or NaN counts as 0. Each
    layer is sorted, which is slower than a search and takes memory of a few times its
    scores; on a mesh each layer is brought to every device for that.

    Args:
        units: layers, with scores [layers, ...].
        sparsity: fraction to prune of all units, a number or a traced scalar.

    Returns:
        For each of `units` a `Count` of shape [layers]; they add up to the count asked
        for.

    References:
        Lee et al., Layer-adaptive sparsity for the magnitude-based pruning,
        arXiv:2010.07611.

    >>> import jax.numpy as jnp
    >>> a = Units(jnp.array([[3.0, 4.0]]), (0,))  # LAMP 0.36, 1
    >>> b = Units(jnp.array([[30.0, 30.0]]), (1,))  # LAMP 1, 0.5
    >>> [int(kept.low[0]) for kept in lamp([a, b], 0.25)]
    [1, 2]
    """
    return _rank(units, [_lamp_sorted(u.scores) for u in units], sparsity)


@jax.jit
def _lamp_sorted(scores: jax.Array) -> jax.Array:
    """Return the LAMP scores [layers, n] of each layer, the largest first.

    Only how many pass a threshold matters, so they need not go back to their places.
    """
    if axes.is_sharded(scores):
        scores = axes.gather_values(scores)
        return jax.vmap(_lamp_of_layer)(scores)
    return jax.lax.map(_lamp_of_layer, scores)


def _lamp_of_layer(scores: jax.Array) -> jax.Array:
    u = scores.reshape(-1).astype(jnp.float32)
    u = jnp.where(u > 0, u, 0)
    # A common factor changes nothing, and squares neither overflow nor vanish.
    largest = jnp.max(u)
    u = -jnp.sort(-u / jnp.where(largest > 0, largest, 1))
    squares = u * u
    # A parallel sum may fall by a rounding; what is below must not outrank.
    rest = jax.lax.cummax(jnp.cumsum(squares))
    return jnp.where(squares > 0, squares / rest, 0)


def cuts(
    allocation: Allocation, units: Sequence[Units], sparsity: Any
) -> list[Count] | list[Threshold]:
    """Say what masks each of `units`: how many are kept, or a threshold if known.

    A ranking of everything has found what divides each layer already, and finding it
    again layer by layer would cost more than all else.
    """
    types = {u.scores.dtype for u in units}
    if allocation is not global_ranking or len(types) > 1:
        return allocation(units, sparsity)
    k = num_kept(total_size(units), sparsity)
    scores = [u.scores for u in units]
    lots = _lots_of(scores)
    threshold, keys = _find(scores, k, lots)
    split = threshold.split
    if not isinstance(split, jax.core.Tracer) and not bool(split):
        return [Threshold(key, None, None) for key in keys]
    return _deal_ties(scores, threshold, lots, _order(units))


def _order(units: Sequence[Units]) -> _Lots:
    return tuple(tuple(map(int, places)) for places in ranks(units))


def _rank(
    units: Sequence[Units], scores: Sequence[jax.Array], sparsity: Any
) -> list[Count]:
    """Count what each layer has among the largest of all scores."""
    dtype = jnp.result_type(*(x.dtype for x in scores))
    scores = [x.astype(dtype) for x in scores]
    k = num_kept(total_size(units), sparsity)
    kept = _count_ranked(scores, k, _lots_of(scores), _order(units))
    return take_apart(units, kept)


def _lots_of(scores: Sequence[jax.Array]) -> _Lots:
    """Put what is small and has one shape and place together: one loop reads it."""
    lots: dict[Any, list[list[int]]] = {}
    for i, x in enumerate(scores):
        same = lots.setdefault((x.shape[1:], axes.named_sharding(x)), [[]])
        if same[-1] and sum(scores[j].size for j in same[-1]) + x.size > _LOT_SIZE:
            same.append([])
        same[-1].append(i)
    return tuple(tuple(lot) for same in lots.values() for lot in same)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _count_ranked(
    scores: list[jax.Array], k: Count, lots: _Lots, order: _Lots
) -> Count:
    """Return how many units each layer keeps, in the order of the layers."""
    stacked = _stack(scores, lots)
    threshold = selection.find_threshold(stacked, k)
    around = [_count_around(layers, threshold) for layers in stacked]
    above, ties = jax.tree.map(lambda *c: jnp.concatenate(c), *around)
    place = np.argsort([p for lot in lots for i in lot for p in order[i]])
    above, ties = (Count(*(limb[place] for limb in c)) for c in (above, ties))
    assert threshold.need is not None
    return counts.add(above, counts.deal(threshold.need, ties))


@functools.partial(jax.jit, static_argnums=2)
def _find(
    scores: list[jax.Array], k: Count, lots: _Lots
) -> tuple[Threshold, list[jax.Array]]:
    """Return the threshold of everything, and its key for each array's layers."""
    threshold = selection.find_threshold(_stack(scores, lots), k)
    return threshold, [jnp.broadcast_to(threshold.key, (len(x),)) for x in scores]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _deal_ties(
    scores: list[jax.Array], threshold: Threshold, lots: _Lots, order: _Lots
) -> list[Threshold]:
    """Return the threshold of each array's layers, fields [layers].

    Ties are dealt out in the order in which the layers stand.
    """
    stacked = _stack(scores, lots)
    place = np.argsort([p for lot in lots for i in lot for p in order[i]])
    assert threshold.need is not None
    assert threshold.split is not None
    need = threshold.need

    def deal() -> Count:
        around = [_count_around(layers, threshold)[1] for layers in stacked]
        ties = jax.tree.map(lambda *c: jnp.concatenate(c)[place], *around)
        return counts.deal(need, ties)

    zeros = jnp.zeros(len(place), jnp.uint32) + (threshold.key & 0)
    needs = jax.lax.cond(threshold.split, deal, lambda: Count(zeros, zeros))
    return [
        Threshold(
            jnp.broadcast_to(threshold.key, (len(places),)),
            Count(*(limb[np.array(places)] for limb in needs)),
            jnp.broadcast_to(threshold.split, (len(places),)),
        )
        for places in order
    ]


def _stack(scores: Sequence[jax.Array], lots: _Lots) -> list[jax.Array]:
    return [
        scores[lot[0]] if len(lot) == 1 else jnp.concatenate([scores[i] for i in lot])
        for lot in lots
    ]


def _count_around(layers: jax.Array, threshold: Threshold) -> tuple[Count, Count]:
    """Count each layer; on a mesh all at once, or a loop would gather the layers."""

    def count(layer: jax.Array) -> tuple[Count, Count]:
        return thresholds.count_around(layer, threshold)

    if axes.is_sharded(layers):
        return jax.tree.map(axes.gather_values, jax.vmap(count)(layers))
    return jax.lax.map(count, layers)
