"""Lottery tickets: what is left after pruning goes back to what it was early on.

Whenever the masks m change,

    w = w_early where m, 0 elsewhere,

and the optimizer starts anew: iterative magnitude pruning (Frankle and Carbin,
arXiv:1803.03635), and with w_early from some steps into training rather than from its
start, rewinding (Frankle et al., arXiv:1903.01611).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import axes
from jopt.arrays.arguments import require_count
from jopt.pruning.state import PruneState, get_masks
from jopt.pruning.wrapper import map_masked, mask_step
from jopt.updates import states
from jopt.updates.project import ProjectState, require_params, require_transformation


class RewindState(NamedTuple):
    """State of `rewind`."""

    # NamedTuple has a method of this name, but Optax and its tools expect the field.
    count: jax.Array  # type: ignore[assignment]  # shape=(), int32: updates so far
    early_params: optax.Params  # as params: those of rewind_step, once it is reached
    masks: tuple[Any, ...]  # of every wrapper with masks inside, one step ago
    inner_state: optax.OptState


def rewind(
    pruned: optax.GradientTransformation, *, rewind_step: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Wrap a pruning optimizer so that new masks send weights back to an early step.

    params = where(mask, params of rewind_step, 0) and a new inner state,
    on every update after `rewind_step` that changes a mask

    All leaves go back, those without masks too. What a wrapper with masks knows about
    masks goes on (its count, and with it the ramp); everything else starts as `init`
    makes it, counts of learning rate schedules included. Masks that change up to
    `rewind_step` do not rewind. Kept weights land on their early values to half an ulp
    of the larger of both; zeros are exact.

    Iterative pruning, 20 % of what is left every 1000 steps:

        steps = {"every_steps": 1000, "begin_step": 1000}
        tx = jopt.rewind(
            jopt.prune(
                optax.adam(1e-3),
                sparsity=jopt.schedules.geometric_sparsity(0.2, **steps),
                **steps,
            ),
            rewind_step=100,
        )

    Args:
        pruned: `jopt.prune(...)`, or any transformation with such a wrapper in it. What
            keeps latents goes around `rewind`, not inside it.
        rewind_step: count of the update whose entering params are kept, at least 0.

    Returns:
        A transformation with one copy of the params and of the masks in its state.

    Raises:
        TypeError: `pruned` is no transformation.
        ValueError: `rewind_step` is negative; (at `init`) the state holds no masks, or
            masks of latents.

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, arXiv:1803.03635; Frankle et
        al., Stabilizing the Lottery Ticket Hypothesis, arXiv:1903.01611.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.rewind(jopt.prune(optax.sgd(1.0), sparsity=0.5, begin_step=2))
    >>> params = {"w": jnp.array([[4.0, 2.0]])}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": jnp.array([[1.0, -3.0]])}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["w"])
    [[3. 5.]]
    [[2. 8.]]
    [[0. 2.]]
    """
    require_count("rewind_step", rewind_step)
    pruned = require_transformation(pruned, "rewind")

    def init(params: optax.Params) -> RewindState:
        inner_state = pruned.init(params)
        _check_masks(inner_state)
        # Copies, because params and state may be donated together.
        return RewindState(
            count=jnp.zeros([], jnp.int32),
            early_params=jax.tree.map(jnp.copy, params),
            masks=jax.tree.map(jnp.copy, _all_masks(inner_state)),
            inner_state=inner_state,
        )

    def update(
        updates: optax.Updates,
        state: RewindState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RewindState]:
        require_params(params, "rewind")
        is_early = state.count == rewind_step
        early = jax.tree.map(
            lambda old, param: jnp.where(is_early, param, old),
            state.early_params,
            params,
        )
        steps, inner_state = pruned.update(
            updates, state.inner_state, params, **extra_args
        )
        steps = jax.tree.map(
            lambda d, param: d.astype(jnp.result_type(d, param)), steps, params
        )

        def back() -> tuple[optax.Updates, Any]:
            moves = jax.tree.map(lambda target, param: target - param, early, params)
            packed = get_masks(inner_state)
            moves = map_masked(mask_step, packed, moves, params)
            moves = jax.tree.map(lambda move, d: move.astype(d.dtype), moves, steps)
            kept = map_masked(_keep, packed, early)
            return moves, _start_anew(inner_state, pruned.init(kept))

        new_masks = _all_masks(inner_state)
        is_changed = _differ(state.masks, new_masks) & (state.count > rewind_step)
        new_updates, inner_state = jax.lax.cond(
            is_changed, back, lambda: (steps, inner_state)
        )
        return new_updates, RewindState(
            count=optax.safe_increment(state.count),
            early_params=early,
            masks=new_masks,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _all_masks(state: Any) -> tuple[Any, ...]:
    return tuple(found.masks for found in states.find_states(state, PruneState))


def _check_masks(state: Any) -> None:
    if not states.find_states(state, PruneState):
        raise ValueError(
            "pruned must hold masks, got a transformation without jopt.prune in it; "
            "for example jopt.rewind(jopt.prune(optax.adam(1e-3), sparsity=0.5))"
        )
    outer = jax.tree.leaves(
        state, is_leaf=lambda x: isinstance(x, (ProjectState, PruneState))
    )
    if any(isinstance(x, ProjectState) for x in outer):
        raise ValueError(
            "pruned must not keep latents, which would not go back, got a projecting "
            "wrapper around the masks; put rewind inside of it, as in "
            "jopt.quantize_weights(jopt.rewind(jopt.prune(...)), spec)"
        )


def _start_anew(old: Any, fresh: Any) -> Any:
    """Take the fresh state, but for what wrappers know about masks."""

    def merge(a: Any, b: Any) -> Any:
        if not isinstance(a, PruneState):
            # Moments of integers begin as integers and go on as floats.
            return b if a.dtype == b.dtype else b.astype(a.dtype)
        inner_state = _start_anew(a.inner_state, b.inner_state)
        return a._replace(score_state=b.score_state, inner_state=inner_state)

    return jax.tree.map(merge, old, fresh, is_leaf=lambda x: isinstance(x, PruneState))


def _differ(old: Any, new: Any) -> jax.Array:
    """Tell whether any mask changed, on all devices alike."""
    changes = [
        jnp.any(a != b)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    ]
    differ = jnp.any(jnp.stack(changes)) if changes else jnp.zeros([], jnp.bool_)
    varying = axes.varying_axes(differ)
    if not varying:
        return differ
    total: jax.Array = jax.lax.psum(  # type: ignore[no-untyped-call]
        differ.astype(jnp.int32), varying
    )
    return total > 0


def _keep(mask: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(mask, values, jnp.zeros_like(values))
