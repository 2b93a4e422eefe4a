"""NumPy arrays as tensors of a safetensors file, and back.

    8 bytes   size of the header, little endian
    header    JSON: name -> dtype, shape, place of the data; '__metadata__' -> strings
    data      the elements, in C order, little endian

The `safetensors` package writes files, and checks them before they are read. What the
container has no dtype for is stored as a line of bytes (U8): integers and floats below
8 bits as a little-endian bit stream, as codes are packed, all else as its own bytes.
The caller keeps the dtype and the shape of these.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jopt.trees.manifest import CheckpointError

Array = np.ndarray[Any, Any]

# The container's name of each dtype that it has.
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_NAMES = {code: name for name, code in DTYPES.items()}
_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}


def to_tensor(array: Array) -> Array:
    """Return an array as the container can hold it.

    Args:
        array: of any dtype that checkpoints take.

    Returns:
        The array in C order, or its bytes where the container has no such dtype.

    >>> to_tensor(np.array([1, -2, 3]).astype(jnp.int4))
    array([225,   3], dtype=uint8)
    """
    array = np.require(array, requirements="C")  # keeps a scalar one
    if array.dtype.name in DTYPES:
        return array
    if array.dtype.name in _BITS:
        return _pack(array.reshape(-1).view(np.uint8), _BITS[array.dtype.name])
    return array.reshape(-1).view(np.uint8)


def from_tensor(tensor: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    """Return the array that `to_tensor` stored.

    Args:
        tensor: what it returned.
        dtype: name of the dtype of the array.
        shape: of the array.

    Returns:
        The array.

    Raises:
        CheckpointError: the tensor is of another size.

    >>> from_tensor(np.array([225, 3], np.uint8), "int4", (3,))
    array([1, -2, 3], dtype=int4)
    """
    if tensor.dtype.name == dtype and tensor.shape == shape:
        return tensor
    size, bits = int(np.prod(shape)), _BITS.get(dtype)
    width = 8 * jnp.dtype(dtype).itemsize if bits is None else bits
    if tensor.dtype != np.uint8 or tensor.shape != (-(-size * width // 8),):
        raise CheckpointError(
            f"a tensor of {tensor.dtype}{list(tensor.shape)} is no {dtype}{list(shape)}"
        )
    if bits is None:
        return tensor.view(jnp.dtype(dtype)).reshape(shape)
    codes = _unpack(tensor, bits, size).reshape(shape)
    if dtype.startswith("int"):
        spare = 8 - bits
        return ((codes << spare).view(np.int8) >> spare).astype(jnp.dtype(dtype))
    return codes.view(jnp.dtype(dtype))


def write_file(
    path: pathlib.Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write a file, complete and on disk before it gets its name.

    Args:
        path: the file; one that is there is replaced.
        tensors: arrays of the dtypes in `DTYPES`, in C order.
        metadata: strings for the header. Several come in any order, so with more than
            one the same tensors may give files of different bytes.
    """
    # A folder, because the package writes to a name of chance beside the one it is told
    # and leaves it there if the process is killed: the next save takes all of it away,
    # so its name is one that nobody else would choose.
    folder = path.with_name(path.name + ".jopt.tmp")
    unfinished = folder / path.name
    specs = {
        name: safetensors.TensorSpec(
            dtype=tensor.dtype.name,
            shape=tensor.shape,
            data_ptr=tensor.ctypes.data,
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    try:
        _remove(folder)
        folder.mkdir()
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as others may read; the package says 0600
        safetensors.serialize_file(specs, unfinished, dict(metadata))
        unfinished.chmod(mode)
        with unfinished.open("rb+") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        _remove(folder)
    if hasattr(os, "O_DIRECTORY"):  # where directories can be written through
        directory = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read_file(path: pathlib.Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Open a file.

    Args:
        path: the file.

    Returns:
        Its tensors by name, as read-only views of the file, and its metadata.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is no whole safetensors file.
        ValueError: it holds a dtype that NumPy has not.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as checked:
            metadata = dict(checked.metadata() or {})
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} is damaged ({error})") from error
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    unknown = {row["dtype"] for row in header.values()} - _NAMES.keys()
    if unknown:
        raise ValueError(
            f"path must hold tensors of {sorted(_NAMES)}, got {sorted(unknown)} in "
            f"{str(path)!r}; convert them first"
        )
    data: Array = np.empty(0, np.uint8)  # an empty map is an error
    if path.stat().st_size > 8 + size:
        data = np.memmap(path, np.uint8, mode="r", offset=8 + size).view(np.ndarray)
    return {name: _view(data, row) for name, row in header.items()}, metadata


def _remove(folder: pathlib.Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _view(data: Array, row: dict[str, Any]) -> Array:
    start, stop = row["data_offsets"]
    return data[start:stop].view(jnp.dtype(_NAMES[row["dtype"]])).reshape(row["shape"])


def _pack(codes: Array, bits: int) -> Array:
    """Pack the lower bits of bytes, the first code into the lowest bits."""
    per_byte = 8 // bits
    codes = np.pad(codes & (2**bits - 1), (0, -codes.size % per_byte))
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(codes.reshape(-1, per_byte) << shifts, axis=1)


def _unpack(stream: Array, bits: int, size: int) -> Array:
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (stream[:, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(-1)[:size]
