"""Find what an optimizer keeps per weight, by name, however deep it is nested."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def find_moment(state: optax.OptState, params: optax.Params, name: str) -> Any:
    """Find a moment of every leaf in an optimizer state.

    Args:
        state: of any Optax optimizer.
        params: the params that it belongs to.
        name: of the field of a state: "nu" of Adam and its kin, "mu", "trace", "v".

    Returns:
        A tree like params, with None where no moment of the leaf's shape is kept.

    Raises:
        ValueError: two states keep a moment of that name for one leaf.

    >>> params = {"w": jnp.ones(2)}
    >>> state = optax.MultiSteps(optax.adam(0.1), 2).init(params)
    >>> find_moment(state, params, "nu")
    {'w': Array([0., 0.], dtype=float32)}
    """
    leaves: Any
    treedef: Any
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    found: dict[Any, Any] = {}
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves}
    for _, tree in optax.tree.get_all_with_path(state, name):
        for path, moment in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if shapes.get(path) != jnp.shape(moment):
                continue
            if path in found:
                raise ValueError(
                    f"{name} must be kept once per leaf, got two of them at "
                    f"{jax.tree_util.keystr(path)}; use scores that keep their own"
                )
            found[path] = moment
    return treedef.unflatten([found.get(path) for path, _ in leaves])
