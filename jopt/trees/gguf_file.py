"""Weights of GGUF files, the format of llama.cpp, as quantized arrays.

Of its many types two are what a `QuantizedArray` holds, both in blocks of 32 along the
last axis with a float16 scale d:

    Q4_0   16 bytes: element i and element i + 16 are the halves of byte i;
           w = d * (half - 8)
    Q8_0   32 bytes: w = d * byte, signed

Scales become float32, so `jopt.dequantize` gives the numbers of `gguf.dequantize`, bit
for bit. Q4_0 has the code -8, and scales below zero, which jopt itself never writes.
"""

import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import formats
from jopt.arrays.arguments import check_path
from jopt.arrays.formats import Format
from jopt.arrays.packing import pack_codes
from jopt.arrays.quantized import QuantizedArray
from jopt.arrays.specs import QuantSpec
from jopt.trees import orientation
from jopt.trees.container import Array
from jopt.trees.manifest import CheckpointError
from jopt.trees.rules import Predicate

_BLOCK = 32
_PLAIN = ("F32", "F16", "F64", "I8", "I16", "I32", "I64")
# What the reader of the package raises at bytes that are none of a GGUF file.
_DAMAGE = (ValueError, IndexError, KeyError, OverflowError, MemoryError)


def read_gguf(
    path: str | pathlib.Path,
    *,
    select: Predicate | None = None,
    transposed: Predicate | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the tensors of a GGUF file; it takes the `gguf` package, `jopt[gguf]`.

    w = d * code

    The format has no checksums, so only a file that is cut or has no sense is noticed.

    Args:
        path: the file.
        select: which tensors to read, a predicate `(name, leaf) -> bool` such as
            `jopt.matching("blk.*")`, where the leaf has a shape and no values; None
            for all.
        transposed: which matrices to return as [in, out], a predicate as `select`. The
            file has them as [out, in], and so they come when None. It costs nothing:
            the codes of a quantized array stay as they lie.

    Returns:
        Name to leaf, and the metadata of the file. Q4_0 and Q8_0 are `QuantizedArray`s,
        other types arrays: of JAX, or of NumPy what JAX is set not to hold.

    Raises:
        ImportError: the package is not installed.
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or no GGUF file.
        ValueError: a tensor is of another type.
    """
    gguf = _import_gguf()
    check_path(path)
    file = pathlib.Path(path).absolute()
    if not file.is_file():
        raise FileNotFoundError(
            f"path must be a file, got {str(path)!r}, which is none"
        )
    try:
        reader = gguf.GGUFReader(file)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
    except _DAMAGE as error:
        raise CheckpointError(
            f"path must be a whole GGUF file, got {str(path)!r} ({error}); "
            "load it again from where it came"
        ) from error
    if reader.byte_order != "I":
        raise ValueError(
            f"path must be a file of this machine's byte order, got {str(path)!r}; "
            "gguf-convert-endian converts it"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: _abstract(tensor) for name, tensor in tensors.items()}
    orientation.check_patterns(select, shapes)
    if select is not None:
        tensors = {n: t for n, t in tensors.items() if select(n, shapes[n])}
    _check_types(tensors)
    leaves = {name: _leaf(tensor) for name, tensor in tensors.items()}
    return orientation.turn_selected(leaves, transposed), metadata


def _import_gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            "read_gguf needs the gguf package, which is not installed; "
            "pip install 'jopt[gguf]'"
        ) from error


def _abstract(tensor: Any) -> Any:
    shape = tuple(map(int, tensor.shape[::-1]))
    return jax.eval_shape(lambda: jnp.empty(shape, jnp.float32))


def _check_types(tensors: Mapping[str, Any]) -> None:
    known = {*_PLAIN, "BF16", *_CODES}
    others = {n: t.tensor_type.name for n, t in tensors.items()}
    others = {name: kind for name, kind in others.items() if kind not in known}
    if others:
        first = next(iter(others))
        raise ValueError(
            f"path must hold tensors of {', '.join(sorted(known))}, got "
            f"{', '.join(sorted(set(others.values())))}, in {len(others)} tensors such "
            f"as {first!r}; leave them out by select=, or quantize what "
            "gguf.dequantize gives by jopt.quantize"
        )


def _leaf(tensor: Any) -> Any:
    kind = tensor.tensor_type.name
    if kind == "BF16":
        return jnp.array(tensor.data.view(jnp.bfloat16))
    if kind in _PLAIN:
        is_held = jax.dtypes.canonicalize_dtype(tensor.data.dtype) == tensor.data.dtype
        return jnp.array(tensor.data) if is_held else np.array(tensor.data)
    return _quantized(tensor.data, *_CODES[kind])


def _quantized(
    data: Array, format: Format, codes_of: Callable[[Array], Array]
) -> QuantizedArray:
    """Part blocks `[..., bytes]` into codes and scales."""
    lead = data.shape[:-1]
    size = 2 + _BLOCK * format.bits // 8
    blocks = data.reshape(*lead, data.shape[-1] // size, size)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    codes = codes_of(blocks[..., 2:])
    codes = codes.reshape(*lead, codes.shape[-2] * _BLOCK)
    is_packed = format.bits < 8
    spec = QuantSpec(
        format,
        axis=tuple(range(-data.ndim, -1)),
        group_size=_BLOCK,
        narrow_range=False if is_packed else None,  # Q4_0: scales of either sign
        scale_dtype=jnp.float32,
    )
    return QuantizedArray(
        pack_codes(codes, format.bits, axis=-1) if is_packed else jnp.array(codes),
        jnp.array(scale, jnp.float32),
        spec=spec,
        dtype=np.dtype(np.float32),
        packed_axis=-1 if is_packed else None,
        packed_size=codes.shape[-1] if is_packed else None,
    )


def _halves(data: Array) -> Array:
    """Return the codes of Q4_0: lower halves of all bytes, then the upper ones."""
    halves = np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=-1)
    return halves.astype(np.int8) - np.int8(8)


def _bytes(data: Array) -> Array:
    return np.ascontiguousarray(data).view(np.int8)


_CODES: dict[str, tuple[Format, Callable[[Array], Array]]] = {
    "Q4_0": (formats.int4, _halves),
    "Q8_0": (formats.int8, _bytes),
}
