"""Start the moments of single weights anew, in any optimizer.

What an optimizer keeps per weight is found by `optax.tree.map_params`, not by the types
of its states; it is set to what `init` would make of it now, because that need not be
zero: Rprop begins with a step size, schedule-free optimizers with the params.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


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

    if not jax.tree.leaves(params):
        return state
    tags = optax.tree.map_params(
        inner,
        _tags,
        state,
        where,
        transform_non_params=lambda leaf: False,
        is_leaf=lambda tree: True,  # whole trees: what is kept of a leaf may be a list
    )

    def reset(tag: Any, leaf: Any, fresh: Any) -> Any:
        if tag is False:
            return leaf
        return jnp.where(tag, fresh.astype(leaf.dtype), leaf)

    return jax.tree.map(reset, tags, state, inner.init(params))


def _tags(kept: Any, where: Any) -> Any:
    """Say of each array in a tree like params which weights it keeps are meant."""
    treedef: Any
    leaves, treedef = jax.tree_util.tree_flatten_with_path(kept)
    meant = dict(jax.tree_util.tree_flatten_with_path(where)[0])

    def tag(path: Any, leaf: Any) -> Any:
        above = (path[:i] for i in range(len(path), -1, -1))
        mask = next((meant[p] for p in above if p in meant), False)
        fits = jnp.shape(mask) == jnp.shape(leaf) and jnp.ndim(leaf) > 0
        is_mask = getattr(leaf, "dtype", None) == jnp.bool_
        return mask if fits and not is_mask else False

    return treedef.unflatten([tag(path, leaf) for path, leaf in leaves])
