"""Prune while training: an optimizer wrapper that keeps the smallest scores at zero.

On every update, with the inner optimizer's step d and the mask m (True = keep),

    update = d where m, -w elsewhere,

so `optax.apply_updates` leaves exact zeros and no latent copy is needed. On the counts

    begin_step, begin_step + every_steps, ..., and end_step,

the mask is first computed anew from the params and gradients that *enter* the step and
applies in the same step: gradual magnitude pruning when `sparsity` is a ramp (Zhu and
Gupta, arXiv:1710.01878). Weights that are pruned keep receiving gradients in the inner
optimizer; they return when a later mask keeps them.
"""

import functools
from typing import Literal

import jax
import optax

from jopt.arrays import patterns
from jopt.pruning import allocation as allocations
from jopt.pruning import masks
from jopt.pruning import scores as criteria
from jopt.pruning.arguments import (
    check_allocation,
    check_key_of,
    check_steps,
    check_uniform,
)
from jopt.pruning.leaves import Patterns, Sparsities, make_choice
from jopt.pruning.state import HostPruned
from jopt.pruning.wrapper import Method, due, masked, refresh
from jopt.trees import rules


def prune(
    inner: optax.GradientTransformation,
    *,
    sparsity: Sparsities = None,
    every_steps: int = 1,
    begin_step: int = 0,
    end_step: int | None = None,
    scores: criteria.ScoreFunction | criteria.Score = criteria.magnitude,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.uniform,
    stacked_axes: rules.StackedAxes = None,
    update: Literal["step", "host"] = "step",
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that a fraction `sparsity` of each selected leaf is exactly zero.

    update = where(mask, inner(g), -w);   mask = top (1 - sparsity) of scores(w, g)

    Zeros are exact for finite params in every dtype. Nothing added to NaN or inf gives
    zero, so non-finite scores rank last and `PruneState.num_nonfinite` counts them.

    Args:
        inner: any Optax transformation, chains and wrappers included. What follows
            `prune` in a chain may skip or delay a whole update, not scale or add to it.
        sparsity: fraction of zeros in [0, 1], a number, a traced scalar or a schedule
            count -> sparsity; read to six decimals; or ordered rules `{path: sparsity}`
            (leaves that none matches, or that map to None, are not pruned). None for
            `jopt.NM`, which fixes it.
        every_steps: updates between two mask updates, at least 1.
        begin_step: count of the first mask update; the mask keeps everything before it.
        end_step: count of the last mask update, always one itself; None for no end.
        scores: `(param, grad) -> scores` on a leaf, higher = keep, or a
            `jopt.scores.Score`.
        pattern: which weights live and die together; or ordered rules `{path:
            pattern}`. Leaves of one pattern and one sparsity share a budget.
        select: which leaves are pruned: a predicate `(path, leaf) -> bool`, a bool
            tree or `jopt.matching(...)`; None for float leaves with at least two axes,
            stacked ones not counted.
        allocation: how many weights each leaf keeps: `jopt.allocation.uniform` or
            `.global_ranking`.
        stacked_axes: which axis stacks layers (scan over layers): an int for all leaves
            or ordered rules `{pattern: axis}`. Stacked leaves are ranked per layer, and
            `pattern` sees one layer.
        update: "step" computes masks inside the update; "host" leaves that to
            `jopt.update_masks` between steps: less to compile and no temporary memory
            in the training step.
        key: a PRNG key for scores that need one.

    Returns:
        A transformation; `jopt.get_masks(state)` reads its masks.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: a number is out of range, `sparsity` is missing or clashes with the
            pattern, a leaf's shape does not fit the pattern, or a rule matches nothing.

    References:
        Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.prune(optax.sgd(0.1), sparsity=0.5)
    >>> params = {"w": jnp.array([[3.0, -1.0, 2.0, 0.5]])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones((1, 4))}, state, params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([[2.9, 0. , 1.9, 0. ]], dtype=float32)
    """
    choice = make_choice(sparsity, pattern, select, stacked_axes)
    check_allocation(allocation)
    check_uniform(allocation, pattern)
    check_steps(every_steps, begin_step, end_step)
    if update not in ("step", "host"):
        raise ValueError(f'update must be "step" or "host", got {update!r}')
    score = criteria.as_score(scores)
    check_key_of(score, key)
    recipe = masks.Recipe(score, allocation)
    method = Method(
        name="prune",
        choice=choice,
        score=score,
        is_due=due(every_steps, begin_step, end_step),
        renew=None
        if update == "host"
        else lambda leaves, count: masks.in_one_program(leaves, recipe, count),
    )
    tx = masked(inner, method, key=key)
    if update == "step":
        return tx
    pruned = HostPruned(*tx)
    pruned.refresh = functools.partial(refresh, method, recipe)
    pruned.is_due = method.is_due
    return pruned
