"""One name per leaf, the same whatever the framework: 'block_0/attn/kernel'.

The path of a leaf is its keys joined by '/': dict keys, list and tuple positions, the
fields of NamedTuples and of Equinox modules. Two things are smoothed out, so that one
rule fits every framework:

* what merely boxes a value, an NNX `Variable` or a Linen `Partitioned`, adds no key;
* a compressed array is one leaf, not the codes and scales inside it.

`None` and `optax.MaskedNode()` are holes: they have no leaf and so no path. Leaves come
in the order of `jax.tree.leaves`.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import meta

from jopt.arrays.compressed import CompressedArray


def leaf_paths(tree: Any) -> list[str]:
    """List the paths of the leaves, in the order of `jax.tree.leaves`.

    Args:
        tree: any pytree: dicts, lists, tuples, NamedTuples, NNX states and modules,
            Equinox modules, Linen variables.

    Returns:
        One path per leaf; `''` for a tree that is a leaf itself.

    >>> leaf_paths({"block": [{"kernel": 1.0, "bias": None}, (2.0,)]})
    ['block/0/kernel', 'block/1/0']
    """
    return [path for path, _ in leaves_with_path(tree)]


def leaves_with_path(tree: Any) -> list[tuple[str, Any]]:
    """List `(path, leaf)` for every leaf, in the order of `jax.tree.leaves`.

    Args:
        tree: any pytree.

    Returns:
        Pairs of a path and its leaf.

    >>> leaves_with_path({"a": (1, 2)})
    [('a/0', 1), ('a/1', 2)]
    """
    found = []
    outer, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: is_whole_leaf(node) or is_box(node)
    )
    for keys, node in outer:
        if not is_box(node):
            found.append((_join(keys), node))
            continue
        inner, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_whole_leaf)
        found += [(_join(keys + deeper[1:]), leaf) for deeper, leaf in inner]
    return found


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map `fn(path, leaf, *others)` over the leaves of a tree.

    Args:
        fn: called with the path, the leaf and the matching subtree of each of `rest`.
        tree: any pytree; it fixes the structure.
        *rest: trees of which `tree` is a prefix.

    Returns:
        A tree like `tree` of the results.

    >>> map_with_path(lambda path, leaf: f"{path}={leaf}", {"a": [1, 2]})
    {'a': ['a/0=1', 'a/1=2']}
    """
    leaves, treedef = flatten_with_path(tree)
    columns = [treedef.flatten_up_to(other) for other in rest]
    results = [
        fn(path, leaf, *others)
        for (path, leaf), *others in zip(leaves, *columns, strict=True)
    ]
    return treedef.unflatten(results)


def flatten_with_path(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Flatten to `(path, leaf)` pairs and the structure that puts them together.

    Args:
        tree: any pytree.

    Returns:
        The pairs of `leaves_with_path` and the tree structure over them, in which a
        compressed array is a leaf.

    >>> pairs, treedef = flatten_with_path({"a": (1, 2)})
    >>> treedef.unflatten([leaf for _, leaf in pairs])
    {'a': (1, 2)}
    """
    return leaves_with_path(tree), jax.tree.structure(tree, is_leaf=is_whole_leaf)


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """Fold the path of a leaf into a PRNG key.

    The key of a leaf depends on its name alone: adding a layer leaves the random
    numbers of all others as they were, in every process and on every machine.

    Args:
        key: a PRNG key.
        path: the path of a leaf.

    Returns:
        A key of its own for the leaf.

    >>> key = jax.random.key(0)
    >>> bool((fold_path(key, "a/kernel") == fold_path(key, "b/kernel")).all())
    False
    """
    # Python's own hash of a string differs from one process to the next.
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def is_whole_leaf(node: Any) -> bool:
    """Tell whether a node is one leaf although it has arrays inside."""
    return isinstance(node, CompressedArray)


def is_box(node: Any) -> bool:
    """Tell whether a node merely boxes a value and so adds no key to its path."""
    return isinstance(node, nnx.Variable | meta.AxisMetadata)


def _join(keys: tuple[Any, ...]) -> str:
    return "/".join(key_name(key) for key in keys)


def key_name(key: Any) -> str:
    """Name one key of a key path as it reads in a path."""
    match key:
        case (
            jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name)
        ):
            return str(name)
        case jax.tree_util.SequenceKey(idx=name):
            return str(name)
        case jax.tree_util.GetAttrKey(name=name):
            return str(name)
    return str(key)
