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

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import packing, patterns
from jopt.pruning import allocation as allocations
from jopt.pruning import masks
from jopt.pruning import scores as criteria
from jopt.pruning.state import HostPruned, PruneState
from jopt.trees import paths, rules
from jopt.updates.project import (
    require_count,
    require_floats,
    require_params,
    require_transformation,
)
from jopt.updates.states import is_masked_node


def prune(
    inner: optax.GradientTransformation,
    *,
    sparsity: float | jax.Array | optax.Schedule | None = None,
    every_steps: int = 1,
    begin_step: int = 0,
    end_step: int | None = None,
    scores: criteria.ScoreFunction | criteria.Score = criteria.magnitude,
    pattern: patterns.Pattern = patterns.Unstructured(),  # noqa: B008
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
            count -> sparsity; read to six decimals. None for `jopt.NM`, which fixes it.
        every_steps: updates between two mask updates, at least 1.
        begin_step: count of the first mask update; the mask keeps everything before it.
        end_step: count of the last mask update, always one itself; None for no end.
        scores: `(param, grad) -> scores` on a leaf, higher = keep, or a
            `jopt.scores.Score`.
        pattern: which weights live and die together.
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
    _check(sparsity, every_steps, begin_step, end_step, pattern, allocation, update)
    inner = require_transformation(inner, "prune")
    score = criteria.as_score(scores)
    if score.random and key is None:
        raise ValueError(
            "key must be given for random scores, got None; "
            "for example key=jax.random.key(0)"
        )
    recipe = masks.Recipe(sparsity, score, pattern, allocation)

    def init(params: optax.Params) -> PruneState:
        require_floats(params, "prune")
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        stacks = rules.stacked_axis_of(stacked_axes, params)
        chosen = rules.select_leaves(select, params, stacked_axes=stacked_axes)
        chosen = [c and leaf.size > 0 for c, leaf in zip(chosen, leaves, strict=True)]
        rules.warn_if_none(chosen, "prune")
        for leaf, path, axis, c in zip(
            leaves, paths.leaf_paths(params), stacks, chosen, strict=True
        ):
            if c:
                patterns.check_pattern(
                    pattern, masks.layer_shape(leaf, axis), path=path
                )
        return PruneState(
            count=jnp.zeros([], jnp.int32),
            masks=_tree_of(masks.full_mask, leaves, chosen, treedef),
            score_state=_tree_of(score.init, leaves, chosen, treedef),
            # A copy, because the state may be donated.
            key=jax.random.key(0) if key is None else jnp.copy(key),
            num_nonfinite=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
        )

    def is_due(count: jax.Array) -> jax.Array:
        since = count - begin_step
        due = (since >= 0) & (since % every_steps == 0)
        if end_step is None:
            return due
        return (due & (count <= end_step)) | (count == end_step)

    def gather(
        state: PruneState,
        params: optax.Params,
        grads: optax.Updates | None,
        extra_args: Mapping[str, Any],
    ) -> list[masks.Leaf]:
        stacks = rules.stacked_axis_of(stacked_axes, params)
        return _selected_leaves(
            state, params, grads, extra_args, stacks, random=score.random
        )

    def update_fn(
        updates: optax.Updates,
        state: PruneState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PruneState]:
        require_params(params, "prune")
        steps, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        treedef: Any
        packed, treedef = jax.tree.flatten(state.masks)
        leaves = gather(state, params, updates, extra_args)
        leaves = [
            leaf._replace(score_state=score.update(leaf.inputs, leaf.score_state))
            for leaf in leaves
        ]
        num_nonfinite = state.num_nonfinite
        if update == "step" and packed:
            packed, num_nonfinite = jax.lax.cond(
                is_due(state.count),
                lambda: _placed_as(
                    (packed, num_nonfinite),
                    masks.in_one_program(leaves, recipe, state.count),
                ),
                lambda: (packed, num_nonfinite),
            )
        new_masks = treedef.unflatten(packed)
        new_updates = jax.tree.map(
            _mask_step, new_masks, steps, params, is_leaf=is_masked_node
        )
        return new_updates, PruneState(
            count=optax.safe_increment(state.count),
            masks=new_masks,
            score_state=treedef.unflatten([leaf.score_state for leaf in leaves]),
            key=state.key,
            num_nonfinite=num_nonfinite,
            inner_state=inner_state,
        )

    if update == "step":
        return optax.GradientTransformationExtraArgs(init, update_fn)

    def refresh(
        state: PruneState,
        params: optax.Params,
        grads: optax.Updates | None,
        extra_args: Mapping[str, Any],
    ) -> PruneState:
        treedef: Any
        old, treedef = jax.tree.flatten(state.masks)
        packed, num_nonfinite = masks.leaf_by_leaf(
            gather(state, params, grads, extra_args), recipe, state.count
        )
        # Where the old masks lie: the training step is compiled for that.
        placed = [
            jax.device_put(b, a.sharding) for a, b in zip(old, packed, strict=True)
        ]
        return state._replace(
            masks=treedef.unflatten(placed), num_nonfinite=num_nonfinite
        )

    pruned = HostPruned(init, update_fn)
    pruned.refresh, pruned.is_due = refresh, is_due
    return pruned


def _tree_of(
    fn: Callable[[jax.Array], Any], leaves: list[Any], chosen: list[bool], treedef: Any
) -> Any:
    return treedef.unflatten(
        [
            fn(leaf) if c else optax.MaskedNode()
            for leaf, c in zip(leaves, chosen, strict=True)
        ]
    )


def _placed_as(old: Any, new: Any) -> Any:
    """Give new masks the explicit sharding of the old ones; elsewhere do nothing."""

    def place(a: jax.Array, b: jax.Array) -> jax.Array:
        sharding = jax.typeof(a).sharding
        fits = sharding.mesh.empty or sharding == jax.typeof(b).sharding
        if fits:
            return b
        return jax.sharding.reshard(b, sharding)  # type: ignore[no-untyped-call]

    return jax.tree.map(place, old, new)


def _mask_step(packed: Any, step: jax.Array, param: jax.Array) -> jax.Array:
    if is_masked_node(packed):
        return step
    # In the wider of both dtypes: a rounded -param would leave a rest behind.
    return jnp.where(packing.unpack_mask(packed), step, -param)


def _selected_leaves(
    state: PruneState,
    params: optax.Params,
    grads: optax.Updates | None,
    extra_args: Mapping[str, Any],
    stacks: list[int | None],
    *,
    random: bool,
) -> list[masks.Leaf]:
    """Gather what a mask is computed from, for the selected leaves in order."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    packed = treedef.flatten_up_to(state.masks)
    memory = treedef.flatten_up_to(state.score_state)
    gradients = [None] * len(leaves) if grads is None else treedef.flatten_up_to(grads)
    for p, g, m, path in zip(
        leaves, gradients, packed, paths.leaf_paths(params), strict=True
    ):
        if not is_masked_node(m):
            _check_leaf(p, g, m, path, has_grads=grads is not None)
    # Folding is code for every leaf: only where it is used.
    key = jax.random.fold_in(state.key, state.count) if random else state.key
    return [
        masks.Leaf(
            inputs=criteria.ScoreInputs(
                param=p,
                grad=g,
                packed_mask=m,
                count=state.count,
                key=paths.fold_path(key, path) if random else key,
                extra_args=extra_args,
            ),
            score_state=s,
            stacked_axis=axis,
        )
        for p, g, s, m, path, axis in zip(
            leaves,
            gradients,
            memory,
            packed,
            paths.leaf_paths(params),
            stacks,
            strict=True,
        )
        if not is_masked_node(m)
    ]


def _check_leaf(
    param: jax.Array, grad: Any, mask: jax.Array, path: str, *, has_grads: bool
) -> None:
    if not packing.is_mask_of(mask, param.shape):
        raise ValueError(
            f"params must have the shapes that init saw, got {param.shape} at {path!r} "
            f"for a mask {mask.dtype}{list(mask.shape)}; make a new state"
        )
    if has_grads and grad is None:
        raise ValueError(
            f"updates must hold a gradient for {path!r}, which is pruned, got None; "
            "leave the leaf out by select="
        )


def _check(
    sparsity: Any,
    every_steps: Any,
    begin_step: Any,
    end_step: Any,
    pattern: patterns.Pattern,
    allocation: Any,
    update: str,
) -> None:
    """Raise for arguments that are wrong whatever the params; traced ones pass."""
    if isinstance(pattern, patterns.NM):
        if sparsity is not None:
            raise ValueError(
                f"sparsity must be None for {pattern}, got {sparsity!r}; the pattern "
                f"fixes it at {pattern.m - pattern.n} of {pattern.m}"
            )
        if allocation is not allocations.uniform:
            raise ValueError(
                f"allocation must be uniform for {pattern}, which keeps "
                f"{pattern.n} of every {pattern.m} everywhere, got {allocation!r}"
            )
    elif sparsity is None:
        raise ValueError(
            f"sparsity must be given for {pattern}, got None; a fraction in [0, 1] or "
            "a schedule such as jopt.schedules.cubic_sparsity"
        )
    if isinstance(sparsity, int | float) and not 0.0 <= sparsity <= 1.0:
        raise ValueError(
            f"sparsity must be a fraction in [0, 1], got {sparsity}; "
            "90 % of zeros is 0.9"
        )
    require_count("every_steps", every_steps, least=1)
    require_count("begin_step", begin_step)
    is_known = isinstance(begin_step, int)
    require_count("end_step", end_step, least=begin_step if is_known else 0)
    if not callable(allocation):
        raise TypeError(
            "allocation must be a function (units, sparsity) -> kept, got "
            f"{allocation!r}; jopt.allocation has uniform and global_ranking"
        )
    if update not in ("step", "host"):
        raise ValueError(f'update must be "step" or "host", got {update!r}')
