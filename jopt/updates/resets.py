"""Start the moments of single weights anew, in any optimizer.

What an optimizer keeps per weight is found by `optax.tree.map_params`, not by the types
of its states; it is set to what `init` would make of it now, because that need not be
zero: Rprop begins with a step size, schedule-free optimizers with the params.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.updates.states import is_masked_node


def reset_where(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    where: Any,
) -> optax.OptState:
    """Set what `state` keeps of some weights to what `inner.init(params)` makes of it.

    Args:
        inner: the transformation that the state belongs to.
        state: its state.
        params: the params that its next update sees.
        where: a tree like params: bool arrays of the leaves' shapes, or False.

    Returns:
        The state. What is not kept per weight stays: counts, scalars, and moments of
        another shape than the leaf (rows and columns of factored optimizers).

    >>> import optax
    >>> tx, params = optax.trace(0.9), {"w": jnp.ones(2)}
    >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(params))
    >>> reset_where(tx, state, params, {"w": jnp.array([True, False])}).trace["w"]
    Array([0., 1.], dtype=float32)
    """

    def tag(leaf: Any, where: Any) -> Any:
        if is_masked_node(leaf):
            return leaf
        fits = jnp.shape(where) == jnp.shape(leaf) and jnp.ndim(leaf) > 0
        is_mask = getattr(leaf, "dtype", None) == jnp.bool_
        return where if fits and not is_mask else False

    if not jax.tree.leaves(params):
        return state
    tags = optax.tree.map_params(
        inner,
        tag,
        state,
        where,
        transform_non_params=lambda leaf: False,
        is_leaf=is_masked_node,
    )

    def reset(tag: Any, leaf: Any, fresh: Any) -> Any:
        if tag is False:
            return leaf
        return jnp.where(tag, fresh.astype(leaf.dtype), leaf)

    return jax.tree.map(reset, tags, state, inner.init(params))
