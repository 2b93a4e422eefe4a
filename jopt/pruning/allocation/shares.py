"""Densities in given proportions, capped at 1, as whole units that add up exactly.

A layer of n_i units and ratio r_i keeps the density min(1, eps r_i). With one number
eps for all layers,

    kept_i(eps) = min(n_i, round(eps r_i n_i)),   sum of kept_i = k

The number is the largest float32 whose sum does not exceed k; what is missing is dealt
out, in the order of the layers, to those that have more at the next float32. Every
kept_i grows with k, so masks are nested while sparsity rises. The largest remainder
does not have that (the Alabama paradox); rounding each share as above is the method of
Webster. Where the shares rounded one by one add up to k, these are the counts.

The resolution is that of float32: shares are right to a unit in layers below 2^22
units and to 1e-6 of the layer above, but for what the rounding of all layers together
has to be made up for, at most half a unit per layer, spread in proportion.

Where JaxPruner differs: it rounds each layer's density by itself in float32, so its
counts need not add up (ours do; each is within a unit of its share), it is off by one
from 2^24 weights on, and it takes a stacked leaf for one layer of that shape.

`erk` and `er` take ratios from shapes: Evci et al., "Rigging the lottery",
arXiv:1911.11134; Mocanu et al., arXiv:1707.04780.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jopt.arrays import counts
from jopt.arrays.counts import Count
from jopt.pruning.allocation.units import (
    Allocation,
    Units,
    in_order,
    num_kept,
    ranks,
    take_apart,
    total_size,
)
from jopt.trees import rules

_HIGHEST = 0x7F7FFFFF  # the bits of the largest float32

Sensitivity = float | Sequence[float]


def erk(units: Sequence[Units], sparsity: Any) -> list[Count]:
    """Keep densities in proportion to Erdos-Renyi-Kernel: more of small layers.

        density = min(1, eps * sum(shape) / prod(shape))

    The shape is that of one layer of the leaf, all axes of a convolution included. With
    blocks or channels the ratio is that of the weights and the budget is in units.
    `Units` without a shape have that of their scores.

    Args:
        units: layers, with scores [layers, ...].
        sparsity: fraction to prune of all units, a number or a traced scalar.

    Returns:
        For each of `units` a `Count` of shape [layers]; they add up to the count asked
        for.

    References:
        Evci et al., Rigging the lottery, arXiv:1911.11134.

    >>> import jax.numpy as jnp
    >>> a = Units(jnp.ones((1, 4, 4)), (0,), ("a",), (4, 4))
    >>> b = Units(jnp.ones((1, 8, 8)), (1,), ("b",), (8, 8))
    >>> [int(kept.low[0]) for kept in erk([a, b], 0.7)]  # of 24: 8 of 16 and 16 of 64
    [8, 16]
    """
    return _in_proportion(units, [_ratio(_shape(u)) for u in units], sparsity)


def er(units: Sequence[Units], sparsity: Any) -> list[Count]:
    """Keep densities in proportion to Erdos-Renyi: `erk` without the kernel window.

        density = min(1, eps * (n_in + n_out) / (n_in * n_out))

    n_in and n_out are the last two axes of the shape of one layer.

    Args:
        units: layers, with scores [layers, ...].
        sparsity: fraction to prune of all units, a number or a traced scalar.

    Returns:
        For each of `units` a `Count` of shape [layers]; they add up to the count asked
        for.

    References:
        Mocanu et al., Scalable training of artificial neural networks with adaptive
        sparse connectivity inspired by network science, arXiv:1707.04780.

    >>> import jax.numpy as jnp
    >>> a = Units(jnp.ones((1, 3, 3, 4, 4)), (0,), ("a",), (3, 3, 4, 4))
    >>> b = Units(jnp.ones((1, 8, 8)), (1,), ("b",), (8, 8))
    >>> [int(kept.low[0]) for kept in er([a, b], 0.5)]
    [85, 19]
    """
    return _in_proportion(units, [_ratio(_shape(u)[-2:]) for u in units], sparsity)


def _shape(u: Units) -> tuple[int, ...]:
    return u.shape or u.scores.shape[1:]


def _ratio(shape: tuple[int, ...]) -> float:
    return max(sum(shape), 1) / math.prod(shape)


def sensitivity(
    table: Mapping[str, Sensitivity] | Sequence[tuple[str, Sensitivity]],
) -> Allocation:
    """Keep densities in proportion to how sensitive you found each layer to be.

        density = min(1, eps * sensitivity)

    A layer of sensitivity 0 keeps nothing while others are not full.

    Args:
        table: ordered rules `{pattern: sensitivity}` over names of leaves
            ("blocks/kernel") and of layers of stacked leaves ("blocks/kernel[3]", taken
            literally, or escaped in a pattern). The first that matches decides. A
            sequence has one number for each layer of a stacked leaf.

    Returns:
        An allocation.

    Raises:
        ValueError: a sensitivity is negative or not finite, or, when used, a layer
            matches no rule, a sequence is too short, or all sensitivities are 0.

    >>> import jax.numpy as jnp
    >>> a = Units(jnp.ones((2, 10)), (0, 1), ("a[0]", "a[1]"), (10,))
    >>> b = Units(jnp.ones((1, 10)), (2,), ("b",), (10,))
    >>> kept = sensitivity({"a": [1.0, 2.0], ".*": 3.0})([a, b], 0.6)
    >>> [each.low.tolist() for each in kept]
    [[2, 4], [6]]
    """
    pairs = list(table.items()) if isinstance(table, Mapping) else list(table)
    for pattern, value in pairs:
        for number in _numbers(value):
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(
                    "table must have sensitivities of at least 0, got "
                    f"{number} for {pattern!r}"
                )
    compiled = [(p, rules.compile_pattern(p), value) for p, value in pairs]

    def allocate(units: Sequence[Units], sparsity: Any) -> list[Count]:
        names = [name for u in units for name in u.names]
        if len(names) != sum(len(u.positions) for u in units):
            raise ValueError(
                f"units must name every layer for a table of sensitivities, got {names}"
            )
        found = [[_look_up(name, compiled) for name in u.names] for u in units]
        flat = [0.0] * len(names)
        for places, values in zip(ranks(units), found, strict=True):
            for place, value in zip(places, values, strict=True):
                flat[place] = value
        if not any(flat):
            raise ValueError(
                "table must have a sensitivity above 0 for some layer, got 0 for all "
                f"of {names[:3]}"
            )
        return _fill_proportions(units, flat, sparsity)

    return allocate


def _numbers(value: Any) -> list[float]:
    return [float(x) for x in np.ravel(np.asarray(value, np.float64))]


def _look_up(
    name: str, table: Sequence[tuple[str, re.Pattern[str], Sensitivity]]
) -> float:
    """Find the sensitivity of a layer, by its own name or by that of its leaf."""
    leaf, _, index = name.removesuffix("]").rpartition("[")
    if not (name.endswith("]") and leaf and index.isdigit()):
        leaf, index = name, ""
    for literal, pattern, value in table:
        if literal != name and not any(map(pattern.fullmatch, (name, leaf))):
            continue
        if np.ndim(value) == 0:
            return float(np.asarray(value))
        numbers = _numbers(value)
        if not index or int(index) >= len(numbers):
            raise ValueError(
                f"table must have one number, or one for each layer, for {name!r}, got "
                f"{len(numbers)} at {literal!r}"
            )
        return numbers[int(index)]
    literals = [literal for literal, _, _ in table]
    raise ValueError(
        f"table must have a sensitivity for every layer, got none for {name!r}; "
        f"{rules.name_near(leaf, literals)}; '.*' as the last rule matches the rest"
    )


def _in_proportion(
    units: Sequence[Units], ratios: Sequence[float], sparsity: Any
) -> list[Count]:
    return _fill_proportions(units, in_order(units, ratios), sparsity)


def _fill_proportions(
    units: Sequence[Units], ratios: Sequence[float], sparsity: Any
) -> list[Count]:
    """Solve for the shares of layers whose ratios are in the order of the layers."""
    sizes = in_order(units, [u.size for u in units])
    largest = max(ratios)
    weights = np.array([n * (r / largest) for n, r in zip(sizes, ratios, strict=True)])
    kept = _fill_weights(
        weights.astype(np.float32),
        counts.as_counts(sizes),
        num_kept(total_size(units), sparsity),
    )
    return take_apart(units, kept)


@jax.jit
def _fill_weights(weights: jax.Array, sizes: Count, k: Count) -> Count:
    # A product and no sum before it is rounded: nothing that one compiler fuses into
    # one rounding and another does not, so traced and Python sparsities agree.
    return fill(lambda eps: jnp.round(weights * eps), sizes, k)


def fill(kept_at: Callable[[jax.Array], jax.Array], sizes: Count, k: Count) -> Count:
    """Find the level at which layers keep k units together, exactly.

    Args:
        kept_at: level -> whole float32 numbers [layers], 0 at level 0, growing with the
            level; what exceeds a layer is cut.
        sizes: of the layers, [layers].
        k: how many to keep, at most the sum of the sizes.

    Returns:
        The kept units [layers], which add up to k and grow with k.
    """

    def at(bits: jax.Array) -> Count:
        level = lax.bitcast_convert_type(bits, jnp.float32)
        return counts.smaller(counts.from_float(kept_at(level)), sizes)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        fits = ~counts.less(k, counts.total(at(middle)))
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    zero = k.low & 0  # on a mesh, and under shard_map, of the type of k
    low, _ = lax.fori_loop(0, 32, halve, (zero, zero + np.uint32(_HIGHEST + 1)))
    kept = at(low)
    following = counts.where(low >= _HIGHEST, sizes, at(low + 1))
    rest = counts.subtract(k, counts.total(kept))
    return counts.add(kept, counts.deal(rest, counts.subtract(following, kept)))
