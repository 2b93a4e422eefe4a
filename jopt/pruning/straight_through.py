"""Train all weights while the loss sees a sparse part of them: straight-through masks.

A dense latent lives in the state, and after every update with the inner step d

    latent' = latent + d(g),    params = latent' where mask(latent'), 0 elsewhere,

so g is taken at the sparse params and moves the latents of zeros too (Bengio et al.,
arXiv:1308.3432). A weight comes back when its latent grows. SR-STE pulls latents that
are masked towards zero, so that masks settle (Zhou et al., arXiv:2102.04010).

The mask is of the latent *after* the step, unlike that of `prune`: the new latent is
written anyway, so that scoring it costs no copy, and params and mask belong together.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import packing, patterns
from jopt.arrays.arguments import check_strength
from jopt.pruning import allocation as allocations
from jopt.pruning import masks
from jopt.pruning import scores as criteria
from jopt.pruning.arguments import (
    check_allocation,
    check_key_of,
    check_steps,
    check_uniform,
)
from jopt.pruning.leaves import Choice, Patterns, Sparsities, make_choice
from jopt.pruning.state import PruneState
from jopt.pruning.wrapper import Method, due, init_state, map_masked, renewed
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


def ste(
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
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that it trains dense latents of sparse params.

    latent' = latent + inner(g),   params = where(mask(latent'), latent', 0)

    Args:
        inner: any Optax transformation; it sees the latents as its params.
        sparsity: fraction of zeros in [0, 1], a number, a schedule or ordered rules, as
            in `jopt.prune`; None for `jopt.NM`.
        every_steps: updates between two mask updates, at least 1.
        begin_step: count of the first update whose params are masked; before it the
            updates of `inner` pass unchanged.
        end_step: count of the last mask update, always one itself; None for no end.
        scores: `(latent, grad) -> scores`, higher = keep, or a `jopt.scores.Score`, of
            the new latent and of the gradient that moved it.
        pattern: which weights live and die together, or ordered rules.
        select: which leaves are masked, as in `jopt.prune`.
        allocation: how many weights each leaf keeps.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.
        key: a PRNG key for scores that need one.

    Returns:
        A transformation with one full-size copy of the selected leaves in its state;
        `jopt.get_masks(state)` reads its masks.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: as `jopt.prune`.

    References:
        Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons,
        arXiv:1308.3432; Zhou et al., Learning N:M Fine-grained Structured Sparse Neural
        Networks From Scratch, arXiv:2102.04010 (for N:M).

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.ste(optax.sgd(1.0), pattern=jopt.NM(1, 2, axis=-1))
    >>> params = {"w": jnp.array([[1.0, 0.5]])}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update({"w": jnp.array([[0.0, -0.4]])}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["w"])
    [[1. 0.]]
    [[0.  1.3]]
    """
    method = _method(
        "ste",
        make_choice(sparsity, pattern, select, stacked_axes),
        (every_steps, begin_step, end_step),
        scores,
        allocation,
        key,
    )
    return _masked_latents(inner, method, begin_step=begin_step, decay=0.0, key=key)


def sr_ste(
    inner: optax.GradientTransformation,
    *,
    decay: float | jax.Array = 2e-4,
    sparsity: Sparsities = None,
    every_steps: int = 1,
    begin_step: int = 0,
    end_step: int | None = None,
    scores: criteria.ScoreFunction | criteria.Score = criteria.magnitude,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.uniform,
    stacked_axes: rules.StackedAxes = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` with SR-STE: straight through, with a pull on what is masked.

    g' = g + decay * (1 - mask) * latent
    latent' = latent + inner(g'),   params = where(mask(latent'), latent', 0)

    With `optax.sgd(learning_rate)` this is the update as published. The pull goes
    through the moments of adaptive optimizers, as L2 in the loss would. It is made of
    the mask and the latent in the state and not of latent - params, which may differ
    by an ulp where a weight is kept.

    Args:
        inner: any Optax transformation; it sees the latents as its params.
        decay: of latents that are masked, at least 0; 2e-4 as published; 0 is
            `jopt.ste`.
        sparsity: fraction of zeros, a number, a schedule or ordered rules; None for
            `jopt.NM`.
        every_steps: updates between two mask updates, at least 1.
        begin_step: count of the first update whose params are masked.
        end_step: count of the last mask update, always one itself; None for no end.
        scores: of the new latent and the gradient, as in `jopt.ste`.
        pattern: which weights live and die together, or ordered rules; the paper is
            about `jopt.NM(2, 4)`.
        select: which leaves are masked, as in `jopt.prune`.
        allocation: how many weights each leaf keeps.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.
        key: a PRNG key for scores that need one.

    Returns:
        A transformation with one full-size copy of the selected leaves in its state;
        `jopt.get_masks(state)` reads its masks.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: `decay` is negative, or as `jopt.prune`.

    References:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From
        Scratch, arXiv:2102.04010, equation 6.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.sr_ste(optax.sgd(1.0), decay=0.5, pattern=jopt.NM(1, 2, axis=-1))
    >>> params = {"w": jnp.array([[2.0, 1.0]])}
    >>> state = tx.init(params)
    >>> for _ in range(3):  # the mask is known after the first
    ...     updates, state = tx.update({"w": jnp.zeros((1, 2))}, state, params)
    >>> state.latent["w"]
    Array([[2.  , 0.25]], dtype=float32)
    """
    check_strength("decay", decay, "2e-4 as published")
    method = _method(
        "sr_ste",
        make_choice(sparsity, pattern, select, stacked_axes),
        (every_steps, begin_step, end_step),
        scores,
        allocation,
        key,
    )
    return _masked_latents(inner, method, begin_step=begin_step, decay=decay, key=key)


def _method(
    name: str,
    choice: Choice,
    steps: tuple[int, int, int | None],
    scores: criteria.ScoreFunction | criteria.Score,
    allocation: allocations.Allocation,
    key: jax.Array | None,
) -> Method:
    """Check what both have in common, and describe when masks are renewed, and how."""
    check_allocation(allocation)
    check_uniform(allocation, choice.pattern)
    check_steps(*steps)
    score = criteria.as_score(scores)
    check_key_of(score, key)
    recipe = masks.Recipe(score, allocation)
    return Method(
        name=name,
        choice=choice,
        score=score,
        is_due=due(*steps),
        renew=lambda leaves, count: masks.in_one_program(leaves, recipe, count),
    )


def _masked_latents(
    inner: optax.GradientTransformation,
    method: Method,
    *,
    begin_step: int,
    decay: float | jax.Array,
    key: jax.Array | None,
) -> optax.GradientTransformationExtraArgs:
    """Build `project` with masks in its state; params are what the masks keep."""
    inner = require_transformation(inner, method.name)

    def init(params: optax.Params) -> ProjectState:
        require_floats(params, method.name)
        plans = method.choice.chosen(params, method.name)
        first = init_state(method, params, plans, optax.EmptyState(), key=key)
        return latents(inner, params, first.masks, first)

    def update(
        updates: optax.Updates,
        state: ProjectState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        require_params(params, method.name)
        require_state(state, ProjectState, method.name)
        require_state(state.projection_state, PruneState, method.name)
        seen = seen_params(state, params)

        def mask(
            latent: optax.Params, old: PruneState, count: jax.Array
        ) -> tuple[optax.Params, PruneState]:
            moved = seen_params(state._replace(latent=latent), params)
            old = old._replace(inner_state=state.inner_state)
            new = renewed(method, old, moved, updates, extra_args)
            new = new._replace(
                count=optax.safe_increment(count), inner_state=optax.EmptyState()
            )
            return map_masked(masked_value, new.masks, latent), new

        packed = state.projection_state.masks
        grads = updates
        if not (isinstance(decay, int | float) and decay == 0):
            grads = map_masked(
                lambda m, g, latent: _pulled(m, g, latent, decay), packed, updates, seen
            )
        tx = project(inner, Projection(unused, mask), begin_step=begin_step)
        return tx.update(grads, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def latents(
    inner: optax.GradientTransformation,
    params: optax.Params,
    packed: Any,
    projection_state: Any,
) -> ProjectState:
    """Make the state of `project` for the leaves that have a mask."""
    chosen = jax.tree.map(
        lambda mask: not is_masked_node(mask), packed, is_leaf=is_masked_node
    )
    projection = Projection(lambda latent: projection_state, unused)
    state: ProjectState = project(inner, projection, select=chosen).init(params)
    return state


def masked_value(packed: jax.Array, latent: jax.Array) -> jax.Array:
    """Return what is kept of a latent."""
    return jnp.where(packing.unpack_mask(packed), latent, jnp.zeros_like(latent))


def unused(*args: Any) -> Any:
    """Stand for what a projection of one update does not need."""
    raise AssertionError("the projection belongs to one update")


def _pulled(
    packed: jax.Array, grad: jax.Array, latent: jax.Array, decay: float | jax.Array
) -> jax.Array:
    """Add the gradient of decay / 2 * ||masked latents||^2."""
    pull = jnp.where(packing.unpack_mask(packed), jnp.zeros_like(latent), latent)
    return (grad + decay * pull).astype(grad.dtype)
