"""Scores to masks between two steps, outside of jit: one small program per shape.

Layers of one shape are scored into one array, each program writing its part in place,
so that a search over all leaves reads a few large arrays:

    scores of a leaf -> its rows of the lot -> kept units (allocation) -> mask of a leaf

Leaves that lie on several devices keep arrays of their own.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import patterns
from jopt.arrays.counts import Count
from jopt.arrays.selection import Threshold
from jopt.pruning import layers, masks
from jopt.pruning.allocation.ranking import cuts
from jopt.pruning.leaves import Leaf
from jopt.pruning.scores import Score, ScoreInputs

# Scores. Beyond 32 MiB memory goes back to the system and page faults cost more than
# the search; beyond a fourth of all leaves the lots, and with them code, are few.
_LOT_SIZE = 7 << 20
_LOTS = 4
_LARGEST_LOT = 1 << 30  # below 2^31, which is how far a slice is counted
# Leaves per call where a lot has as many: to start a program costs as much as some
# 100,000 weights do.
_AT_ONCE = 8


class _Lot(NamedTuple):
    """Leaves that one program scores, and where the rows of each begin."""

    members: list[int]
    starts: list[int]
    scores: jax.Array  # [layers of all, ...], pooled


def leaf_by_leaf(
    leaves: Sequence[Leaf], recipe: masks.Recipe, count: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Compute what `masks.in_one_program` does, with few programs for each shape."""

    def make(group: Sequence[int]) -> tuple[list[jax.Array], jax.Array]:
        members = [leaves[i] for i in group]
        plan = members[0].plan
        if isinstance(plan.pattern, patterns.NM):
            return _nm_masks(members, plan.pattern, recipe.score)
        lots, num_nonfinite = _score_lots(members, recipe.score)
        units = masks.units_of(
            [lot.scores for lot in lots],
            [lot.members for lot in lots],
            members,
            [_num_layers(leaf) for leaf in members],
        )
        found: list[Any] = [None] * len(members)
        kept = cuts(recipe.allocation, units, plan.sparsity_at(count))
        for lot, cut in zip(lots, kept, strict=True):
            for first, number in _calls(len(lot.members)):
                leaf = members[lot.members[first]]
                made = _mask_rows(
                    lot.scores,
                    cut,
                    lot.starts[first],
                    number,
                    leaf.inputs.param.shape,
                    leaf.plan.stacked_axis,
                    plan.pattern,
                    leaf.is_packed,
                )
                for i, mask in zip(lot.members[first:], made, strict=False):
                    found[i] = mask
        return found, num_nonfinite

    return masks.by_group(leaves, make)


def _calls(number: int) -> list[tuple[int, int]]:
    """Split leaves among calls of two sizes: which is the first, and how many."""
    many = number - number % _AT_ONCE
    calls = [(i, _AT_ONCE) for i in range(0, many, _AT_ONCE)]
    return calls + [(i, 1) for i in range(many, number)]


def _num_layers(leaf: Leaf) -> int:
    axis = leaf.plan.stacked_axis
    return 1 if axis is None else leaf.inputs.param.shape[axis]


def _score_lots(leaves: Sequence[Leaf], score: Score) -> tuple[list[_Lot], jax.Array]:
    """Score all leaves into lots, and count what is not finite."""
    found, has_nan = [], []
    total = jnp.zeros([], jnp.int32)
    for members in _make_lots(leaves):
        starts, rows = [], 0
        for i in members:
            starts.append(rows)
            rows += _num_layers(leaves[i])
        first = _arguments(leaves[members[0]])
        if len(members) == 1:
            scores, num_nonfinite = _score(*first, score=score)
        else:
            shape: Any = _shape_of_scores(*first, score=score)
            # As the leaves are, or what follows is compiled for both kinds.
            place = _place(leaves[members[0]])
            place = place if leaves[members[0]].inputs.param.committed else None
            shape = (rows, *shape.shape[1:]), shape.dtype
            scores = jnp.zeros(*shape, device=place)
            num_nonfinite = jnp.zeros([], jnp.int32, device=place)
            for i, number in _calls(len(members)):
                each = [_arguments(leaves[j])[:2] for j in members[i : i + number]]
                scores, num_nonfinite = _score_into(
                    scores, num_nonfinite, starts[i], each, *first[2:], score=score
                )
        if _keeps_shape(leaves[members[0]].plan.pattern):
            has_nan.append((_sum(scores), scores))
        else:
            total += num_nonfinite
        found.append(_Lot(members, starts, scores))
    for number, scores in has_nan:  # asked when all are on their way
        if np.isnan(number):
            total += _count_nan([scores])
    return found, total


def _keeps_shape(pattern: patterns.Pattern) -> bool:
    """Tell whether units are weights, so that NaN can be counted in a whole lot."""
    return isinstance(pattern, patterns.Unstructured)


def _shape_of_scores(*arguments: Any, score: Score) -> Any:
    return _score.eval_shape(*arguments, score=score)[0]  # type: ignore[no-untyped-call]


def _arguments(leaf: Leaf) -> tuple[ScoreInputs, Any, int | None, patterns.Pattern]:
    inputs = leaf.inputs._replace(stacked_axis=None)  # traced, and an axis must not be
    return inputs, leaf.score_state, leaf.plan.stacked_axis, leaf.plan.pattern


def _place(leaf: Leaf) -> Any:
    """Return the device of a leaf that lies on one, else None."""
    sharding = getattr(leaf.inputs.param, "sharding", None)
    if sharding is None or len(sharding.device_set) > 1:
        return None
    return next(iter(sharding.device_set))


def _make_lots(leaves: Sequence[Leaf]) -> list[list[int]]:
    """Put leaves together that one program can score, in lots of even size."""
    kinds: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        arrays, treedef = jax.tree.flatten(_arguments(leaf)[:2])
        place = _place(leaf)
        alike = (leaf.plan.stacked_axis, treedef, *map(jax.typeof, arrays))
        kinds.setdefault((i if place is None else place, alike), []).append(i)
    everything = sum(leaf.inputs.param.size for leaf in leaves)
    limit = min(max(_LOT_SIZE, everything // _LOTS), _LARGEST_LOT)
    lots = []
    for same in kinds.values():
        most = max(limit // leaves[same[0]].inputs.param.size, 1)
        each = -(-len(same) // -(-len(same) // most))
        lots += [same[i : i + each] for i in range(0, len(same), each)]
    return lots


def _nm_masks(
    leaves: Sequence[Leaf], pattern: patterns.NM, score: Score
) -> tuple[list[jax.Array], jax.Array]:
    found = [
        _nm_mask(*_arguments(leaf), score=score, is_packed=leaf.is_packed)
        for leaf in leaves
    ]
    total = sum((n for _, n in found), jnp.zeros([], jnp.int32))
    return [mask for mask, _ in found], total


def _finite_scores(
    inputs: ScoreInputs, score_state: Any, stacked_axis: int | None, score: Score
) -> jax.Array:
    scores = masks.score_of(inputs, score_state, stacked_axis, score)
    return layers.only_finite(scores)


@functools.partial(jax.jit, static_argnums=(2, 3), static_argnames="score")
def _score(
    inputs: ScoreInputs,
    score_state: Any,
    stacked_axis: int | None,
    pattern: patterns.Pattern,
    *,
    score: Score,
) -> tuple[jax.Array, jax.Array]:
    """Score the units of one leaf, [layers, ...], and count NaN if they are pooled."""
    scores = _finite_scores(inputs, score_state, stacked_axis, score)
    if _keeps_shape(pattern):
        return scores, jnp.zeros([], jnp.int32)
    return layers.pool(scores, pattern), layers.count_nan([scores])


@functools.partial(
    jax.jit, static_argnums=(4, 5), static_argnames="score", donate_argnums=0
)
def _score_into(
    lot: jax.Array,
    total: jax.Array,
    start: jax.Array,
    leaves: Sequence[tuple[ScoreInputs, Any]],
    stacked_axis: int | None,
    pattern: patterns.Pattern,
    *,
    score: Score,
) -> tuple[jax.Array, jax.Array]:
    """Score the units of leaves into their rows of the lot, from one on."""
    for inputs, score_state in leaves:
        scores, num_nonfinite = _score(
            inputs, score_state, stacked_axis, pattern, score=score
        )
        lot = jax.lax.dynamic_update_slice_in_dim(lot, scores, start, 0)
        total, start = total + num_nonfinite, start + scores.shape[0]
    return lot, total


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _mask_rows(
    lot: jax.Array,
    kept: Count | Threshold,
    start: jax.Array,
    number: int,
    shape: tuple[int, ...],
    stacked_axis: int | None,
    pattern: patterns.Pattern,
    is_packed: bool,
) -> list[jax.Array]:
    """Make the masks of leaves out of their rows of the lot, from one on."""
    num_layers = 1 if stacked_axis is None else shape[stacked_axis]
    found = []
    for i in range(number):

        def rows(array: jax.Array, begin: Any = start + i * num_layers) -> jax.Array:
            if array.shape[0] == num_layers:
                return array
            return jax.lax.dynamic_slice_in_dim(array, begin, num_layers)

        mask = layers.top_k(rows(lot), jax.tree.map(rows, kept))
        mask = layers.spread(mask, pattern, layers.layer_shape(shape, stacked_axis))
        found.append(layers.pack_layers(mask, stacked_axis, is_packed))
    return found


@functools.partial(
    jax.jit, static_argnums=(2, 3), static_argnames=("score", "is_packed")
)
def _nm_mask(
    inputs: ScoreInputs,
    score_state: Any,
    stacked_axis: int | None,
    pattern: patterns.NM,
    *,
    score: Score,
    is_packed: bool,
) -> tuple[jax.Array, jax.Array]:
    scores = _finite_scores(inputs, score_state, stacked_axis, score)
    mask = layers.pack_layers(layers.nm_masks(scores, pattern), stacked_axis, is_packed)
    return mask, layers.count_nan([scores])


_count_nan = jax.jit(layers.count_nan)
_sum = jax.jit(lambda scores: jnp.sum(scores, dtype=jnp.float32))  # NaN if one is
