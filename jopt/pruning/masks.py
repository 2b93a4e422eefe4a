"""Scores to masks for many leaves at once, without code for every leaf.

Per layer: scores -> one score per unit of the pattern (a weight, a block, a channel) ->
how many units stay (allocation) -> the exact top k -> the packed mask. Leaves of one
pattern and one sparsity share a budget.

`in_one_program` does all leaves inside the caller's program; `host.leaf_by_leaf` runs
outside of jit, with one small program per shape.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.arrays import axes, packing, patterns
from jopt.pruning import layers
from jopt.pruning.allocation import Allocation, Units
from jopt.pruning.allocation.ranking import cuts
from jopt.pruning.leaves import Leaf
from jopt.pruning.scores import Score, ScoreInputs


class Recipe(NamedTuple):
    """What is chosen once for all leaves."""

    score: Score
    allocation: Allocation


def full_mask(param: jax.Array) -> jax.Array:
    """Return the mask that keeps all of `param`, sharded alike, packed if possible.

    How it is stored decides that for all masks after it. So it is decided here, where
    params may be seen as they lie on their devices: bytes that two devices share would
    have to be gathered whenever masks move.
    """
    mask = jnp.ones_like(param, jnp.bool_)
    return packing.pack_mask(mask) if axes.has_whole_bytes(param) else mask


def in_one_program(
    leaves: Sequence[Leaf], recipe: Recipe, count: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Compute all packed masks, and how many scores were not finite."""
    scored = [score_layers(leaf, recipe.score) for leaf in leaves]

    def masks(group: Sequence[int]) -> tuple[list[jax.Array], jax.Array]:
        mine = [scored[i] for i in group]
        lots = layers.make_lots(mine)
        stacked = layers.stack(mine, lots)
        members = [leaves[i] for i in group]
        found, num_nonfinite = _masks(stacked, lots, members, recipe, count)
        return take_apart(found, lots, members, mine), num_nonfinite

    return by_group(leaves, masks)


def by_group(
    leaves: Sequence[Leaf],
    masks: Callable[[Sequence[int]], tuple[list[jax.Array], jax.Array]],
) -> tuple[list[jax.Array], jax.Array]:
    """Compute masks for the leaves of each pattern and sparsity together."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        sparsity = leaf.plan.sparsity
        is_number = isinstance(sparsity, int | float)
        budget = sparsity if is_number else id(sparsity)
        groups.setdefault((leaf.plan.pattern, is_number, budget), []).append(i)
    packed: list[Any] = [None] * len(leaves)
    total = jnp.zeros([], jnp.int32)
    for group in groups.values():
        found, num_nonfinite = masks(group)
        total += num_nonfinite
        for i, mask in zip(group, found, strict=True):
            packed[i] = mask
    return packed, total


def take_apart(
    stacked: Sequence[jax.Array],
    lots: Sequence[Sequence[int]],
    leaves: Sequence[Leaf],
    scored: Sequence[jax.Array],
) -> list[Any]:
    """Give each leaf its masks out of those of the lots, packed as the state is."""
    return layers.unstack(
        stacked,
        lots,
        [leaf.plan.stacked_axis for leaf in leaves],
        [leaf.inputs.param.ndim for leaf in leaves],
        [x.shape[0] for x in scored],
        [leaf.is_packed for leaf in leaves],
    )


def score_layers(leaf: Leaf, score: Score) -> jax.Array:
    """Score a leaf: shape [layers, ...]."""
    return score_of(leaf.inputs, leaf.score_state, leaf.plan.stacked_axis, score)


def score_of(
    inputs: ScoreInputs, score_state: Any, stacked_axis: int | None, score: Score
) -> jax.Array:
    """Score what is known of a leaf: shape [layers, ...]."""
    # Compiled alone, what is in the inputs is traced, and an axis must not be.
    inputs = inputs._replace(stacked_axis=stacked_axis)
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
    if getattr(scores, "shape", None) != shape:
        raise ValueError(
            f"scores must return one score per weight, shape {shape}, got "
            f"{getattr(scores, 'shape', repr(scores))}; a pattern reduces over blocks "
            "or channels"
        )
    if scores.dtype == jnp.float64:  # selection compares keys of 32 bits
        scores = scores.astype(jnp.float32)
    return layers.to_layers(scores, stacked_axis)


def units_of(
    pooled: Sequence[jax.Array],
    lots: Sequence[Sequence[int]],
    leaves: Sequence[Leaf],
    num_layers: Sequence[int],
) -> list[Units]:
    """Describe pooled scores to an allocation."""
    first = [sum(num_layers[:i]) for i in range(len(num_layers))]
    found = []
    for scores, lot in zip(pooled, lots, strict=True):
        plan = leaves[lot[0]].plan
        shape = leaves[lot[0]].inputs.param.shape
        found.append(
            Units(
                scores,
                tuple(first[i] + j for i in lot for j in range(num_layers[i])),
                tuple(
                    leaves[i].plan.path
                    if axis is None
                    else f"{leaves[i].plan.path}[{j}]"
                    for i in lot
                    for axis in [leaves[i].plan.stacked_axis]
                    for j in range(num_layers[i])
                ),
                layers.layer_shape(shape, plan.stacked_axis),
            )
        )
    return found


def _masks(
    stacked: Sequence[jax.Array],
    lots: Sequence[Sequence[int]],
    leaves: Sequence[Leaf],
    recipe: Recipe,
    count: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """Turn stacked scores [layers, ...] of one group into masks of the same shapes."""
    plan = leaves[0].plan
    pattern = plan.pattern
    stacked = [layers.only_finite(scores) for scores in stacked]
    num_nonfinite = layers.count_nan(stacked)
    if isinstance(pattern, patterns.NM):
        found = [layers.nm_masks(scores, pattern) for scores in stacked]
        return found, num_nonfinite
    pooled = [layers.pool(scores, pattern) for scores in stacked]
    num_layers = _num_layers(stacked, lots, leaves)
    units = units_of(pooled, lots, leaves, num_layers)
    kept = cuts(recipe.allocation, units, plan.sparsity_at(count))
    found = layers.top_k_together(pooled, kept)
    return [
        layers.spread(mask, pattern, scores.shape[1:])
        for mask, scores in zip(found, stacked, strict=True)
    ], num_nonfinite


def _num_layers(
    stacked: Sequence[jax.Array], lots: Sequence[Sequence[int]], leaves: Sequence[Leaf]
) -> list[int]:
    """Count the layers of each leaf."""
    found = [0] * len(leaves)
    for scores, lot in zip(stacked, lots, strict=True):
        for i in lot:
            axis, param = leaves[i].plan.stacked_axis, leaves[i].inputs.param
            found[i] = 1 if axis is None else param.shape[axis]
        assert sum(found[i] for i in lot) == scores.shape[0]
    return found
