"""A tree as JSON and a flat list of arrays, and back.

    tree  ->  node (JSON)  +  [Leaf, Leaf, ...]  ->  tree

Dicts, lists, tuples, None, Python scalars, strings, bytes and NumPy scalars are written
out in full, floats by their exact hexadecimal form. Arrays and PRNG keys become
`{"leaf": i}`. The types in `TYPES` are written by name and fields, so they too come
back without a template. Any other pytree node (a NamedTuple, an NNX state, an Equinox
module) keeps its keys and its type's name only: to rebuild it takes a tree `like` it.
A function as a leaf, such as an activation in an Equinox module, is taken from `like`.
"""

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt.arrays import (
    clustered,
    formats,
    quantized,
    quantized_plus_low_rank,
    ranges,
)
from jopt.trees import calibration, paths, recording

Node = Any  # JSON: None, bool, int, str or a dict as the module describes
Kind = Literal["jax", "numpy", "key"]

# Rebuilt from their fields. To let another type be saved, list it here.
TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        quantized.QuantizedArray,
        clustered.ClusteredArray,
        quantized.QuantSpec,
        quantized_plus_low_rank.QuantizedPlusLowRank,
        formats.Format,
        ranges.Range,
        calibration.Calibration,
        recording.Recording,
        optax.MaskedNode,
    )
}

_HALF = ("bfloat16", "float16")
_FLOAT8 = (
    "float8_e3m4",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e4m3b11fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_SMALL = ("int2", "uint2", "int4", "uint4", "float4_e2m1fn")
_WHOLE = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_REAL = ("bool", "float32", "float64", "complex64", "complex128")
DTYPES = frozenset(_HALF + _FLOAT8 + _SMALL + _WHOLE + _REAL)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a tree and what must be known to restore it."""

    path: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str  # of keys 'key<fry>' and the like
    value: Any  # jax.Array, np.ndarray or jax.ShapeDtypeStruct

    def __str__(self) -> str:
        """Read as 'float32[2, 3]'."""
        return f"{self.dtype}{list(self.shape)}"


def encode(tree: Any) -> tuple[Node, list[Leaf]]:
    """Write the structure of a tree as JSON, its arrays as a list.

    Args:
        tree: any pytree of arrays, PRNG keys, scalars, strings and bytes.

    Returns:
        The node of the root and the arrays that its `{"leaf": i}` point to.

    Raises:
        TypeError: a leaf, a dtype or a dict key is of a type that cannot be saved.

    >>> encode({"step": 3, "w": (np.ones(2, np.float32), None)})[0]
    {'dict': ['step', 'w'], 'nodes': [3, {'tuple': [{'leaf': 0}, None]}]}
    """
    leaves: list[Leaf] = []
    return _encode(tree, "", leaves), leaves


def decode(node: Node, values: Sequence[Any], *, like: Any = None) -> Any:
    """Rebuild the tree that `encode` wrote.

    Args:
        node: the node of the root.
        values: the arrays that its `{"leaf": i}` point to.
        like: a tree of the same structure, for nodes of types that are not in `TYPES`;
            `match_like` has accepted it.

    Returns:
        The tree.

    >>> decode({"list": [{"leaf": 0}, {"float": "0x1.8p+0"}]}, ["array"])
    ['array', 1.5]
    """
    if not isinstance(node, dict):
        return node
    if "leaf" in node:
        return values[node["leaf"]]
    if "nodes" in node:
        return _decode_keyed(node, values, like)
    for kind in (list, tuple):
        if kind.__name__ in node:
            children = node[kind.__name__]
            likes = [None] * len(children) if like is None else like
            pairs = zip(children, likes, strict=True)
            return kind(decode(child, values, like=part) for child, part in pairs)
    return like if "function" in node else _decode_scalar(node)


def needs_like(node: Node, path: str = "") -> str | None:
    """Find the first node that only a template can rebuild.

    Args:
        node: a node that `encode` returned.
        path: the path of the node.

    Returns:
        A description of the node, or None if a plain restore can rebuild all.

    >>> needs_like(encode({"opt": optax.EmptyState()})[0])
    "the EmptyState at 'opt'"
    """
    if not isinstance(node, dict):
        return None
    for kind in ("type", "function"):
        if kind in node:
            what = f"{kind} {node[kind]}" if kind == "function" else node[kind]
            return f"the {what} at {path!r}"
    found = (needs_like(child, join(path, key)) for key, child in _items(node))
    return next((what for what in found if what is not None), None)


def match_like(
    node: Node, leaves: Sequence[Leaf], like: Node, like_leaves: Sequence[Leaf]
) -> list[Leaf]:
    """Find the template's leaf of each saved leaf, whatever the order of dict keys.

    Args:
        node: the saved structure.
        leaves: the saved leaves, of any value.
        like: the structure of the template.
        like_leaves: the leaves of the template.

    Returns:
        One leaf of the template per saved leaf.

    Raises:
        ValueError: the first difference in keys, types, shapes or dtypes, by its path.

    >>> match_like(*encode({"w": np.ones(2)}), *encode({"w": np.ones(3)}))
    Traceback (most recent call last):
        ...
    ValueError: like must fit the checkpoint at 'w': saved float64[2], got float64[3]; \
pass a tree with the structure, shapes and dtypes of the one saved
    """
    matched: dict[int, Leaf] = {}
    _match(node, leaves, like, like_leaves, matched, "", exact=False)
    return [matched[index] for index in range(len(leaves))]


def _encode(value: Any, path: str, leaves: list[Leaf]) -> Node:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind in (float, complex, bytes) or isinstance(value, np.generic | np.dtype):
        return _encode_scalar(value, path)
    if _is_array(value):
        leaves.append(_leaf(value, path))
        return {"leaf": len(leaves) - 1}
    if kind in (list, tuple):
        parts = [_encode(v, join(path, i), leaves) for i, v in enumerate(value)]
        return {kind.__name__: parts}
    if kind is dict:
        return _encode_keyed({"dict": list(value)}, value.items(), path, leaves)
    if TYPES.get(kind.__name__) is kind:
        names = _fields(kind)
        head: dict[str, Any] = {"jopt": kind.__name__, "keys": names}
        fields = [(name, getattr(value, name)) for name in names]
        return _encode_keyed(head, fields, path, leaves)
    if not jax.tree_util.all_leaves([value]):
        items, _ = _flatten_once(value)
        head = {"type": kind.__name__, "keys": [name for name, _ in items]}
        return _encode_keyed(head, items, path, leaves)
    if callable(value):
        return {"function": getattr(value, "__name__", kind.__name__)}
    raise TypeError(
        f"tree must hold arrays, numbers, strings, bytes and None, got "
        f"{kind.__name__} at {path!r}; leave it out or turn it into one of these"
    )


def _encode_keyed(
    head: dict[str, Any], items: Any, path: str, leaves: list[Leaf]
) -> Node:
    nodes = []
    for key, value in items:
        if "dict" in head and type(key) not in (str, int):
            raise TypeError(
                f"tree must have str or int dict keys, got {key!r} at {path!r}; "
                "use str(key)"
            )
        nodes.append(_encode(value, join(path, key), leaves))
    return {**head, "nodes": nodes}


def _encode_scalar(value: Any, path: str) -> Node:
    match value:
        case np.dtype():
            return {"dtype": _checked_dtype(value, path)}
        case np.generic():
            name = _checked_dtype(value.dtype, path)
            return {"numpy": name, "hex": value.tobytes().hex()}
        case complex():
            return {"complex": [value.real.hex(), value.imag.hex()]}
        case bytes():
            return {"bytes": base64.b64encode(value).decode()}
    return {"float": value.hex()}


def _decode_scalar(node: dict[str, Any]) -> Any:
    match node:
        case {"dtype": name}:
            return jnp.dtype(name)
        case {"numpy": name, "hex": data}:
            return np.frombuffer(bytes.fromhex(data), jnp.dtype(name))[0]
        case {"complex": [real, imag]}:
            return complex(float.fromhex(real), float.fromhex(imag))
        case {"bytes": data}:
            return base64.b64decode(data)
    return float.fromhex(node["float"])


def _decode_keyed(node: dict[str, Any], values: Sequence[Any], like: Any) -> Any:
    nodes = node["nodes"]
    if "type" in node:
        items, treedef = _flatten_once(like)
        pairs = zip(nodes, items, strict=True)
        return treedef.unflatten(
            [decode(child, values, like=part) for child, (_, part) in pairs]
        )
    if "jopt" in node:
        fields = [decode(child, values) for child in nodes]
        return TYPES[node["jopt"]](**dict(zip(node["keys"], fields, strict=True)))
    return {
        key: decode(child, values, like=None if like is None else like[key])
        for key, child in zip(node["dict"], nodes, strict=True)
    }


def _match(
    node: Node,
    leaves: Sequence[Leaf],
    like: Node,
    like_leaves: Sequence[Leaf],
    matched: dict[int, Leaf],
    path: str,
    *,
    exact: bool,
) -> None:
    kind = _kind(node)
    fits = kind == _kind(like) or (not exact and _is_scalar(node) and _is_scalar(like))
    if kind == "leaf" and fits:
        saved, wanted = leaves[node["leaf"]], like_leaves[like["leaf"]]
        fits = (saved.shape, saved.dtype) == (wanted.shape, wanted.dtype)
        matched[node["leaf"]] = wanted
    elif exact and _is_scalar(node):
        fits = node == like
    if not fits:
        raise ValueError(
            f"like must fit the checkpoint at {path!r}: "
            f"saved {_describe(node, leaves)}, got {_describe(like, like_leaves)}; "
            "pass a tree with the structure, shapes and dtypes of the one saved"
        )
    children, others = dict(_items(node)), dict(_items(like))
    if children.keys() != others.keys():
        missing = sorted(map(str, children.keys() - others.keys()))
        extra = sorted(map(str, others.keys() - children.keys()))
        raise ValueError(
            f"like must have the saved keys at {path!r}: "
            f"it lacks {missing} and adds {extra}; "
            "pass a tree with the structure of the one saved"
        )
    if kind != "dict" and list(children) != list(others):
        raise ValueError(
            f"like must have the fields of {kind} at {path!r} in the saved order "
            f"{list(children)}, got {list(others)}; pass a tree of the class saved"
        )
    for key, child in children.items():
        deeper = exact or kind in TYPES
        below = join(path, key)
        _match(child, leaves, others[key], like_leaves, matched, below, exact=deeper)


def _kind(node: Node) -> str:
    """Name what two nodes must have in common: the container or the type."""
    if not isinstance(node, dict):
        return "None" if node is None else "scalar"
    for head in ("type", "jopt"):
        if head in node:
            return str(node[head])
    first = next(iter(node))
    return first if first in ("leaf", "list", "tuple", "dict", "function") else "scalar"


def _is_scalar(node: Node) -> bool:
    return _kind(node) == "scalar"


def _describe(node: Node, leaves: Sequence[Leaf]) -> str:
    kind = _kind(node)
    if kind == "leaf":
        return str(leaves[node["leaf"]])
    if kind == "scalar":
        return repr(decode(node, ()))
    return kind if kind in ("None", "function") else f"a {kind}"


def _items(node: Node) -> list[tuple[Any, Node]]:
    match node:
        case {"dict": keys, "nodes": nodes} | {"keys": keys, "nodes": nodes}:
            return list(zip(keys, nodes, strict=True))
        case {"list": nodes} | {"tuple": nodes}:
            return list(enumerate(nodes))
    return []


def _flatten_once(value: Any) -> tuple[list[tuple[str | None, Any]], Any]:
    """Split a pytree node into its children, by name, and what joins them again.

    The child of a box has no name, as it adds nothing to the path.
    """
    items, treedef = jax.tree_util.tree_flatten_with_path(
        value, is_leaf=lambda node: node is not value
    )
    named = not paths.is_box(value)
    return [
        (paths.key_name(keys[-1]) if named else None, child) for keys, child in items
    ], treedef


def _fields(kind: type) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(getattr(kind, "_fields", ()))


def join(path: str, key: Any) -> str:
    """Return the path of a child; a key that is None adds nothing."""
    if key is None:
        return path
    return f"{path}/{key}" if path else str(key)


def _is_array(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"tree must hold concrete arrays, got the tracer {value}; "
            "save and restore outside jit"
        )
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        return True
    return type(value) in (np.ndarray, np.memmap)


def _leaf(value: Any, path: str) -> Leaf:
    dtype, shape = value.dtype, tuple(value.shape)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return Leaf(path, "key", shape, str(dtype), value)
    kind: Kind = "numpy" if isinstance(value, np.ndarray) else "jax"
    return Leaf(path, kind, shape, _checked_dtype(dtype, path), value)


def _checked_dtype(dtype: Any, path: str) -> str:
    if dtype.name not in DTYPES or not dtype.isnative:
        raise TypeError(
            f"tree must hold arrays of numbers or bools, got {dtype!r} at {path!r}; "
            "convert it first"
        )
    return str(dtype.name)
