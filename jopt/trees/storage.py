"""Leaves as rows of the manifest and as few arrays, and back, checked.

Leaves below 64 KiB share one array, named `SMALL`: stored one by one, each costs about
half a kilobyte beside its elements, which is more than the quantized weights of a
small model. Larger leaves are arrays of their own under their path. What lies
partitioned over devices is handed to Orbax as it is, and comes back shard by shard.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trees import manifest, placement, structure
from jopt.trees.manifest import CheckpointError
from jopt.trees.structure import Kind, Leaf, Node

SMALL = "small leaves"
SMALL_BYTES = 1 << 16

Row = dict[str, Any]  # JSON: path, kind, dtype, shape, checksums, offset or item ...


@dataclasses.dataclass(frozen=True)
class Place:
    """What a restored leaf is to be, and where."""

    kind: Kind
    sharding: jax.sharding.Sharding | None  # None for the default device


@dataclasses.dataclass(frozen=True)
class Request:
    """A stored array to read: onto a sharding, or to the host when None."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding | None


def pack(leaves: Sequence[Leaf]) -> tuple[list[Row], dict[str, Any]]:
    """Turn leaves into rows of the manifest and the arrays to store.

    Args:
        leaves: what `structure.encode` listed.

    Returns:
        A row per leaf, with its checksums, and arrays by name.

    >>> rows, arrays = pack([Leaf("w", "numpy", (2,), "int8", np.ones(2, np.int8))])
    >>> rows[0]["offset"], arrays[SMALL]
    (0, array([1, 1], dtype=uint8))
    """
    rows: list[Row] = []
    arrays: dict[str, Any] = {}
    small: list[np.ndarray[Any, Any]] = []
    offset = 0
    for leaf in leaves:
        row, stored = describe(leaf)
        _add_checksums(row, stored)
        if stored.nbytes < SMALL_BYTES:
            small.append(manifest.canonical_bytes(stored))
            row["offset"] = offset
            offset += small[-1].size
        else:
            row["item"] = _unused_name(leaf.path, arrays)
            arrays[row["item"]] = manifest.widened(stored)
        rows.append(row)
    if offset:
        arrays[SMALL] = np.concatenate(small)
    return rows, arrays


def requests(rows: Sequence[Row], places: Sequence[Place]) -> dict[str, Request]:
    """List the stored arrays that leaves are made of.

    Args:
        rows: the rows of the manifest.
        places: what each leaf is to be.

    Returns:
        What to read, by name.
    """
    found: dict[str, Request] = {}
    size = 0
    for row, place in zip(rows, places, strict=True):
        dtype, shape = _stored(row)
        if "item" in row:
            partitioned = place.kind == "jax" and placement.is_partitioned(
                place.sharding
            )
            sharding = place.sharding if partitioned else None
            found[row["item"]] = Request(shape, dtype, sharding)
        else:
            size = max(size, row["offset"] + int(np.prod(shape)) * dtype.itemsize)
    if size:
        found[SMALL] = Request((size,), np.dtype(np.uint8), None)
    return found


def unpack(
    rows: Sequence[Row], places: Sequence[Place], arrays: Mapping[str, Any]
) -> list[Any]:
    """Make leaves of stored arrays, and verify them.

    Args:
        rows: the rows of the manifest.
        places: what each leaf is to be.
        arrays: what was read for `requests`.

    Returns:
        The values of the leaves.

    Raises:
        CheckpointError: leaves differ from what was saved; the message names them.
    """
    stored = [_cut(row, arrays) for row in rows]
    damaged = [
        f"leaf {row['path']!r} has other values than were saved"
        for row, array in zip(rows, stored, strict=True)
        if not _is_intact(row, array)
    ]
    if damaged:
        raise CheckpointError(", ".join(damaged))
    return [finish(*parts) for parts in zip(rows, places, stored, strict=True)]


def find_places(node: Node, rows: Sequence[Row], like: Any) -> list[Place]:
    """Find what each leaf of a saved tree is to be, and where.

    Args:
        node: the saved structure.
        rows: a row per leaf; checksums are not looked at.
        like: the template, or None.

    Returns:
        One place per row.

    Raises:
        ValueError: a template is needed, or does not fit, or JAX is set to hold no
            arrays of a dtype.
    """
    if like is None:
        what = structure.needs_like(node)
        if what is not None:
            raise ValueError(
                f"like must be given to restore {what}, got None; "
                "pass a tree like the one saved"
            )
        return [place_of(row) for row in rows]
    like_node, like_leaves = structure.encode(like)
    saved = [leaf_of(row) for row in rows]
    matched = structure.match_like(node, saved, like_node, like_leaves)
    return list(map(place_like, rows, matched))


def leaf_of(row: Row) -> Leaf:
    """Describe the leaf of a row, without its value."""
    return Leaf(row["path"], row["kind"], tuple(row["shape"]), row["dtype"], None)


def place_of(row: Row) -> Place:
    """Find the place of a leaf without a template: where it was, if that exists here.

    Raises:
        ValueError: JAX is set to hold no arrays of the dtype.
    """
    sharding = placement.decode_sharding(row.get("sharding"))
    return _checked(row, Place(row["kind"], sharding))


def place_like(row: Row, like: Leaf) -> Place:
    """Find the place of a leaf from the leaf of a template.

    Raises:
        ValueError: JAX is set to hold no arrays of the dtype.
    """
    sharding = placement.sharding_like(like.value)
    is_abstract = isinstance(like.value, jax.ShapeDtypeStruct)
    if is_abstract and sharding is None and row["kind"] == "numpy":
        return Place("numpy", None)
    return _checked(row, Place(like.kind, sharding))


def _checked(row: Row, place: Place) -> Place:
    if place.kind == "jax":
        dtype = jnp.dtype(row["dtype"])
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"dtype of {row['path']!r} must be one that JAX holds, got "
                f"{row['dtype']}; set jax_enable_x64, under which it was saved, or "
                "pass a NumPy array in like"
            )
    return place


def describe(leaf: Leaf) -> tuple[Row, Any]:
    """Write the row of a leaf, without checksums, and find the array to store for it.

    Args:
        leaf: what `structure.encode` listed.

    Returns:
        The row, and a NumPy array or, where it is large and lies partitioned over
        devices, the JAX array itself.

    Raises:
        TypeError: it has no value.
    """
    value = leaf.value
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(
            f"tree must hold values, got the ShapeDtypeStruct {leaf} at {leaf.path!r}; "
            "save the arrays themselves"
        )
    row: Row = {
        "path": leaf.path,
        "kind": leaf.kind,
        "dtype": leaf.dtype,
        "shape": list(leaf.shape),
    }
    if leaf.kind != "numpy":
        row["sharding"] = placement.encode_sharding(value)
    if leaf.kind == "key":
        row["impl"] = str(jax.random.key_impl(value))
        value = np.asarray(jax.random.key_data(value))
        row["stored"] = [value.dtype.name, list(value.shape)]
    elif leaf.kind == "jax":
        if value.weak_type and not leaf.shape:
            row["weak"] = True
        split = placement.is_partitioned(value.sharding)
        if not split or value.nbytes < SMALL_BYTES:
            value = np.asarray(value)
    return row, value


def _add_checksums(row: Row, array: Any) -> None:
    places, checksums = [], []
    for place, block in placement.blocks_of(array):
        places.append(place)
        checksums.append(_checksum(row, block))
    row["checksums"] = checksums
    if len(places) > 1:
        row["blocks"] = places


def _checksum(row: Row, block: np.ndarray[Any, Any]) -> int:
    return manifest.leaf_checksum(row["path"], row["dtype"], block.shape, block)


def _unused_name(path: str, arrays: Mapping[str, Any]) -> str:
    name, count = path, 1
    while name in arrays or name == SMALL:
        name, count = f"{path}#{count}", count + 1
    return name


def _stored(row: Row) -> tuple[Any, tuple[int, ...]]:
    """Return dtype and shape of the elements as they are stored."""
    name, shape = row.get("stored", (row["dtype"], row["shape"]))
    return manifest.widened(np.empty(0, jnp.dtype(name))).dtype, tuple(shape)


def _cut(row: Row, arrays: Mapping[str, Any]) -> Any:
    """Find the stored elements of a leaf."""
    if "item" in row:
        return arrays[row["item"]]
    dtype, shape = _stored(row)
    size = int(np.prod(shape)) * dtype.itemsize
    data = arrays[SMALL][row["offset"] :][:size] if size else np.empty(0, np.uint8)
    return data.view(dtype).reshape(shape)


def _is_intact(row: Row, stored: Any) -> bool:
    dtype, shape = _stored(row)
    if (stored.dtype, stored.shape) != (dtype, shape):
        return False
    places = row.get("blocks", [[(0, size) for size in shape]])
    return all(
        _checksum(row, placement.read_block(stored, tuple(map(tuple, place)))) == saved
        for place, saved in zip(places, row["checksums"], strict=True)
    )


def finish(row: Row, place: Place, stored: Any) -> Any:
    """Make a leaf of its verified elements.

    Args:
        row: its row.
        place: what it is to be, and where.
        stored: its elements, of the dtype of the row or widened to bytes.

    Returns:
        A JAX or NumPy array, or PRNG keys.
    """
    if place.kind == "key":
        value = jax.random.wrap_key_data(jnp.array(stored), impl=row["impl"])
    elif place.kind == "numpy":
        # A view would keep all small leaves alive, and could not be written to.
        return np.array(stored, jnp.dtype(row["dtype"]))
    elif row.get("weak"):
        value = jnp.asarray(stored.item())
    elif isinstance(stored, jax.Array):
        return stored.astype(row["dtype"])
    else:
        # A copy, because JAX cannot donate memory that NumPy owns.
        value = jnp.array(stored, jnp.dtype(row["dtype"]))
    return value if place.sharding is None else jax.device_put(value, place.sharding)
