"""What an allocation is: layers with scores and a sparsity in, kept units out.

An allocation is a function `(units, sparsity) -> kept`. A unit is what lives and dies
together: a weight, a block or a channel. `units` is a list of `Units`, layers of one
shape each; `kept` has one `Count` of shape [layers] for each of them. Layers are always
taken in the order of their positions, so how they are put into lists does not matter.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import counts
from jopt.arrays.counts import Count


class Units(NamedTuple):
    """The scores of some layers of one shape, and where these layers stand."""

    scores: jax.Array  # [layers, ...], higher = keep
    positions: tuple[int, ...]  # of each layer, in the order of leaves and layers
    names: tuple[str, ...] = ()  # of each layer: its leaf's path, "[i]" if stacked
    shape: tuple[int, ...] = ()  # of one layer of the leaf, before blocks are pooled

    @property
    def size(self) -> int:
        """The number of units of one layer."""
        return math.prod(self.scores.shape[1:])


Allocation = Callable[[Sequence[Units], Any], list[Count]]


def uniform(units: Sequence[Units], sparsity: Any) -> list[Count]:
    """Prune the same fraction of every layer: n - round(sparsity * n) of n units stay.

    Every layer has the count asked for, so the sum over layers may be off by up to half
    a unit for each of them.

    Args:
        units: layers, with scores [layers, ...].
        sparsity: fraction to prune, a number or a traced scalar.

    Returns:
        For each of `units` a `Count` of shape [layers].

    >>> import jax.numpy as jnp
    >>> (kept,) = uniform([Units(jnp.ones((2, 10)), (0, 1))], 0.9)
    >>> kept.low
    Array([1, 1], dtype=uint32)
    """
    return [_each_layer(num_kept(u.size, sparsity), len(u.positions)) for u in units]


def _each_layer(count: Count, num_layers: int) -> Count:
    return Count(*(jnp.broadcast_to(limb, (num_layers,)) for limb in count))


def num_kept(size: int, sparsity: Any) -> Count:
    """Count what a sparsity leaves of `size` units."""
    pruned = counts.num_pruned(size, sparsity)
    if isinstance(pruned, int):
        return counts.as_count(size - pruned)
    return _rest_of(size, pruned)


@functools.partial(jax.jit, static_argnums=0)
def _rest_of(size: int, pruned: Count) -> Count:
    return counts.subtract(counts.as_count(size), pruned)


def total_size(units: Sequence[Units]) -> int:
    """Count all units of all layers."""
    return sum(u.size * len(u.positions) for u in units)


def ranks(units: Sequence[Units]) -> list[np.ndarray]:
    """Return the place of each layer among all of them, by position.

    >>> import jax.numpy as jnp
    >>> pair = [Units(jnp.ones((2, 3)), (0, 5)), Units(jnp.ones((1, 4)), (2,))]
    >>> [found.tolist() for found in ranks(pair)]
    [[0, 2], [1]]
    """
    positions = [p for u in units for p in u.positions]
    place = np.argsort(np.argsort(positions, kind="stable"), kind="stable")
    ends = np.cumsum([len(u.positions) for u in units])[:-1]
    return np.split(place, ends)


def in_order(units: Sequence[Units], values: Sequence[Any]) -> list[Any]:
    """Give every layer its unit list's value, in the order of the layers."""
    found: list[Any] = [None] * sum(len(u.positions) for u in units)
    for places, value in zip(ranks(units), values, strict=True):
        for place in places:
            found[place] = value
    return found


def take_apart(units: Sequence[Units], kept: Count) -> list[Count]:
    """Give each of `units` its part of counts that are in the order of the layers."""
    return [Count(*(limb[places] for limb in kept)) for places in ranks(units)]
