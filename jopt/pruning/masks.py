"""Scores to masks for many leaves at once, without code for every leaf.

Per layer: scores -> one score per unit of the pattern (a weight, a block, a channel) ->
how many units stay (allocation) -> the exact top k -> the packed mask. The search for
the k-th largest is what is large to compile, so the layers of leaves of one shape are
stacked and searched by one loop, and small layers of any shape are padded to one size:
code grows with the number of large shapes, not of leaves. Stacking takes a copy of the
scores; lots are cut at `_LOT_SIZE` scores to bound it.

`in_one_program` does all leaves inside the caller's program; `leaf_by_leaf` runs
outside of jit, stacks nothing and compiles one small program per shape.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import axes, counts, packing, patterns, selection, thresholds
from jopt.arrays.counts import Count
from jopt.pruning.allocation import Allocation, Units
from jopt.pruning.scores import Score, ScoreInputs

_LOT_SIZE = 1 << 25
_TIERS = (1 << 10, 1 << 13, 1 << 16)  # sizes up to which small layers are padded


class Recipe(NamedTuple):
    """What is chosen once."""

    sparsity: float | jax.Array | optax.Schedule | None
    score: Score
    pattern: patterns.Pattern
    allocation: Allocation

    def sparsity_at(self, count: jax.Array) -> Any:
        """Evaluate a schedule; a number stays as it is."""
        return self.sparsity(count) if callable(self.sparsity) else self.sparsity


class Leaf(NamedTuple):
    """What the mask of one leaf is computed from."""

    inputs: ScoreInputs
    score_state: Any
    stacked_axis: int | None

    @property
    def is_packed(self) -> bool:
        """How the state stores the mask."""
        return self.inputs.packed_mask.dtype == jnp.uint8


def full_mask(param: jax.Array) -> jax.Array:
    """Return the mask that keeps all of `param`, sharded alike, packed if possible."""
    return packing.pack_mask(jnp.ones_like(param, jnp.bool_))


def layer_shape(param: jax.Array, stacked_axis: int | None) -> tuple[int, ...]:
    """Return the shape of one layer of a leaf."""
    if stacked_axis is None:
        return param.shape
    return param.shape[:stacked_axis] + param.shape[stacked_axis + 1 :]


def in_one_program(
    leaves: Sequence[Leaf], recipe: Recipe, count: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Compute all packed masks, and how many scores were not finite."""
    scored = [layer_scores(*leaf, recipe.score) for leaf in leaves]
    lots = _lots(scored)
    stacked = [_stack([scored[i] for i in lot]) for lot in lots]
    masks, num_nonfinite = _masks(
        stacked, lots, [s.shape[0] for s in scored], recipe, count, {}
    )
    packed: list[Any] = [None] * len(leaves)
    for lot, mask in zip(lots, masks, strict=True):
        # Together where the last axis is that of the leaves: it is less code.
        early = all(_is_packed_as_it_lies(leaves[i]) for i in lot)
        whole = packing.pack_mask(mask) if early else mask
        start = 0
        for i in lot:
            stop = start + scored[i].shape[0]
            leaf = leaves[i]
            late = leaf.is_packed and whole.dtype == jnp.bool_
            packed[i] = pack_layers(whole[start:stop], leaf.stacked_axis, late)
            start = stop
    return packed, num_nonfinite


def _is_packed_as_it_lies(leaf: Leaf) -> bool:
    """Tell whether the last axis of the leaf is that of its layers too."""
    return leaf.is_packed and leaf.stacked_axis != leaf.inputs.param.ndim - 1


def leaf_by_leaf(
    leaves: Sequence[Leaf], recipe: Recipe, count: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Compute what `in_one_program` does, with one compiled program per shape."""
    scored = [_jit_layer_scores(*leaf, recipe.score) for leaf in leaves]
    lots = [[i] for i in range(len(leaves))]
    masks, num_nonfinite = _masks(
        scored, lots, [s.shape[0] for s in scored], recipe, count, _COMPILED
    )
    packed = [
        _jit_pack_layers(mask, leaf.stacked_axis, leaf.is_packed)
        for mask, leaf in zip(masks, leaves, strict=True)
    ]
    return packed, num_nonfinite


def layer_scores(
    inputs: ScoreInputs, score_state: Any, stacked_axis: int | None, score: Score
) -> jax.Array:
    """Score a leaf: shape [layers, ...]."""
    try:
        scores = score.scores(inputs, score_state)
    except (TypeError, AttributeError) as error:
        if inputs.grad is not None:
            raise
        raise ValueError(
            "grads must be given for scores that read them, got None; "
            "call jopt.update_masks(pruned, state, params, grads=grads)"
        ) from error
    shape = inputs.param.shape
    if scores.shape != shape:
        raise ValueError(
            f"scores must return one score per weight, shape {shape}, got "
            f"{scores.shape}; a pattern reduces over blocks or channels"
        )
    if scores.dtype == jnp.float64:  # selection compares keys of 32 bits
        scores = scores.astype(jnp.float32)
    return (
        scores[None] if stacked_axis is None else jnp.moveaxis(scores, stacked_axis, 0)
    )


def pack_layers(
    mask: jax.Array, stacked_axis: int | None, is_packed: bool
) -> jax.Array:
    """Put the layers of a leaf back where they stand, and pack."""
    mask = mask[0] if stacked_axis is None else jnp.moveaxis(mask, 0, stacked_axis)
    return packing.pack_mask(mask) if is_packed else mask


def _masks(
    stacked: Sequence[jax.Array],
    lots: Sequence[Sequence[int]],
    num_layers: Sequence[int],
    recipe: Recipe,
    count: jax.Array,
    compiled: Mapping[Any, Any],
) -> tuple[list[jax.Array], jax.Array]:
    """Turn stacked scores [layers, ...] into masks of the same shapes.

    `compiled` has the jitted form of steps that are to be programs of their own.
    """

    def own(step: Any) -> Any:
        return compiled.get(step, step)

    pattern = recipe.pattern
    stacked = [own(_only_finite)(scores) for scores in stacked]
    # Together where that saves code, one by one where programs are to be shared.
    lists = [[scores] for scores in stacked] if compiled else [list(stacked)]
    num_nonfinite = sum(map(own(_count_nan), lists), jnp.zeros([], jnp.int32))
    if isinstance(pattern, patterns.NM):
        return [own(_nm_masks)(scores, pattern) for scores in stacked], num_nonfinite
    pooled = [own(_pool)(scores, pattern) for scores in stacked]
    first = [sum(num_layers[:i]) for i in range(len(num_layers))]
    units = [
        Units(scores, tuple(first[i] + j for i in lot for j in range(num_layers[i])))
        for scores, lot in zip(pooled, lots, strict=True)
    ]
    kept = recipe.allocation(units, recipe.sparsity_at(count))
    if compiled:
        masks = [own(_top_k)(u, k) for u, k in zip(pooled, kept, strict=True)]
    else:
        masks = _top_k_together(pooled, kept)
    return [
        own(_spread)(mask, pattern, scores.shape[1:])
        for mask, scores in zip(masks, stacked, strict=True)
    ], num_nonfinite


def _only_finite(scores: jax.Array) -> jax.Array:
    """Put NaN for what is not finite.

    A NaN ranks below every number, so what cannot be made zero is given up first and
    does not take the place of a weight that can be kept.
    """
    if (
        len(scores) == 1
    ):  # with its axis in the way, XLA keeps two copies of a large leaf
        return jnp.expand_dims(_only_finite_in(jnp.squeeze(scores, 0)), 0)
    return _only_finite_in(scores)


def _only_finite_in(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(scores), scores, jnp.nan)


def _count_nan(stacked: Sequence[jax.Array]) -> jax.Array:
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


def _pool(scores: jax.Array, pattern: patterns.Pattern) -> jax.Array:
    return jax.vmap(lambda x: patterns.pool(x, pattern))(scores)


def _spread(
    mask: jax.Array, pattern: patterns.Pattern, shape: tuple[int, ...]
) -> jax.Array:
    return jax.vmap(lambda m: patterns.spread(m, pattern, shape))(mask)


def _nm_masks(scores: jax.Array, pattern: patterns.NM) -> jax.Array:
    return jax.vmap(lambda x: patterns.make_mask(x, pattern=pattern))(scores)


def _top_k(units: jax.Array, kept: Count) -> jax.Array:
    """Mask the top `kept` units of each layer, one layer after another.

    A loop and not `vmap`: under `vmap` every search runs until the slowest is done. On
    a mesh it has to be `vmap`, because a loop over layers that are spread over devices
    would bring all of them to each.
    """
    if units.shape[0] == 1:
        first = Count(*(limb[0] for limb in kept))
        return selection.top_k_mask(units[0], first)[None]
    if axes.is_sharded(units):
        kept = jax.tree.map(lambda limb: axes.spread_like(limb, units), kept)
        return jax.vmap(selection.top_k_mask)(units, kept)
    return jax.lax.map(lambda x: selection.top_k_mask(*x), (units, kept))


def _top_k_together(
    units: Sequence[jax.Array], kept: Sequence[Count]
) -> list[jax.Array]:
    """Run `_top_k` on every array, on the small ones of similar size by one loop."""
    masks: list[Any] = [None] * len(units)
    tiers: dict[int, list[int]] = {}
    for i, u in enumerate(units):
        if _is_small(u):
            tiers.setdefault(
                bisect.bisect_left(_TIERS, math.prod(u.shape[1:])), []
            ).append(i)
        else:
            masks[i] = _top_k(u, kept[i])
    for tier in tiers.values():
        found = _top_k_padded([units[i] for i in tier], [kept[i] for i in tier])
        for i, mask in zip(tier, found, strict=True):
            masks[i] = mask
    return masks


def _top_k_padded(units: Sequence[jax.Array], kept: Sequence[Count]) -> list[jax.Array]:
    """Run `_top_k` once on arrays of several shapes, flattened and padded.

    The padding is NaN and comes last, so it loses every comparison and every tie, and
    the masks of what was there are the same.
    """
    if len(units) == 1:
        return [_top_k(units[0], kept[0])]
    width = max(math.prod(u.shape[1:]) for u in units)
    dtype = jnp.result_type(*(u.dtype for u in units))
    rows = []
    for u in units:
        flat = u.reshape(u.shape[0], -1).astype(dtype)
        room = ((0, 0), (0, width - flat.shape[1]))
        rows.append(jnp.pad(flat, room, constant_values=jnp.nan))
    together = _top_k(
        jnp.concatenate(rows), jax.tree.map(lambda *k: jnp.concatenate(k), *kept)
    )
    masks, start = [], 0
    for u in units:
        rows_of_u = together[start : start + u.shape[0], : math.prod(u.shape[1:])]
        masks.append(rows_of_u.reshape(u.shape))
        start += u.shape[0]
    return masks


def _lots(scored: Sequence[jax.Array]) -> list[list[int]]:
    """Put leaves with layers of one shape and dtype together, up to the lot size.

    What an explicit mesh places differently stays apart.
    """
    lots: dict[Any, list[list[int]]] = {}
    for i, scores in enumerate(scored):
        kind = (scores.shape[1:], scores.dtype, axes.named_sharding(scores))
        same = lots.setdefault(kind, [[]])
        if same[-1] and sum(scored[j].size for j in same[-1]) + scores.size > _LOT_SIZE:
            same.append([])
        same[-1].append(i)
    return [lot for same in lots.values() for lot in same]


def _stack(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


_jit_layer_scores = jax.jit(layer_scores, static_argnames=("stacked_axis", "score"))
_jit_pack_layers = jax.jit(pack_layers, static_argnames=("stacked_axis", "is_packed"))


_COMPILED = {
    fn: jax.jit(fn, static_argnames=static)
    for fn, static in (
        (_only_finite, ()),
        (_count_nan, ()),
        (_pool, ("pattern",)),
        (_spread, ("pattern", "shape")),
        (_nm_masks, ("pattern",)),
        (_top_k, ()),
    )
}
