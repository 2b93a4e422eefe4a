"""Find and change wrapper states, however deep Optax has nested them.

Optimizer state is a tree of NamedTuples; `chain`, `MultiSteps`, `partition` and the
wrappers of this library put states inside states. A walk meets every state of one type,
together with the params that this state's `update` sees: inside `project` these are the
latent values, elsewhere the params of the caller.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

from jopt.updates.project import ProjectState

State = TypeVar("State")


def is_masked_node(x: Any) -> bool:
    """Tell whether a leaf was not selected."""
    return isinstance(x, optax.MaskedNode)


def merge_masked(first: Any, second: Any, *, both: Callable[[Any, Any], Any]) -> Any:
    """Fill the holes of one tree with the leaves of another of the same structure.

    A hole is an `optax.MaskedNode()`; where neither tree has one, `both` decides.
    """

    def merge(a: Any, b: Any) -> Any:
        if is_masked_node(a):
            return b
        return a if is_masked_node(b) else both(a, b)

    return jax.tree.map(merge, first, second, is_leaf=is_masked_node)


def seen_params(state: ProjectState, params: optax.Params) -> optax.Params:
    """Return the params that the inner transformation of `project` sees."""
    return merge_masked(state.latent, params, both=lambda latent, param: latent)


def map_states(
    fn: Callable[[Any, Any], Any],
    state: optax.OptState,
    kind: type[Any],
    *,
    params: optax.Params = None,
) -> optax.OptState:
    """Replace every state of type `kind` by `fn(state, params it sees)`.

    States inside a found state's `inner_state` are replaced first. `params` may be left
    out when `fn` does not use them.
    """

    def seen_by(node: Any, params: Any) -> Any:
        is_projected = isinstance(node, ProjectState) and params is not None
        return seen_params(node, params) if is_projected else params

    def visit(node: Any, params: Any) -> Any:
        if isinstance(node, kind):
            inner = getattr(node, "inner_state", None)
            if inner is not None:
                node = node._replace(inner_state=walk(inner, seen_by(node, params)))
            return fn(node, params)
        if isinstance(node, ProjectState):
            return node._replace(
                projection_state=walk(node.projection_state, params),
                inner_state=walk(node.inner_state, seen_by(node, params)),
            )
        return node

    def walk(tree: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda node: visit(node, params),
            tree,
            is_leaf=lambda x: isinstance(x, (kind, ProjectState)),
        )

    return walk(state, params)


def find_states(state: optax.OptState, kind: type[State]) -> list[State]:
    """List every state of type `kind` in the tree, outer before inner.

    >>> import optax
    >>> tx = optax.chain(optax.clip(1.0), optax.MultiSteps(optax.adam(1e-3), 2))
    >>> [s.count.item() for s in find_states(tx.init({}), optax.ScaleByAdamState)]
    [0]
    """
    found: list[State] = []

    def collect(node: Any, params: Any) -> Any:
        found.append(node)
        return node

    map_states(collect, state, kind)
    return found[::-1]
