"""Find what an optimizer keeps per weight, by name, however deep it is nested.

An optimizer keeps its moments in fields of NamedTuples, as trees like params. Chains,
`MultiSteps`, `inject_hyperparams` and the wrappers of this library put these states
inside others; `partition` and `masked` leave holes in them, which are filled here from
the other parts. A leaf that has no such moment is named when its moment is read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays.compressed import CompressedArray
from jopt.trees import paths


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Missing:
    """Stands where something needed for a leaf is not there: `reason` is the error."""

    reason: str


def find_moment(state: optax.OptState, params: optax.Params, name: str) -> Any:
    """Find a moment of every leaf in an optimizer state.

    Args:
        state: of any Optax optimizer.
        params: the params that it belongs to.
        name: of the field of a state: "nu" of Adam and its kin, "mu", "trace",
            "exp_avg_sq".

    Returns:
        A tree like params of the moments as they are kept, and `Missing` where none of
        the leaf's shape is; `read_moment` reads one.

    Raises:
        ValueError: the state keeps no moment of that name, or two for one leaf.

    >>> params = {"w": jnp.ones(2)}
    >>> state = optax.MultiSteps(optax.adam(0.1), 2).init(params)
    >>> find_moment(state, params, "nu")
    {'w': Array([0., 0.], dtype=float32)}
    """
    treedef: Any
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not leaves:
        return params
    kept: dict[Any, list[Any]] = {path: [] for path, _ in leaves}
    trees = [
        found
        for value in _fields_of(state, params, name)
        if _is_like(found := _leaves_of(value), kept)
    ]
    if not trees:
        raise ValueError(
            f"inner must keep {name!r}, a moment of every weight, got a state without "
            f"one; {_way_out(name)}"
        )
    for found in trees:
        for path, moment in found.items():
            kept[path].append(moment)
    names = paths.leaf_paths(params)
    return treedef.unflatten(
        [
            _the_one(kept[path], jnp.shape(leaf), name, leaf_path)
            for (path, leaf), leaf_path in zip(leaves, names, strict=True)
        ]
    )


def read_moment(moment: Any) -> jax.Array:
    """Return a moment as an array of float32, or raise for one that is missing.

    >>> read_moment(jnp.ones(1, jnp.bfloat16))
    Array([1.], dtype=float32)
    """
    if isinstance(moment, Missing):
        raise ValueError(moment.reason)
    array = moment.to_array() if isinstance(moment, CompressedArray) else moment
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _the_one(found: list[Any], shape: tuple[int, ...], name: str, path: str) -> Any:
    if len(found) > 1:
        raise ValueError(
            f"inner must keep one {name!r} per weight, got {len(found)} for {path!r}; "
            "name a field that one of its optimizers alone has, or use criteria with "
            "decay=, which keep an average of their own"
        )
    if not found:
        got = "none"
    elif jnp.shape(found[0]) != shape:
        got = f"one of shape {jnp.shape(found[0])}"
    else:
        return found[0]
    return Missing(
        f"inner must keep {name!r} of shape {shape} for {path!r}, got {got}; "
        f"{_way_out(name)}, or leave the leaf out by select="
    )


def _way_out(name: str) -> str:
    keeper = "use an optimizer with that field"
    keeper = "optax.adam keeps it" if name in ("mu", "nu") else keeper
    return f"{keeper}, and criteria with decay= keep an average of their own"


def _fields_of(state: Any, params: Any, name: str) -> list[Any]:
    """List the values of all fields of that name, but of those inside of moments."""
    known = {path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}

    def is_moment(node: Any) -> bool:
        # Params may have a field of that name themselves, and moments are like params.
        return type(node) is type(params) and _is_like(_leaves_of(node), known)

    def visit(tree: Any) -> list[Any]:
        found = []
        nodes = jax.tree.leaves(
            tree, is_leaf=lambda node: is_moment(node) or name in _names_of(node)
        )
        for node in nodes:
            if is_moment(node) or name not in _names_of(node):
                continue
            found.append(getattr(node, name))
            for other in _names_of(node):
                if other != name:
                    found += visit(getattr(node, other))
        return found

    return visit(state)


def _names_of(node: Any) -> tuple[str, ...]:
    """List the fields of a NamedTuple or of a dataclass."""
    if isinstance(node, tuple):
        return getattr(node, "_fields", ())
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return tuple(field.name for field in dataclasses.fields(node))
    return ()


def _leaves_of(tree: Any) -> dict[Any, Any]:
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=paths.is_whole_leaf)
    return dict(found)


def _is_like(leaves: dict[Any, Any], known: Any) -> bool:
    """Tell whether leaves by path are those of params, or some of them."""
    return bool(leaves) and all(path in known for path in leaves)
