"""A tree as one safetensors file: for models that leave, in a format others can read.

    jopt.save("model.safetensors", packed)
    packed = jopt.restore("model.safetensors")

Its tensors are plain arrays under the paths of the tree; codes of few bits are packed
as they are in memory. One string of metadata, 'jopt', is JSON that describes the rest:

    crc32      of this string itself, with zeros in place of its own digits
    version    of the format
    tree       the outline, with the tables `quantized` and `specs`, see `outline`
    arrays     what a tensor does not say of its array: NumPy's, keys, int4 ...
    checksums  CRC-32 of each tensor: name, dtype, shape and data
    metadata   the caller's own; as an outline, under another name, where it holds NaN

So nothing in the file can change without being seen, and a file appears under its name
by a rename. docs/safetensors.md is the specification, for readers in any language.
"""

import json
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jopt.arrays.arguments import check_path
from jopt.trees import container, outline, storage, structure
from jopt.trees.container import Array
from jopt.trees.manifest import CheckpointError

SUFFIX = ".safetensors"
VERSION = 1

_KEY = "jopt"
_OUTLINED = "metadata_outline"
_NO_SUM = "00000000"
_HEAD = re.compile(r'\{"crc32":"([0-9a-f]{8})",')


def is_single_file(path: str | pathlib.Path) -> bool:
    """Tell by the suffix whether a path names one file and not a directory of steps.

    Raises:
        TypeError: it is no path.

    >>> is_single_file("model.safetensors"), is_single_file("run/checkpoints")
    (True, False)
    """
    check_path(path)
    return pathlib.Path(path).suffix.lower() == SUFFIX


def save(
    path: str | pathlib.Path, tree: Any, *, metadata: dict[str, Any], overwrite: bool
) -> None:
    """Write a tree to a file.

    Args:
        path: the file.
        tree: as for `checkpoint.save`; sharded leaves are gathered.
        metadata: JSON content of the caller's own, and numbers that are not finite.
        overwrite: whether to replace a file.

    Raises:
        ValueError: the file exists, or a key cannot be in the name of a tensor.
        TypeError: a leaf is of a type that cannot be saved.
    """
    file = pathlib.Path(path).absolute()
    if file.exists() and not (overwrite and file.is_file()):
        way_out = "pass overwrite=True" if file.is_file() else "choose another name"
        raise ValueError(
            f"path must be new, got {str(path)!r}, which exists; {way_out}"
        )
    node, leaves = structure.encode(tree)
    content, names = outline.write(node, leaves)
    _check_names(names)
    tensors: dict[str, Array] = {}
    arrays: dict[str, Any] = {}
    for name, leaf in zip(names, leaves, strict=True):
        row, value = storage.describe(leaf)
        tensors[name] = container.to_tensor(np.asarray(value))
        about = _about(row, tensors[name])
        if about:
            arrays[name] = about
    content |= {"arrays": arrays} if arrays else {}
    content["checksums"] = [_checksum(name, tensors[name]) for name in sorted(tensors)]
    content |= _write_metadata(metadata)
    file.parent.mkdir(parents=True, exist_ok=True)
    container.write_file(file, tensors, {_KEY: _seal(content)})


def restore(path: str | pathlib.Path, *, like: Any) -> tuple[Any, dict[str, Any]]:
    """Read a tree from a file.

    Args:
        path: the file.
        like: the template, or None.

    Returns:
        The tree and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or of another program.
        ValueError: `like` is needed or does not fit, or a later version of this
            library wrote the file.
    """
    tensors, content = _open(path)
    node, found = outline.read(content)
    damaged = _damage(tensors, content["checksums"], [tensor.name for tensor in found])
    if damaged:
        raise CheckpointError(
            f"path must hold a whole tree, got {str(path)!r} with {damaged}; "
            "restore a copy of it"
        )
    arrays = content.get("arrays", {})
    rows = [
        _row(path, arrays.get(name, {}), tensors[name].dtype.name, tensors[name].shape)
        for name, path in found
    ]
    places = storage.find_places(node, rows, like)
    values = []
    for (name, _), row, place in zip(found, rows, places, strict=True):
        dtype, shape = row.get("stored", (row["dtype"], row["shape"]))
        stored = container.from_tensor(tensors[name], dtype, tuple(shape))
        values.append(storage.finish(row, place, stored))
    return structure.decode(node, values, like=like), _read_metadata(content)


def read_metadata(path: str | pathlib.Path) -> dict[str, Any]:
    """Read the caller's own metadata, without reading the tensors.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or of another program.
    """
    return _read_metadata(_open(path)[1])


def _write_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of the metadata: an outline where JSON has no such numbers."""
    if not metadata:
        return {}
    try:
        json.dumps(metadata, allow_nan=False)
    except ValueError:
        node, _ = structure.encode(metadata)
        return {_OUTLINED: outline.write(node, [])[0]["tree"]}
    return {"metadata": metadata}


def _read_metadata(content: Mapping[str, Any]) -> dict[str, Any]:
    if _OUTLINED in content:
        node, _ = outline.read({"tree": content[_OUTLINED]})
        return dict(structure.decode(node, ()))
    return dict(content.get("metadata", {}))


def _check_names(names: Sequence[str]) -> None:
    """Raise for names that have no UTF-8, which those of tensors are written in."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"tree must have keys of whole characters in a file, got {name!r} with "
                f"half of one ({error.reason}); rename it"
            ) from error


def _open(path: str | pathlib.Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return tensors, not checked yet, and the content of the metadata, checked."""
    file = pathlib.Path(path).absolute()
    if not file.is_file():
        raise FileNotFoundError(
            f"path must be a file, got {str(path)!r}, which is none; jopt.save makes it"
        )
    tensors, metadata = container.read_file(file)
    if _KEY not in metadata:
        raise CheckpointError(
            f"path must be a file that jopt.save wrote, got {str(path)!r} without the "
            f"metadata {_KEY!r}; read those of other programs with "
            "jopt.read_compressed_tensors or safetensors.numpy.load_file"
        )
    return tensors, _unseal(metadata[_KEY], path)


def _seal(content: Mapping[str, Any]) -> str:
    """Write content as JSON that carries its own checksum."""
    text = json.dumps(
        {"crc32": _NO_SUM, "version": VERSION, **content}, separators=(",", ":")
    )
    return text.replace(_NO_SUM, f"{zlib.crc32(text.encode()):08x}", 1)


def _unseal(text: str, path: str | pathlib.Path) -> dict[str, Any]:
    head = _HEAD.match(text)
    zeroed = text.replace(head[1], _NO_SUM, 1) if head else ""
    if head is None or zlib.crc32(zeroed.encode()) != int(head[1], 16):
        raise CheckpointError(
            f"path must hold whole metadata, got {str(path)!r}, where it is damaged; "
            "restore a copy of it"
        )
    content = json.loads(text)
    if content["version"] > VERSION:
        raise ValueError(
            f"path must hold a file of version {VERSION} or older, got version "
            f"{content['version']} in {str(path)!r}; update jopt"
        )
    return dict(content)


def _checksum(name: str, tensor: Array) -> int:
    """Compute the CRC-32 of a tensor: of four lines, the last of them its data."""
    shape = ",".join(map(str, tensor.shape))
    head = f"{name}\n{container.DTYPES[tensor.dtype.name]}\n{shape}\n"
    data = np.require(tensor, requirements="C").reshape(-1).view(np.uint8)
    return zlib.crc32(data.data, zlib.crc32(head.encode()))


def _damage(
    tensors: Mapping[str, Array], checksums: list[int], names: list[str]
) -> str:
    """Say what is damaged, '' if nothing is."""
    missing = sorted(set(names) - tensors.keys())
    extra = sorted(tensors.keys() - set(names))
    if missing or extra:
        return f"tensors {missing} missing and {extra} too many"
    changed = [
        name
        for name, saved in zip(sorted(tensors), checksums, strict=True)
        if _checksum(name, tensors[name]) != saved
    ]
    return f"changed tensors {changed}" if changed else ""


def _about(row: storage.Row, tensor: Array) -> dict[str, Any]:
    """Return what the tensor of a leaf does not say."""
    extras = ("sharding", "weak", "impl")
    about = {key: row[key] for key in extras if row.get(key) is not None}
    if row["kind"] != "jax":
        about["kind"] = row["kind"]
    if (row["dtype"], row["shape"]) != (tensor.dtype.name, list(tensor.shape)):
        about |= {"dtype": row["dtype"], "shape": row["shape"]}
    return about


def _row(
    path: str, about: dict[str, Any], dtype: str, shape: tuple[int, ...]
) -> storage.Row:
    """Rebuild the row of a leaf from its tensor and what was said about it."""
    row = {"kind": "jax", "dtype": dtype, "shape": list(shape), **about, "path": path}
    if row["kind"] == "key":
        row["stored"] = [dtype, list(shape)]
    return row
