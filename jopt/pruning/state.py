"""The state of pruning: what it holds, and how to read it from any optimizer state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import packing
from jopt.trees import paths
from jopt.updates import states
from jopt.updates.states import is_masked_node


class PruneState(NamedTuple):
    """State of every wrapper with masks; of latents, inside that of `project`."""

    # NamedTuple has a method of this name, but Optax and its tools expect the field.
    count: jax.Array  # type: ignore[assignment]  # shape=(), int32: updates so far
    masks: Any  # as params; packed uint8 (1 bit per weight) or bool; else MaskedNode()
    score_state: Any  # as params; of the score; MaskedNode() where not selected
    key: jax.Array  # shape=(), a PRNG key, folded per leaf path and count
    num_nonfinite: jax.Array  # shape=(), dtype=int32: at the last mask update
    inner_state: optax.OptState


class HostPruned(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """What `prune(..., update="host")` returns, with what `update_masks` needs."""

    refresh: Callable[..., PruneState]
    is_due: Callable[[Any], Any]


def update_masks(
    pruned: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    params: optax.Params,
    *,
    grads: optax.Updates | None = None,
    count: int | None = None,
    **extra_args: Any,
) -> optax.OptState:
    """Compute masks between two steps, for `prune(..., update="host")`.

    Call it before every step, outside jit, or nothing is pruned: it returns the state
    as it is unless a mask update is due at the state's count, and then computes the
    masks that `update="step"` would compute in that step. One small program is compiled
    per leaf shape.

    Args:
        pruned: what `jopt.prune(..., update="host")` returned, not a chain around it.
        state: the whole optimizer state; the pruned state in it is found.
        params: the params of the next step.
        grads: the gradients of the next step, for scores that read them; those that
            reach `prune`, so around it `optax.MultiSteps` wants their average.
        count: how many updates `prune` has made, if you know: asking the state waits
            for the step in flight.
        extra_args: for scores that read them.

    Returns:
        The whole optimizer state with new masks.

    Raises:
        ValueError: the state holds no pruned state, or more than one.
        TypeError: `pruned` was not made with `update="host"`.

    >>> import jax.numpy as jnp, optax, jopt
    >>> pruned = jopt.prune(optax.sgd(0.1), sparsity=0.5, update="host")
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), pruned)
    >>> params = {"w": jnp.array([[3.0, -1.0, 2.0, 0.5]])}
    >>> state = jopt.update_masks(pruned, tx.init(params), params)
    >>> jopt.get_masks(state)["w"]
    Array([[ True, False,  True, False]], dtype=bool)
    """
    if not isinstance(pruned, HostPruned):
        raise TypeError(
            'pruned must be what jopt.prune(..., update="host") returned, got '
            f"{type(pruned).__name__}; keep it apart from the chain around it"
        )
    if count is not None and not pruned.is_due(count):
        return state
    found = states.find_states(state, PruneState)
    if len(found) != 1 or found[0].count.ndim:
        got = "a stack of them" if len(found) == 1 else len(found)
        raise ValueError(
            f"state must hold one pruned state, got {got}; "
            'use update="step" for several, and under vmap or pmap'
        )
    if count is None and not pruned.is_due(found[0].count):
        return state
    return states.map_states(
        lambda pruned_state, seen: pruned.refresh(
            pruned_state, seen, grads, extra_args
        ),
        state,
        PruneState,
        params=params,
    )


def get_masks(state: optax.OptState) -> Any:
    """Read the masks out of any optimizer state.

    Args:
        state: an optimizer state with one or several pruned states at any depth.

    Returns:
        A tree like params: bool leaves, True = keep, `optax.MaskedNode()` where no
        pruned state selected the leaf. A leaf in several of them is kept where all do.

    Raises:
        ValueError: there is no pruned state.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = optax.chain(jopt.prune(optax.sgd(0.1), sparsity=0.5))
    >>> get_masks(tx.init({"w": jnp.ones((1, 2)), "b": jnp.ones(2)}))
    {'b': MaskedNode(), 'w': Array([[ True,  True]], dtype=bool)}
    """
    found = states.find_states(state, PruneState)
    if not found:
        raise ValueError(
            "state must hold masks, got a state without jopt.prune in it; "
            "pass the state of the transformation that was built with jopt.prune"
        )
    trees = [jax.tree.map(packing.unpack_mask, s.masks) for s in found]
    merged = trees[0]
    for tree in trees[1:]:
        merged = states.merge_masked(merged, tree, both=jnp.logical_and)
    return merged


def apply_masks(params: optax.Params, masks: Any) -> optax.Params:
    """Set params to zero where the mask is False.

    For params that did not come out of `apply_updates`: averages kept inside an
    optimizer (EMA, lookahead, schedule-free evaluation params) or restored dense
    weights. Unlike an update it also removes NaN and inf.

    Args:
        params: any tree of arrays.
        masks: a tree like params with bool or packed leaves, True = keep;
            `optax.MaskedNode()` leaves the leaf alone.

    Returns:
        params, with exact zeros.

    Raises:
        ValueError: a mask is neither boolean nor packed, or of another shape.

    >>> import jax.numpy as jnp, jopt
    >>> jopt.apply_masks({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})
    {'w': Array([1., 0.], dtype=float32)}
    """

    def apply(path: str, w: Any, mask: Any) -> Any:
        if is_masked_node(mask):
            return w
        packing.require_mask_of(mask, jnp.shape(w), path)
        return jnp.where(packing.unpack_mask(mask), w, jnp.zeros_like(w))

    return paths.map_with_path(apply, params, masks)
