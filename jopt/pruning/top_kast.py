"""Top-KAST: a sparse forward pass, and gradients for a few weights more.

Of dense latents in the state, the largest make two nested sets,

    A = the top 1 - sparsity of |latent|:            params = latent on A, 0 elsewhere
    B = the top 1 - backward_sparsity, A inside B:   only latents in B are stepped,

so weights in B but not in A compete for a place in the next A while all others rest
(Jayakumar et al., arXiv:2106.03517). What leaves B keeps its latent and may come back.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import packing, patterns
from jopt.arrays.arguments import check_strength
from jopt.pruning import allocation as allocations
from jopt.pruning import leaves as chosen_leaves
from jopt.pruning import masks
from jopt.pruning import scores as criteria
from jopt.pruning.arguments import check_allocation, check_steps, check_uniform
from jopt.pruning.leaves import Choice, Leaf, Patterns, Plan, Sparsities, make_choice
from jopt.pruning.state import PruneState
from jopt.pruning.straight_through import latents, masked_value, unused
from jopt.pruning.wrapper import (
    Method,
    due,
    init_state,
    keep_where,
    map_masked,
    placed_as,
)
from jopt.trees import rules
from jopt.updates.project import (
    Projection,
    ProjectState,
    project,
    require_floats,
    require_params,
    require_state,
    require_transformation,
)
from jopt.updates.states import is_masked_node, seen_params


class TopKastState(NamedTuple):
    """What `top_kast` keeps beside the latents."""

    # NamedTuple has a method of this name, but Optax and its tools expect the field.
    count: jax.Array  # type: ignore[assignment]  # shape=(), int32: updates so far
    backward_masks: (
        Any  # of B; as params, packed or bool; MaskedNode() where not selected
    )
    forward: PruneState  # with the masks of A


Both = tuple[list[jax.Array], list[jax.Array], jax.Array]  # A, B, scores not finite


def top_kast(
    inner: optax.GradientTransformation,
    *,
    sparsity: Sparsities = None,
    backward_sparsity: Sparsities,
    penalty: float | jax.Array = 0.0,
    every_steps: int = 1,
    begin_step: int = 0,
    end_step: int | None = None,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.uniform,
    stacked_axes: rules.StackedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` with Top-KAST: params on A, gradients and steps on B around it.

    g' = g + penalty * latent on A,   g + penalty / density * latent on the rest of B
    latent' = latent + inner(g') on B,   params = where(A(latent'), latent', 0)

    Training is sparse from the start: `init` takes A and B of the params, and the first
    update makes all but A zero. Density is the share of the leaf that A keeps. The
    gradient that `inner` sees is 0 outside of B, so its moments fade there.

    Args:
        inner: any Optax transformation; it sees the latents as its params.
        sparsity: fraction of zeros in the params, a number, a schedule or ordered
            rules; None for `jopt.NM`.
        backward_sparsity: fraction of weights without a gradient, at most `sparsity`; a
            number, a schedule or ordered rules (leaves that none matches, or that map
            to None, have dense gradients). Where schedules put it above `sparsity`, B
            is A. With `jopt.NM(n, m)` a number that leaves a whole number of every m,
            at least n.
        penalty: the strength of L2 on B, at least 0. It is 0 by default because its
            scale is that of the loss, and `inner` may decay weights already; the paper
            trains with it.
        every_steps: updates between two moves of A and B, at least 1.
        begin_step: count of the first move.
        end_step: count of the last move, always one itself; None for no end.
        pattern: which weights live and die together, or ordered rules.
        select: which leaves are masked, as in `jopt.prune`.
        allocation: how many weights each leaf keeps, in A and in B.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.

    Returns:
        A transformation with one full-size copy of the selected leaves in its state;
        `jopt.get_masks(state)` reads A.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: `backward_sparsity` is above `sparsity` or does not fit the pattern,
            `penalty` is negative, or as `jopt.prune`.

    References:
        Jayakumar et al., Top-KAST: Top-K Always Sparse Training, arXiv:2106.03517.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.top_kast(optax.sgd(1.0), sparsity=0.75, backward_sparsity=0.5)
    >>> params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": -2 * jnp.ones((1, 4))}, state, params)
    >>> optax.apply_updates(params, updates)["w"], state.latent["w"]
    (Array([[6., 0., 0., 0.]], dtype=float32), Array([[6., 5., 2., 1.]], dtype=float32))
    """
    inner = require_transformation(inner, "top_kast")
    choice = make_choice(sparsity, pattern, select, stacked_axes)
    wide = _make_wide(backward_sparsity, choice)
    check_allocation(allocation)
    check_uniform(allocation, pattern)
    check_steps(every_steps, begin_step, end_step)
    check_strength("penalty", penalty, "for example 1e-4")
    score = criteria.as_score(criteria.magnitude)
    recipe = masks.Recipe(score, allocation)
    method = Method(
        name="top_kast",
        choice=choice,
        score=score,
        is_due=due(every_steps, begin_step, end_step),
        renew=None,
    )

    def both(state: PruneState, params: optax.Params) -> Both:
        """Take A and B of the params, wherever masks are."""
        leaves = chosen_leaves.gather(choice, score, state, params, None, {})
        forward, num_nonfinite = masks.in_one_program(leaves, recipe, state.count)
        widened = _widened(leaves, wide, state, params)
        backward, _ = masks.in_one_program(widened, recipe, state.count)
        old = jax.tree.leaves(state.masks)
        forward, backward = placed_as(old, forward), placed_as(old, backward)
        # Allocations need not nest where a layer is full.
        backward = [a | b for a, b in zip(forward, backward, strict=True)]
        return forward, backward, num_nonfinite

    def init(params: optax.Params) -> ProjectState:
        require_floats(params, "top_kast")
        plans = choice.chosen(params, "top_kast")
        first = init_state(method, params, plans, optax.EmptyState(), key=None)
        treedef: Any = jax.tree.structure(first.masks)
        forward: list[jax.Array] = []
        backward: list[jax.Array] = []
        if treedef.num_leaves:
            forward, backward, num_nonfinite = jax.jit(both)(first, params)
            first = first._replace(num_nonfinite=num_nonfinite)
        kast = TopKastState(
            jnp.zeros([], jnp.int32),
            treedef.unflatten(backward),
            first._replace(masks=treedef.unflatten(forward)),
        )
        return latents(inner, params, first.masks, kast)

    def update(
        updates: optax.Updates,
        state: ProjectState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        require_params(params, "top_kast")
        require_state(state, ProjectState, "top_kast")
        require_state(state.projection_state, TopKastState, "top_kast")
        kast: TopKastState = state.projection_state
        seen = seen_params(state, params)

        def mask(
            latent: optax.Params, kast: TopKastState, count: jax.Array
        ) -> tuple[optax.Params, TopKastState]:
            moved = seen_params(state._replace(latent=latent), params)
            treedef: Any
            old, treedef = jax.tree.flatten(kast.forward.masks)
            held = jax.tree.leaves(kast.backward_masks)
            kept, num_nonfinite = old, kast.forward.num_nonfinite
            if old:
                kept, held, num_nonfinite = jax.lax.cond(
                    method.is_due(count),
                    lambda: both(kast.forward, moved),
                    lambda: (old, held, num_nonfinite),
                )
            count = optax.safe_increment(count)
            forward = kast.forward._replace(
                count=count,
                masks=treedef.unflatten(kept),
                num_nonfinite=num_nonfinite,
            )
            target = map_masked(masked_value, forward.masks, latent)
            return target, TopKastState(count, treedef.unflatten(held), forward)

        grads = updates
        if not (isinstance(penalty, int | float) and penalty == 0):
            grads = map_masked(
                lambda a, g, x: _penalized(a, g, x, penalty),
                kast.forward.masks,
                grads,
                seen,
            )
        grads = map_masked(keep_where, kast.backward_masks, grads)
        tx = project(_held(inner, kast.backward_masks), Projection(unused, mask))
        return tx.update(grads, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _held(
    inner: optax.GradientTransformationExtraArgs, backward_masks: Any
) -> optax.GradientTransformationExtraArgs:
    """Keep latents outside of B from moving by momentum or weight decay."""

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        steps, state = inner.update(updates, state, params, **extra_args)
        return map_masked(keep_where, backward_masks, steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _penalized(
    forward: jax.Array, grad: jax.Array, latent: jax.Array, penalty: float | jax.Array
) -> jax.Array:
    """Add the gradient of the penalty on B; outside of it gradients are left out."""
    mask = packing.unpack_mask(forward)
    ones, size = forward, 1
    if forward.dtype == jnp.uint8:  # counted in bytes: a small part of a step
        ones, size = jax.lax.population_count(forward), 8
    density = jnp.mean(ones, dtype=jnp.float32) / size
    strength = jnp.where(mask, 1.0, 1.0 / jnp.maximum(density, 1.0 / mask.size))
    return (grad + penalty * strength * latent).astype(grad.dtype)


def _widened(
    leaves: Sequence[Leaf], wide: Choice, state: PruneState, params: optax.Params
) -> list[Leaf]:
    """Put the plan of B for that of A."""
    count = state.count
    treedef: Any = jax.tree.structure(params)
    packed = treedef.flatten_up_to(state.masks)
    plans = [
        plan
        for plan, mask in zip(wide.plans(params), packed, strict=True)
        if not is_masked_node(mask)
    ]
    return [
        leaf._replace(
            plan=_wide_plan(leaf.plan, 0.0 if plan is None else plan.sparsity, count)
        )
        for leaf, plan in zip(leaves, plans, strict=True)
    ]


def _wide_plan(plan: Plan, sparsity: Any, count: jax.Array) -> Plan:
    """Put the sparsity of B for that of A, and compare them where both are known."""
    if not isinstance(plan.pattern, patterns.NM):
        wide = plan._replace(sparsity=sparsity)
        _check_nested(plan.sparsity_at(count), wide.sparsity_at(count), plan.path)
        return wide
    n, m = plan.pattern.n, plan.pattern.m
    kept = (1 - sparsity) * m if isinstance(sparsity, int | float) else 0.0
    if not n <= kept <= m or abs(kept - round(kept)) > 1e-6:
        raise ValueError(
            f"backward_sparsity must leave a whole number of every {m}, at least {n}, "
            f"for {plan.pattern} at {plan.path!r}, got {sparsity}; for example "
            f"{1 - min(n + 1, m) / m:g}"
        )
    return plan._replace(pattern=patterns.NM(round(kept), m, plan.pattern.axis))


def _make_wide(backward_sparsity: Sparsities, choice: Choice) -> Choice:
    """Make the choice of B."""
    if backward_sparsity is None:
        raise ValueError(
            "backward_sparsity must be given, got None; 0.0 is for dense gradients"
        )
    wide = make_choice(
        backward_sparsity,
        patterns.Unstructured(),
        choice.select,
        choice.stacked_axes,
        argument="backward_sparsity",
    )
    _check_nested(choice.sparsity, wide.sparsity)
    return wide


def _check_nested(sparsity: Any, backward_sparsity: Any, path: str = "") -> None:
    """Raise if two numbers say that B is smaller than A."""
    are_known = all(isinstance(x, int | float) for x in (sparsity, backward_sparsity))
    if are_known and backward_sparsity > sparsity:
        where = f" at {path!r}" if path else ""
        raise ValueError(
            f"backward_sparsity must be at most sparsity={sparsity}, got "
            f"{backward_sparsity}{where}; B contains A"
        )
