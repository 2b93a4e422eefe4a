"""Modules to quantized leaves: the bytes as they are, in either orientation."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import formats
from jopt.arrays.arguments import check_path
from jopt.arrays.packing import pack_codes
from jopt.arrays.quantized import QuantizedArray
from jopt.arrays.specs import QuantSpec
from jopt.trees import container
from jopt.trees.compressed_tensors.words import (
    CONFIG,
    INT,
    KEY,
    METHOD,
    NAIVE,
    PACKED,
    Weights,
    unpack_words,
)
from jopt.trees.container import Array
from jopt.trees.orientation import turn_selected
from jopt.trees.rules import Predicate

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_FLOATS = ("float16", "bfloat16", "float32")


def read_compressed_tensors(
    path: str | pathlib.Path, *, transposed: Predicate | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a model that a program wrote with compressed-tensors.

    w = (code - zero_point) * scale

    Args:
        path: a directory with `config.json` and safetensors files.
        transposed: which matrices to return as [in, out], a predicate
            `(name, leaf) -> bool` such as `jopt.matching(".*_proj.weight")`; None for
            none. It costs nothing: the codes of a quantized array stay as they lie.

    Returns:
        Name to leaf, and the quantization config. Integer weights are `QuantizedArray`s
        under the name of the weight, 'model.layers.0.mlp.up_proj.weight', whose dtype
        is that of the scales there; `jopt.dequantize` gives the numbers that the
        package gives. All else is as it is in the files: JAX arrays, and NumPy arrays
        of what JAX is set not to hold.

    Raises:
        FileNotFoundError: there is no config or no file of weights.
        CheckpointError: a file is damaged.
        ValueError: a module is quantized in a way that has no form here.
    """
    check_path(path)
    directory = pathlib.Path(path).absolute()
    config = _read_config(directory)
    tensors: dict[str, Array] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found, _ = container.read_file(file)
        both = sorted(found.keys() & tensors.keys())
        if both:
            raise ValueError(
                f"path must hold each tensor once, got {both[0]!r} again in "
                f"{file.name}; leave one file out"
            )
        tensors |= found
    if not tensors:
        raise FileNotFoundError(
            f"path must hold safetensors files, got {str(path)!r} without; "
            "jopt.write_compressed_tensors writes one"
        )
    leaves: dict[str, Any] = {}
    for module in _quantized_modules(tensors):
        weights = _scheme_of(module, config)
        leaves[f"{module}.weight"] = _decode(module, weights, tensors)
    leaves |= {name: _on_device(tensor) for name, tensor in tensors.items()}
    return dict(sorted(turn_selected(leaves, transposed).items())), config


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"path must hold {CONFIG}, got {str(directory)!r} without; give the "
            "directory of the model"
        )
    config = json.loads(file.read_text()).get(KEY) or {}
    if config.get("quant_method") != METHOD:
        raise ValueError(
            f"path must hold a model quantized by {METHOD}, got "
            f"{config.get('quant_method')!r} in {str(file)!r}; "
            "safetensors.numpy.load_file reads floats"
        )
    return dict(config)


def _quantized_modules(tensors: Mapping[str, Array]) -> list[str]:
    """List the modules whose weights are codes."""
    ends = (".weight_packed", ".weight_scale")
    return sorted(
        {name.removesuffix(e) for name in tensors for e in ends if name.endswith(e)}
    )


def _scheme_of(module: str, config: Mapping[str, Any]) -> Weights:
    """Find how a module is quantized: by its name, else as its class must be."""
    named, by_class = [], []
    for group in config.get("config_groups", {}).values():
        targets = group["targets"]
        if any(_names(target, module) for target in targets):
            named.append(group)
        elif any(target[:1].isupper() for target in targets):  # 'Linear'
            by_class.append(group)
    found = named[:1] or by_class
    if len(found) != 1:
        raise ValueError(
            f"{CONFIG} must say how {module!r} is quantized, by its name or one class "
            f"of modules, got {len(found)} groups for it; name it in `targets`"
        )
    layout = found[0].get("format") or config.get("format")
    weights = dict(found[0].get("weights") or {})
    if layout not in (PACKED, INT, NAIVE) or weights.get("type", "int") != "int":
        raise ValueError(
            f"{CONFIG} must give integers in the format {PACKED}, {INT} or {NAIVE} to "
            f"{module!r}, got {weights.get('type')} in {layout}; decompress it with "
            f"{METHOD} and quantize it by jopt.quantize"
        )
    return weights


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _decode(module: str, weights: Weights, tensors: dict[str, Array]) -> QuantizedArray:
    """Take the tensors of a module away and make its weight of them."""
    parts = {part: tensors.pop(f"{module}.{part}", None) for part in _PARTS}
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    bits, symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    codes = None
    if packed is None:
        codes = tensors.pop(f"{module}.weight", None)
        shape = () if codes is None else codes.shape
    else:
        given = parts["weight_shape"]
        shape = () if given is None else tuple(map(int, given))
        if len(shape) == 2 and packed.shape == (shape[0], -(-shape[1] * bits // 32)):
            codes = unpack_words(packed, bits, shape[1], axis=1)
    if codes is None or codes.dtype != np.int8 or scale is None or len(shape) != 2:
        raise ValueError(
            f"{module!r} must have codes of {bits} bits for a matrix and its scales, "
            f"got {_listed(parts)}; decompress it with {METHOD}"
        )
    scales = _scale_shape(module, shape, weights, scale)
    point = parts["weight_zero_point"]
    if f"{module}.weight_g_idx" in tensors:
        raise ValueError(
            f"{module!r} must have groups of neighbours, got weight_g_idx, an order by "
            f"activations; decompress it with {METHOD}"
        )
    if symmetric:
        if point is not None and np.any(np.asarray(point, np.float32)):
            raise ValueError(
                f"{module!r} must have no zero points, as {CONFIG} says, got some that "
                "are not 0; say symmetric: false there"
            )
        point = None
    else:
        point = _zero_point(module, point, bits, scales, packed is not None)
    return _quantized(codes, scale.reshape(scales), point, weights)


def _listed(parts: Mapping[str, Array | None]) -> str:
    return ", ".join(
        f"{name} {part.dtype}{list(part.shape)}"
        for name, part in parts.items()
        if part is not None
    )


def _scale_shape(
    module: str, shape: tuple[int, ...], weights: Weights, scale: Array
) -> tuple[int, int]:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    wanted = {"tensor": (1, 1), "channel": (shape[0], 1)}.get(str(strategy))
    if strategy == "group" and size and shape[1] % size == 0:
        wanted = (shape[0], shape[1] // size)
    fits = wanted is not None and scale.size == wanted[0] * wanted[1]
    if wanted is None or not fits or scale.dtype.name not in _FLOATS:
        raise ValueError(
            f"{module!r} must have float scales per tensor, channel or group that "
            f"divides its inputs, got {scale.dtype}{list(scale.shape)} for "
            f"{list(shape)} and the strategy {strategy!r} of {size}; "
            f"decompress it with {METHOD}"
        )
    return wanted


def _zero_point(
    module: str, point: Array | None, bits: int, scales: tuple[int, int], packed: bool
) -> Array:
    """Return zero points of the shape of the scales."""
    if packed and point is not None and point.dtype == np.int32:
        words = (-(-scales[0] * bits // 32), scales[1])
        if point.shape == words:
            return unpack_words(point, bits, scales[0], axis=0)
    elif point is not None and point.dtype == np.int8 and point.size == np.prod(scales):
        return point.reshape(scales)
    raise ValueError(
        f"{module!r} must have zero points of {bits} bits for scales of "
        f"{list(scales)}, got {_listed({'weight_zero_point': point})!r}; "
        f"decompress it with {METHOD}"
    )


def _quantized(
    codes: Array, scale: Array, point: Array | None, weights: Weights
) -> QuantizedArray:
    bits = weights.get("num_bits", 8)
    wide = "float32" if scale.dtype == np.float16 else scale.dtype.name
    is_full = point is None and (
        bool((codes == -(2 ** (bits - 1))).any()) or bool((scale < 0).any())
    )
    spec = QuantSpec(
        getattr(formats, f"int{bits}"),
        axis=() if weights["strategy"] == "tensor" else -2,
        group_size=weights["group_size"] if weights["strategy"] == "group" else None,
        symmetric=point is None,
        narrow_range=False if is_full else None,
        scale_dtype=jnp.dtype(wide),
    )
    return QuantizedArray(
        jnp.array(codes) if bits == 8 else pack_codes(codes, bits, axis=-1),
        jnp.array(scale, jnp.dtype(wide)),
        None if point is None else jnp.array(point),
        spec=spec,
        dtype=scale.dtype,
        packed_axis=None if bits == 8 else -1,
        packed_size=None if bits == 8 else codes.shape[1],
    )


def _on_device(tensor: Array) -> Any:
    if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
        return np.array(tensor)
    return jnp.array(tensor)
