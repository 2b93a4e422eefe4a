"""Layers of many leaves, put together so that code does not grow with the leaves.

The search for the k-th largest is what is large to compile. So the layers of leaves of
one shape are stacked into a lot and searched by one loop, and small layers of any shape
are padded to one size: code grows with the number of large shapes. Stacking takes a
copy of the scores; lots are cut at `_LOT_SIZE` scores to bound it.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays import axes, counts, packing, patterns, selection, thresholds
from jopt.arrays.counts import Count
from jopt.arrays.selection import Threshold

_LOT_SIZE = 1 << 25
_TIERS = (1 << 10, 1 << 13, 1 << 16)  # sizes up to which small layers are padded


def layer_shape(shape: tuple[int, ...], stacked_axis: int | None) -> tuple[int, ...]:
    """Return the shape of one layer of a leaf."""
    if stacked_axis is None:
        return shape
    return shape[:stacked_axis] + shape[stacked_axis + 1 :]


def to_layers(array: jax.Array, stacked_axis: int | None) -> jax.Array:
    """Arrange a leaf as [layers, ...]."""
    if stacked_axis is None:
        return array[None]
    return jnp.moveaxis(array, stacked_axis, 0)


def pack_layers(
    mask: jax.Array, stacked_axis: int | None, is_packed: bool
) -> jax.Array:
    """Put the layers of a leaf back where they stand, and pack."""
    mask = mask[0] if stacked_axis is None else jnp.moveaxis(mask, 0, stacked_axis)
    return packing.pack_mask(mask) if is_packed else mask


def make_lots(arrays: Sequence[jax.Array]) -> list[list[int]]:
    """Put leaves with layers of one shape and dtype together, up to the lot size.

    What an explicit mesh places differently stays apart.
    """
    lots: dict[Any, list[list[int]]] = {}
    for i, layers in enumerate(arrays):
        kind = (layers.shape[1:], layers.dtype, axes.named_sharding(layers))
        same = lots.setdefault(kind, [[]])
        if same[-1] and sum(arrays[j].size for j in same[-1]) + layers.size > _LOT_SIZE:
            same.append([])
        same[-1].append(i)
    return [lot for same in lots.values() for lot in same]


def stack(arrays: Sequence[jax.Array], lots: Sequence[Sequence[int]]) -> list[Any]:
    """Stack the layers of each lot."""
    return [
        arrays[lot[0]] if len(lot) == 1 else jnp.concatenate([arrays[i] for i in lot])
        for lot in lots
    ]


def unstack(
    stacked: Sequence[jax.Array],
    lots: Sequence[Sequence[int]],
    stacked_axes: Sequence[int | None],
    ranks: Sequence[int],
    num_layers: Sequence[int],
    is_packed: Sequence[bool],
) -> list[Any]:
    """Take the masks of lots apart again, one for each leaf, packed as the state is."""
    found: list[Any] = [None] * len(num_layers)
    for lot, mask in zip(lots, stacked, strict=True):
        # Together where the last axis is that of the leaves: it is less code.
        early = all(is_packed[i] and stacked_axes[i] != ranks[i] - 1 for i in lot)
        whole = packing.pack_mask(mask) if early else mask
        start = 0
        for i in lot:
            stop = start + num_layers[i]
            late = is_packed[i] and whole.dtype == jnp.bool_
            found[i] = pack_layers(whole[start:stop], stacked_axes[i], late)
            start = stop
    return found


def only_finite(scores: jax.Array) -> jax.Array:
    """Put NaN for what is not finite.

    A NaN ranks below every number, so what cannot be made zero is given up first and
    does not take the place of a weight that can be kept.
    """
    if len(scores) == 1:
        # With its axis in the way, XLA keeps two copies of a large leaf.
        return jnp.expand_dims(_only_finite_in(jnp.squeeze(scores, 0)), 0)
    return _only_finite_in(scores)


def _only_finite_in(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(scores), scores, jnp.nan)


def count_nan(stacked: Sequence[jax.Array]) -> jax.Array:
    """Count the NaN of all arrays; small ones are counted as one."""
    small = [x for x in stacked if _is_small(x)]
    large = [x for x in stacked if not _is_small(x)]
    joined = [jnp.concatenate([x.reshape(-1) for x in small])] if small else []
    total = jnp.zeros([], jnp.int32)
    for scores in joined + large:
        numbers = counts.clip_to_int(thresholds.count_numbers(scores), scores.size)
        total += (scores.size - numbers).astype(jnp.int32)
    # Inside shard_map the count is that of all devices, and the state the same on each.
    varying = axes.varying_axes(total)
    if not varying:
        return total
    return jax.lax.psum(total, varying)  # type: ignore[no-untyped-call]


def _is_small(scores: jax.Array) -> bool:
    """Tell whether the layers [layers, ...] may be flattened and padded cheaply."""
    return math.prod(scores.shape[1:]) <= _TIERS[-1] and not axes.is_sharded(scores)


def pool(scores: jax.Array, pattern: patterns.Pattern) -> jax.Array:
    """Make one score of every block or channel of each layer."""
    return jax.vmap(lambda x: patterns.pool(x, pattern))(scores)


def spread(
    mask: jax.Array, pattern: patterns.Pattern, shape: tuple[int, ...]
) -> jax.Array:
    """Give every weight of each layer the decision for its block or channel."""
    return jax.vmap(lambda m: patterns.spread(m, pattern, shape))(mask)


def nm_masks(scores: jax.Array, pattern: patterns.NM) -> jax.Array:
    """Keep n of every m in each layer."""
    return jax.vmap(lambda x: patterns.make_mask(x, pattern=pattern))(scores)


def top_k(units: jax.Array, kept: Count | Threshold) -> jax.Array:
    """Mask the top `kept` units of each layer, one layer after another.

    A threshold, fields [layers], saves the search. A loop and not `vmap`: under `vmap`
    every search runs until the slowest is done. On a mesh it has to be `vmap`, because
    a loop over layers that are spread over devices would bring all of them to each.
    """
    if units.shape[0] == 1:
        return _mask(units[0], jax.tree.map(lambda limb: limb[0], kept))[None]
    if axes.is_sharded(units):
        kept = jax.tree.map(lambda limb: axes.spread_like(limb, units), kept)
        return jax.vmap(_mask)(units, kept)
    return jax.lax.map(lambda x: _mask(*x), (units, kept))


def _mask(units: jax.Array, kept: Count | Threshold) -> jax.Array:
    if isinstance(kept, Threshold):
        return selection.mask_above(units, kept)
    return selection.top_k_mask(units, kept)


def top_k_together(
    units: Sequence[jax.Array], kept: Sequence[Count] | Sequence[Threshold]
) -> list[jax.Array]:
    """Run `top_k` on every array, on the small ones of similar size by one loop."""
    masks: list[Any] = [None] * len(units)
    tiers: dict[int, list[int]] = {}
    for i, u in enumerate(units):
        if _is_small(u):
            tiers.setdefault(
                bisect.bisect_left(_TIERS, math.prod(u.shape[1:])), []
            ).append(i)
        else:
            masks[i] = top_k(u, kept[i])
    for tier in tiers.values():
        found = _top_k_padded([units[i] for i in tier], [kept[i] for i in tier])
        for i, mask in zip(tier, found, strict=True):
            masks[i] = mask
    return masks


def _top_k_padded(
    units: Sequence[jax.Array], kept: Sequence[Count | Threshold]
) -> list[jax.Array]:
    """Run `top_k` once on arrays of several shapes, flattened and padded.

    The padding is NaN and comes last, so it loses every comparison and every tie, and
    the masks of what was there are the same.
    """
    if len(units) == 1:
        return [top_k(units[0], kept[0])]
    width = max(math.prod(u.shape[1:]) for u in units)
    dtype = jnp.result_type(*(u.dtype for u in units))
    rows = []
    for u in units:
        flat = u.reshape(u.shape[0], -1).astype(dtype)
        room = ((0, 0), (0, width - flat.shape[1]))
        rows.append(jnp.pad(flat, room, constant_values=jnp.nan))
    together = top_k(
        jnp.concatenate(rows), jax.tree.map(lambda *k: jnp.concatenate(k), *kept)
    )
    masks, start = [], 0
    for u in units:
        rows_of_u = together[start : start + u.shape[0], : math.prod(u.shape[1:])]
        masks.append(rows_of_u.reshape(u.shape))
        start += u.shape[0]
    return masks
