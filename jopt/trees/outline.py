"""A tree in few words: what a file says beside its tensors, and how they are named.

    {"dense": {"bias": [], "kernel": ["quantized"]}, "step": 7}

is the outline of two arrays and a number: a JSON object is a dict, an empty list an
array, and a list with a word in front anything else. A tensor is named by the path of
its array, 'dense/bias', and a quantized array is one tensor per part,
'dense/kernel.codes' and 'dense/kernel.scale', which a table describes:

    quantized: {"dense/kernel": {"spec": 0, "dtype": "float32", "packed_axis": -2, ...}}
    specs:     [{"format": "int4", "axis": -1, "group_size": 32, ...}]

The nodes of `structure` say the same in five times the bytes, which are more than the
weights of a small model. docs/safetensors.md specifies the outline.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jopt.arrays import formats
from jopt.arrays.quantized import QuantizedArray
from jopt.arrays.specs import QuantSpec
from jopt.trees import structure
from jopt.trees.structure import Leaf, Node

PARTS = (
    "codes",
    "scale",
    "zero_point",
    "outer_scale",
    "input_scale",
    "permutation",
)
_USUAL = ("codes", "scale")
_STATIC = ("packed_axis", "packed_size", "order")
_ROOT = "root"  # the name of a tree that is a leaf itself
_RESERVED = "__metadata__"  # of the container
_FORMATS = {
    name: format
    for name in formats.__all__
    if isinstance(format := getattr(formats, name), formats.Format)
}
# What stands behind the word in front, by the keys that a node of `structure` has.
_KEYS = {
    "float": ("float",),
    "complex": ("complex",),
    "bytes": ("bytes",),
    "dtype": ("dtype",),
    "function": ("function",),
    "numpy": ("numpy", "hex"),
}

Content = dict[str, Any]  # JSON: tree, quantized, specs


class Tensor(NamedTuple):
    """A leaf as a file has it: its name there, and its path in the tree."""

    name: str
    path: str


def write(node: Node, leaves: Sequence[Leaf]) -> tuple[Content, list[str]]:
    """Turn the structure of a tree into its outline.

    Args:
        node: what `structure.encode` returned.
        leaves: the leaves it listed.

    Returns:
        The content, and the name of the tensor of each leaf.

    >>> content, names = write(*structure.encode({"a": (jnp.ones(2), 7)}))
    >>> content["tree"], names
    ({'a': ['tuple', [], 7]}, ['a/0'])
    """
    writer = _Writer([leaf.path for leaf in leaves])
    content = {"tree": writer.outline(node)}
    if writer.quantized:
        content |= {"quantized": writer.quantized, "specs": writer.specs}
    return content, writer.names


def read(content: Content) -> tuple[Node, list[Tensor]]:
    """Turn an outline into the structure of its tree.

    Args:
        content: what `write` returned, from a file whose checksum is right.

    Returns:
        A node as `structure.encode` returns it, and the tensor of each leaf in turn.

    >>> read({"tree": {"a": ["list", [], 7]}})
    ({'dict': ['a'], 'nodes': [{'list': [{'leaf': 0}, 7]}]}, [Tensor(name='a/0', \
path='a/0')])
    """
    reader = _Reader(content.get("quantized", {}), content.get("specs", []))
    return reader.node(content["tree"], ""), reader.tensors


class _Names:
    """The names of tensors: paths, with '#1', '#2' ... where two would be the same."""

    def __init__(self) -> None:
        self._taken = {_RESERVED}

    def of_array(self, path: str) -> str:
        return next(n for n in _candidates(path) if self._take([n]))

    def of_quantized(self, path: str) -> str:
        # All parts are taken, so that the name does not depend on which there are.
        return next(
            name
            for name in _candidates(path)
            if self._take([f"{name}.{part}" for part in PARTS])
        )

    def _take(self, names: list[str]) -> bool:
        is_free = self._taken.isdisjoint(names)
        if is_free:
            self._taken.update(names)
        return is_free


def _candidates(path: str) -> Iterator[str]:
    yield path or _ROOT
    yield from (f"{path or _ROOT}#{count}" for count in itertools.count(1))


class _Writer:
    """Walks a node and lists what it finds, in the order of leaves."""

    def __init__(self, paths: list[str]) -> None:
        self._paths, self._unique = paths, _Names()
        self.names: list[str] = []
        self.quantized: dict[str, Any] = {}
        self.specs: list[Any] = []

    def outline(self, node: Node) -> Any:
        if not isinstance(node, dict):
            return node
        if "leaf" in node:
            self.names.append(self._unique.of_array(self._paths[node["leaf"]]))
            return []
        if "dict" in node:
            children = [self.outline(child) for child in node["nodes"]]
            if all(isinstance(key, str) for key in node["dict"]):
                return dict(zip(node["dict"], children, strict=True))
            return ["dict", node["dict"], children]
        if "nodes" in node:
            parts = _parts(node)
            if parts is not None:
                self._describe(parts)
                return ["quantized"]
            head = "jopt" if "jopt" in node else "type"
            children = [self.outline(child) for child in node["nodes"]]
            return [head, node[head], node["keys"], children]
        head, first = next(iter(node.items()))
        if head in ("list", "tuple"):
            return [head, *map(self.outline, first)]
        return [head, *node.values()]

    def _describe(self, fields: dict[str, Any]) -> None:
        """List a quantized array in the table, and its parts as leaves."""
        path = self._paths[fields["codes"]["leaf"]]
        name = self._unique.of_quantized(path.removesuffix("codes").removesuffix("/"))
        parts = [part for part in PARTS if fields[part] is not None]
        self.names += [f"{name}.{part}" for part in parts]
        spec = _encode_spec(structure.decode(fields["spec"], ()))
        if spec not in self.specs:
            self.specs.append(spec)
        row = {"spec": self.specs.index(spec), "dtype": fields["dtype"]["dtype"]}
        if parts != list(_USUAL):
            row["parts"] = parts
        row |= {k: fields[k] for k in _STATIC if fields[k] not in (None, "kn")}
        self.quantized[name] = row


class _Reader:
    """Walks an outline and names its leaves in the order in which they were written."""

    def __init__(self, quantized: dict[str, Any], specs: list[Any]) -> None:
        self._quantized, self._unique = quantized, _Names()
        self._specs = [structure.encode(_decode_spec(spec))[0] for spec in specs]
        self.tensors: list[Tensor] = []

    def node(self, outline: Any, path: str) -> Node:
        if isinstance(outline, dict):
            return {
                "dict": list(outline),
                "nodes": self._children(list(outline), list(outline.values()), path),
            }
        if not isinstance(outline, list):
            return outline
        if not outline:
            return self._leaf(self._unique.of_array(path), path)
        head, *rest = outline
        match head:
            case "quantized":
                return self._describe(path)
            case "list" | "tuple":
                return {head: self._children(list(range(len(rest))), rest, path)}
            case "dict":
                keys, children = rest
                return {"dict": keys, "nodes": self._children(keys, children, path)}
            case "jopt" | "type":
                name, keys, children = rest
                nodes = self._children(keys, children, path)
                return {head: name, "keys": keys, "nodes": nodes}
        return dict(zip(_KEYS[head], rest, strict=True))

    def _children(self, keys: list[Any], outlines: list[Any], path: str) -> list[Node]:
        return [
            self.node(outline, structure.join(path, key))
            for key, outline in zip(keys, outlines, strict=True)
        ]

    def _describe(self, path: str) -> Node:
        name = self._unique.of_quantized(path)
        row = self._quantized[name]
        fields: dict[str, Any] = dict.fromkeys(_FIELDS)
        for part in row.get("parts", _USUAL):
            fields[part] = self._leaf(f"{name}.{part}", structure.join(path, part))
        fields |= {"spec": self._specs[row["spec"]], "dtype": {"dtype": row["dtype"]}}
        fields |= {"order": "kn"} | {key: row[key] for key in _STATIC if key in row}
        nodes = list(fields.values())
        return {"jopt": "QuantizedArray", "keys": list(_FIELDS), "nodes": nodes}

    def _leaf(self, name: str, path: str) -> Node:
        self.tensors.append(Tensor(name, path))
        return {"leaf": len(self.tensors) - 1}


_FIELDS = tuple(field.name for field in dataclasses.fields(QuantizedArray))


def _parts(node: Node) -> dict[str, Any] | None:
    """Return the fields of a quantized array whose parts are arrays, else None."""
    if node.get("jopt") != "QuantizedArray":
        return None
    fields = dict(zip(node["keys"], node["nodes"], strict=True))
    given = [fields[part] for part in PARTS if fields[part] is not None]
    are_leaves = all(isinstance(part, dict) and "leaf" in part for part in given)
    is_usual = all(fields[part] is not None for part in _USUAL)
    return fields if is_usual and are_leaves else None


def _encode_spec(spec: QuantSpec) -> dict[str, Any]:
    own = spec.format
    is_known = _FORMATS.get(own.name) == own
    # Left out where it is usual: files from before it was there say nothing.
    is_usual = spec.narrow_range is None
    range_of = {} if is_usual else {"narrow_range": spec.narrow_range}
    return {
        "format": own.name if is_known else dataclasses.asdict(own),
        "axis": list(spec.axis) if isinstance(spec.axis, tuple) else spec.axis,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "scale_dtype": jnp.dtype(spec.scale_dtype).name,
        **range_of,
    }


def _decode_spec(row: dict[str, Any]) -> QuantSpec:
    format, axis = row["format"], row["axis"]
    if isinstance(format, dict):
        values = tuple(format["values"])
        format = formats.Format(**{**format, "values": values})
    else:
        format = _FORMATS[format]
    return QuantSpec(
        format,
        axis=tuple(axis) if isinstance(axis, list) else axis,
        group_size=row["group_size"],
        symmetric=row["symmetric"],
        narrow_range=row.get("narrow_range"),
        scale_dtype=jnp.dtype(row["scale_dtype"]),
    )
