"""Quantized leaves to modules: codes [out, in], their scales, and the config."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import formats
from jopt.arrays.arguments import check_path
from jopt.arrays.packing import unpack_codes
from jopt.arrays.quantized import QuantizedArray
from jopt.arrays.specs import QuantSpec
from jopt.trees import container, paths
from jopt.trees.compressed_tensors.words import (
    CONFIG,
    INT,
    KEY,
    METHOD,
    PACKED,
    Weights,
    pack_words,
)
from jopt.trees.container import Array
from jopt.trees.orientation import KERNELS, TABLES, check_patterns, is_input_first
from jopt.trees.rules import Predicate

_WEIGHTS = "model.safetensors"


def write_compressed_tensors(
    path: str | pathlib.Path,
    tree: Any,
    *,
    names: Callable[[str], str] | None = None,
    transposed: Predicate | None = None,
    activations: QuantSpec | None = None,
    overwrite: bool = False,
) -> None:
    """Write quantized leaves for programs that read compressed-tensors, and all others.

    Args:
        path: a directory; it is made if need be, and what else its `config.json` says
            stays.
        tree: any pytree of arrays. Quantized leaves are matrices of `int2` to `int8` or
            `uint2` to `uint8`.
        names: path of a leaf to its name there, `lambda path: ...`, which for quantized
            leaves ends in '.weight'. None: dots for slashes, and 'weight' for a last
            'kernel', 'w' or 'embedding'.
        transposed: which matrices are [in, out] and so are transposed on the way, a
            predicate `(path, leaf) -> bool` such as `jopt.matching(".*/kernel")`. None:
            those with one scale per column or groups down the columns, and float ones
            named 'kernel' or 'w'.
        activations: `jopt.QuantSpec(jopt.formats.int8)` for inputs rounded per token
            by the reader: int8 weights are then written as int-quantized. None for
            floats: all are pack-quantized.
        overwrite: replace the weights that are there.

    Raises:
        ValueError: weights exist, a leaf has no form in this layout, its orientation is
            unknown or contradicts `transposed`, or two leaves have one name.

    >>> import tempfile
    >>> from jopt.arrays.quantized import quantize_array
    >>> q = quantize_array(jnp.ones((64, 8)), QuantSpec(formats.int4, group_size=32))
    >>> with tempfile.TemporaryDirectory() as path:
    ...     write_compressed_tensors(path, {"up": {"kernel": q}})
    ...     sorted(container.read_file(pathlib.Path(path, "model.safetensors"))[0])
    ['up.weight_packed', 'up.weight_scale', 'up.weight_shape']
    """
    check_path(path)
    directory = pathlib.Path(path).absolute()
    if (directory / _WEIGHTS).exists() and not overwrite:
        raise ValueError(
            f"path must hold no {_WEIGHTS} yet, got {str(path)!r}; pass overwrite=True"
        )
    if activations is not None:
        _check_activations(activations)
    leaves = paths.leaves_with_path(tree)
    check_patterns(transposed, dict(leaves))
    tensors: dict[str, Array] = {}
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for leaf_path, leaf in leaves:
        turn = is_input_first(leaf_path, leaf, transposed)
        name = (names or _torch_name)(leaf_path)
        if not isinstance(leaf, QuantizedArray):
            _add(tensors, {name: _plain(leaf_path, leaf, turn)}, leaf_path)
            continue
        if names is None and not name.endswith(".weight"):
            name += ".weight"
        module, _, last = name.rpartition(".")
        if last != "weight" or not module:
            raise ValueError(
                f"names must end in '.weight' for quantized leaves, got {name!r} for "
                f"{leaf_path!r}; pass names=lambda path: ..."
            )
        found, weights = _encode(leaf_path, leaf, turn, packed=activations is None)
        _add(
            tensors, {f"{module}.{key}": part for key, part in found.items()}, leaf_path
        )
        groups.setdefault(json.dumps(weights), (weights, []))[1].append(module)
    config = _config(list(groups.values()), activations)
    file, held = directory / CONFIG, {}
    if file.exists():
        held = json.loads(file.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    container.write_file(directory / _WEIGHTS, tensors, {"format": "pt"})
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(json.dumps({**held, KEY: config}, indent=2))
    unfinished.replace(file)


def _torch_name(path: str) -> str:
    *parents, last = path.split("/")
    return ".".join([*parents, "weight" if last in (*KERNELS, *TABLES) else last])


def _add(tensors: dict[str, Array], new: Mapping[str, Array], source: str) -> None:
    taken = sorted(tensors.keys() & new.keys())
    if taken:
        raise ValueError(
            f"names must be those of one leaf each, got {taken[0]!r} again for "
            f"{source!r}; rename one"
        )
    tensors.update(new)


def _plain(path: str, leaf: Any, turn: bool) -> Array:
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise TypeError(
            f"tree must hold arrays, got {type(leaf).__name__} at {path!r}; "
            "leave it out"
        )
    if str(leaf.dtype) not in container.DTYPES:
        raise TypeError(
            f"tree must hold arrays of dtypes that safetensors has, got {leaf.dtype} "
            f"at {path!r}; leave it out"
        )
    array = np.asarray(leaf)
    return container.to_tensor(array.T if turn else array)


def _encode(
    path: str, q: QuantizedArray, turn: bool, *, packed: bool
) -> tuple[dict[str, Array], Weights]:
    """Turn a quantized matrix into the tensors of a module and their description."""
    codes, scale, zero_point = _oriented(path, q, turn)
    bits, symmetric = q.spec.format.bits, zero_point is None
    if not packed and bits != 8:
        raise ValueError(
            f"activations must be left out for weights of other than 8 bits, got "
            f"{q.spec.format} for {path!r}; pass activations=None"
        )
    weights: Weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": _strategy(path, codes.shape, scale.shape),
        "group_size": None,
        "dynamic": False,
    }
    is_one = weights["strategy"] == "tensor"
    if weights["strategy"] == "group":
        weights["group_size"] = codes.shape[1] // scale.shape[1]
    held = scale.astype(q.dtype)
    exact = np.array_equal(held.astype(np.float32), scale, equal_nan=True)
    tensors = {"weight_scale": held if exact else scale}
    if packed:
        tensors["weight_packed"] = pack_words(codes, bits, axis=1)
        tensors["weight_shape"] = np.array(codes.shape, np.int64)
    else:
        tensors["weight"] = codes
    if zero_point is not None:
        is_packed = packed and not is_one
        point = pack_words(zero_point, bits, axis=0) if is_packed else zero_point
        tensors["weight_zero_point"] = point
    if is_one:
        for name in tensors.keys() & {"weight_scale", "weight_zero_point"}:
            tensors[name] = tensors[name].reshape(1)
    return {n: np.require(t, requirements="C") for n, t in tensors.items()}, weights


def _oriented(
    path: str, q: QuantizedArray, turn: bool
) -> tuple[Array, Array, Array | None]:
    """Return codes [out, in], float32 scales and zero points, codes as signed ones."""
    extras = [
        part
        for part in ("input_scale", "outer_scale", "permutation")
        if getattr(q, part) is not None
    ]
    if q.spec.format.kind != "integer" or q.ndim != 2 or extras:
        what = f"{q!r} with {extras}" if extras else repr(q)
        raise ValueError(
            f"tree must hold quantized matrices of integer formats without "
            f"permutation or input scale, got {what} at {path!r}; quantize "
            "jopt.dequantize of it anew, or write it as floats"
        )
    bits, is_signed = q.spec.format.bits, q.spec.format.signed
    codes = q.codes
    if q.packed_axis is not None and q.packed_size is not None:
        codes = unpack_codes(
            codes, bits, q.packed_size, axis=q.packed_axis, signed=is_signed
        )
    arrays = [np.asarray(codes), np.asarray(q.scale.astype(jnp.float32))]
    if q.zero_point is not None:
        arrays.append(np.asarray(q.zero_point))
    if q.order == "nk":
        arrays[0] = arrays[0].T
    if turn:
        arrays = [array.T for array in arrays]
    if not is_signed:
        offset = 2 ** (bits - 1)
        arrays[::2] = [
            (a.astype(np.int16) - offset).astype(np.int8) for a in arrays[::2]
        ]
    return arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None


def _strategy(path: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> str:
    if scales == (1, 1) and shape[0] > 1:
        return "tensor"
    if scales[0] != shape[0]:
        raise ValueError(
            f"tree must hold matrices with scales per output, or one, got scales "
            f"{list(scales)} of {path!r} as [out, in] {list(shape)}; quantize it along "
            "its inputs"
        )
    return "channel" if scales[1] == 1 else "group"


def _config(
    groups: list[tuple[Weights, list[str]]], activations: QuantSpec | None
) -> dict[str, Any]:
    layout = PACKED if activations is None else INT
    inputs = activations and {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": modules,
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": layout,
            }
            for i, (weights, modules) in enumerate(groups)
        },
        "ignore": [],
    }


def _check_activations(spec: QuantSpec) -> None:
    plain = dataclasses.replace(spec, scale_dtype=jnp.bfloat16, narrow_range=None)
    if plain != QuantSpec(formats.int8) or not spec.is_narrow:
        raise ValueError(
            f"activations must be jopt.QuantSpec(jopt.formats.int8), a scale per "
            f"token, or None, got {spec}; leave it out"
        )
