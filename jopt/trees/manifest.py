"""The manifest of a checkpoint: what is in it, with a checksum for every piece.

    manifest.json.gz = {version, tree, leaves, files, metadata, ...}

* a leaf's checksum is CRC-32 over its path, dtype, shape and bytes, so values that come
  back under another name, cut or cast do not pass;
* a leaf that is partitioned over devices has one checksum per block, each computed from
  one shard; no device and no host ever holds the whole array for it;
* every file beside the manifest has its size and CRC-32 in it, so damage is found, and
  named, before anything tries to decode it;
* the manifest itself is covered by the CRC-32 of its gzip container.

CRC-32 sees every change of up to 32 adjacent bits and misses one in 2^32 of all others.
It is a guard against accidents, not against forgery, and runs at 4 GB/s where SHA-256
with hardware support runs at 1.8 and BLAKE2b at 0.9.
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

NAME = "manifest.json.gz"
VERSION = 1

Block = tuple[tuple[int, int], ...]  # (start, stop) along every axis

_NIBBLES = ("float4_e2m1fn",)
_CHUNK = 1 << 24


class CheckpointError(ValueError):
    """A checkpoint is damaged: what it holds is not what was saved."""


def leaf_checksum(path: str, dtype: str, shape: tuple[int, ...], block: Any) -> int:
    """Compute the checksum of a leaf, or of one block of it.

    Args:
        path: the path of the leaf.
        dtype: the dtype of the leaf, as it reads in the manifest.
        shape: the shape of the block.
        block: its elements, a NumPy array.

    Returns:
        CRC-32 over path, dtype, shape and bytes.

    >>> leaf_checksum("w", "int8", (2,), np.array([1, 2], np.int8))
    3685035250
    """
    header = zlib.crc32(json.dumps([path, dtype, list(shape)]).encode())
    return zlib.crc32(canonical_bytes(block).data, header)


def canonical_bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """View the elements of an array in C order as bytes.

    Elements of fewer than 8 bits take a byte each; its unused bits are cleared or, for
    signed integers, repeat the sign, so equal values have equal bytes.

    Args:
        array: a NumPy array of any dtype that checkpoints take.

    Returns:
        uint8, a view of the array itself where it is contiguous.

    >>> bytes(canonical_bytes(np.array([[1, 2], [3, 4]], np.uint8).T))
    b'\\x01\\x03\\x02\\x04'
    """
    array = np.ascontiguousarray(widened(array))
    data = array.reshape(-1).view(np.uint8)
    return np.bitwise_and(data, 0x0F) if array.dtype.name in _NIBBLES else data


def widened(array: Any) -> Any:
    """Widen 2- and 4-bit integers to 8 bits, which every storage takes.

    Args:
        array: a NumPy or JAX array.

    Returns:
        int8 for int2 and int4, uint8 for uint2 and uint4, else the array itself.

    >>> import jax.numpy as jnp
    >>> widened(jnp.array([1, -2], jnp.int4))
    Array([ 1, -2], dtype=int8)
    """
    match array.dtype.name:
        case "int2" | "int4":
            return array.astype(np.int8)
        case "uint2" | "uint4":
            return array.astype(np.uint8)
    return array


def write(directory: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a directory, with the checksum of every file in it.

    Args:
        directory: a directory whose other files are complete.
        content: the JSON content to which version and files are added.
    """
    files = {
        str(file.relative_to(directory)): file_checksum(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in _LATE
    }
    text = json.dumps({"version": VERSION, **content, "files": files})
    (directory / NAME).write_bytes(gzip.compress(text.encode(), mtime=0))


# Orbax writes these after the manifest; nothing is read from them.
_LATE = (NAME, "_CHECKPOINT_METADATA", "commit_success.txt")


def read(directory: pathlib.Path) -> dict[str, Any]:
    """Read and check the manifest of a directory.

    Args:
        directory: a checkpoint.

    Returns:
        The content, version and files included.

    Raises:
        CheckpointError: the manifest is missing or damaged.
        ValueError: a later version of this library wrote it.
    """
    file = directory / NAME
    try:
        content = json.loads(gzip.decompress(file.read_bytes()))
    except FileNotFoundError as error:
        raise CheckpointError(f"{NAME} is missing") from error
    # gzip and zlib raise these for a wrong checksum, a cut file and garbage.
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise CheckpointError(f"{NAME} is damaged ({error})") from error
    if content["version"] > VERSION:
        raise ValueError(
            f"checkpoint must be of version {VERSION} or older, got version "
            f"{content['version']} in {directory}; update jopt"
        )
    return dict(content)


def check_files(directory: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Raise unless every file is there and unchanged.

    Args:
        directory: a checkpoint.
        content: its manifest.

    Raises:
        CheckpointError: files are missing, cut or changed; the message names them.
    """
    damage = []
    for name, (size, checksum) in content["files"].items():
        try:
            found = file_checksum(directory / name)
        except FileNotFoundError:
            damage.append(f"{name} is missing")
            continue
        except OSError as error:
            damage.append(f"{name} cannot be read ({error.strerror})")
            continue
        if found[0] != size:
            damage.append(f"{name} has {found[0]} bytes instead of {size}")
        elif found[1] != checksum:
            damage.append(f"{name} has changed bytes")
    if damage:
        raise CheckpointError(", ".join(damage))


def file_checksum(file: pathlib.Path) -> tuple[int, int]:
    """Compute the size and the CRC-32 of a file.

    Args:
        file: the file.

    Returns:
        Size in bytes and checksum.
    """
    size, checksum = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum
