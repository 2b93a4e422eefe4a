"""Views of a quantized array that stay quantized: what moves codes moves scales too.

A view is right if decoding it gives the very numbers of the operation on the decoded
array. Codes are as large as the array; scales have its rank, and along each axis one
size of three: one, the array's, or the number of groups. So an operation that treats
axes one by one is done on codes and scales alike where they are whole, and left out
where a scale is one; an axis that is packed or grouped must be left alone. Swapping the
last two axes only changes the name of the storage order.

Whatever is not listed here returns None, and the array is decoded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays import quantized_shards
from jopt.arrays.quantized_parts import (
    Quantized,
    is_packed,
    scales_of,
    stored_axes,
    stored_place,
)
from jopt.arrays.specs import QuantSpec, group_axis


def view(
    q: Quantized, primitive: str, params: Mapping[str, Any], operands: Sequence[Any]
) -> Any:
    """Take a view of a quantized array.

    Args:
        q: the array.
        primitive: the name of the operation in JAX.
        params: its parameters.
        operands: the other operands, such as the starts of a slice, arrays or
            compressed ones.

    Returns:
        The quantized view, a tuple of them for operations with several results, or
        None if there is none.
    """
    rule = _RULES.get(primitive)
    is_plain = q.permutation is None and q.input_scale is None
    return rule(q, params, operands) if rule is not None and is_plain else None


def _convert(
    q: Quantized, params: Mapping[str, Any], operands: Any
) -> Quantized | None:
    """Round once to a narrower dtype, or not at all."""
    dtype = jnp.dtype(params["new_dtype"])
    if dtype == q.dtype:
        return q
    # Decoding rounds to float32 first. Casts to float16 overflow where decoding clips.
    if (q.dtype, dtype) == (jnp.float32, jnp.bfloat16) and params["sharding"] is None:
        return dataclasses.replace(q, dtype=dtype)
    return None


def _transpose(q: Quantized, params: Mapping[str, Any], operands: Any) -> Any:
    order = tuple(params["permutation"])
    swapped = (*range(q.ndim - 2), q.ndim - 1, q.ndim - 2)
    scales = {name: jnp.transpose(part, order) for name, part in scales_of(q).items()}
    kept = [order.index(a) for a in _kept(q)]
    spec = _with_axes(q.spec, kept, q.ndim)
    groups = group_axis(q.ndim, q.spec) if q.spec.group_size is not None else None
    is_moved = groups is not None and (
        group_axis(q.ndim, spec) != order.index(q.ndim + groups) - q.ndim
    )
    if is_moved:
        return None
    if order == swapped:
        name = "nk" if q.order == "kn" else "kn"
        return dataclasses.replace(q, **scales, spec=spec, order=name)
    q = _unswapped(q)
    packed = q.packed_axis
    if packed is not None:
        packed = order.index(packed + q.ndim) - q.ndim
    codes = jnp.transpose(q.codes, order)
    return dataclasses.replace(q, codes=codes, **scales, spec=spec, packed_axis=packed)


def _reshape(q: Quantized, shape: Sequence[int]) -> Quantized | None:
    """Merge and split axes that are neither packed nor grouped."""
    blocks = _blocks(q.shape, shape)
    if blocks is None:
        return None
    # Swapped codes stay so only where the last two axes stay the last two.
    lasts = [([q.ndim - i], [len(shape) - i]) for i in (1, 2)]
    if q.order == "nk" and any(last not in blocks for last in lasts):
        q = _unswapped(q)
    sizes: dict[str, list[int]] = {name: [] for name in scales_of(q)}
    codes: list[int] = []
    kept: list[int] = []
    packed = None
    for old, new in blocks:
        is_same = len(old) == len(new) == 1
        if not is_same and any(is_packed(q, a) for a in old):
            return None
        if is_same and is_packed(q, old[0]):
            packed = new[0] - len(shape)
        codes += (
            [q.codes.shape[stored_place(q, old[0])]]
            if is_same
            else [shape[a] for a in new]
        )
        for name, part in scales_of(q).items():
            now = [part.shape[a] for a in old]
            if is_same:
                sizes[name] += now
            elif all(n == 1 for n in now):
                sizes[name] += [1] * len(new)
            elif now == [q.shape[a] for a in old]:
                sizes[name] += [shape[a] for a in new]
            else:
                return None
        if old and set(old) <= set(_kept(q)):
            kept += new
    spec = _with_axes(q.spec, kept, len(shape))
    if q.spec.group_size is not None and not _same_groups(q, spec, blocks, len(shape)):
        return None
    scales = {name: part.reshape(sizes[name]) for name, part in scales_of(q).items()}
    if q.order == "nk":
        codes[-2:] = codes[-1], codes[-2]
        packed = {-1: -2, -2: -1}.get(packed, packed) if packed is not None else None
    return dataclasses.replace(
        q, codes=q.codes.reshape(codes), **scales, spec=spec, packed_axis=packed
    )


def _same_groups(q: Quantized, spec: QuantSpec, blocks: Any, ndim: int) -> bool:
    """Tell whether groups still run along the axis that the spec says."""
    before, after = group_axis(q.ndim, q.spec), group_axis(ndim, spec)
    if before is None or after is None:
        return False
    return ([q.ndim + before], [ndim + after]) in [(o, n) for o, n in blocks]


def _blocks(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
    """Pair runs of old axes with runs of new ones of the same number of elements.

    >>> _blocks((6, 4), (2, 3, 4))
    [([0], [0, 1]), ([1], [2])]
    >>> _blocks((3, 4), (1, 3, 4))
    [([], [0]), ([0], [1]), ([1], [2])]
    """
    if 0 in (*old, *new):
        return None
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and old[i] == new[j]:
            blocks.append(([i], [j]))
            i, j = i + 1, j + 1
        elif j < len(new) and new[j] == 1:
            blocks.append(([], [j]))
            j += 1
        elif i < len(old) and old[i] == 1:
            blocks.append(([i], []))
            i += 1
        else:
            left, right = [i], [j]
            a, b = old[i], new[j]
            i, j = i + 1, j + 1
            while a != b:
                if a < b:
                    a *= old[i]
                    left.append(i)
                    i += 1
                else:
                    b *= new[j]
                    right.append(j)
                    j += 1
            blocks.append((left, right))
    return blocks


def _sliced(
    q: Quantized, touched: Sequence[int], cut: Callable[[jax.Array, Sequence[int]], Any]
) -> Quantized | None:
    """Cut the touched axes of codes, and of scales where they are whole."""
    scales = {}
    for name, part in scales_of(q).items():
        whole = [a for a in touched if part.shape[a] == q.shape[a]]
        if any(part.shape[a] != 1 for a in touched if a not in whole):
            return None
        scales[name] = cut(part, [a if a in whole else -1 for a in range(q.ndim)])
    if any(is_packed(q, a) for a in touched):
        return None
    stored = [a if a in touched else -1 for a in stored_axes(q)]
    return dataclasses.replace(q, codes=cut(q.codes, stored), **scales)


def _slice(q: Quantized, params: Mapping[str, Any], operands: Any) -> Quantized | None:
    starts, stops = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * q.ndim
    touched = [
        a
        for a in range(q.ndim)
        if (starts[a], stops[a], strides[a]) != (0, q.shape[a], 1)
    ]

    def cut(part: jax.Array, axes: Sequence[int]) -> jax.Array:
        runs = [slice(starts[a], stops[a], strides[a]) for a in axes]
        whole = slice(None)
        return part[
            tuple(whole if a < 0 else r for a, r in zip(axes, runs, strict=True))
        ]

    return _sliced(q, touched, cut)


def _dynamic_slice(
    q: Quantized, params: Mapping[str, Any], operands: Sequence[Any]
) -> Quantized | None:
    sizes = params["slice_sizes"]
    touched = [a for a in range(q.ndim) if sizes[a] != q.shape[a]]

    def cut(part: jax.Array, axes: Sequence[int]) -> jax.Array:
        zero = jnp.zeros((), jnp.int32)
        starts = [zero if a < 0 else jnp.asarray(operands[a], jnp.int32) for a in axes]
        lengths = [
            n if a < 0 else sizes[a] for n, a in zip(part.shape, axes, strict=True)
        ]
        return lax.dynamic_slice(part, starts, lengths)

    return _sliced(q, touched, cut)


def _split(q: Quantized, params: Mapping[str, Any], operands: Any) -> Any:
    axis, start, parts = params["axis"], 0, []
    for size in params["sizes"]:
        stop = start + size
        parts.append(_sliced(q, [axis], functools.partial(_run, start, stop)))
        start = stop
    return None if any(part is None for part in parts) else tuple(parts)


def _unstack(q: Quantized, params: Mapping[str, Any], operands: Any) -> Any:
    axis = params["axis"]
    shape = (*q.shape[:axis], *q.shape[axis + 1 :])
    parts = []
    for i in range(q.shape[axis]):
        one: Any = _sliced(q, [axis], functools.partial(_run, i, i + 1))
        parts.append(None if one is None else _without(one, axis, shape))
    return None if any(part is None for part in parts) else tuple(parts)


def _run(start: int, stop: int, part: jax.Array, axes: Sequence[int]) -> jax.Array:
    whole, run = slice(None), slice(start, stop)
    return part[tuple(whole if a < 0 else run for a in axes)]


def _squeeze(q: Quantized, params: Mapping[str, Any], operands: Any) -> Any:
    for axis in sorted((d % q.ndim for d in params["dimensions"]), reverse=True):
        q = _without(q, axis, (*q.shape[:axis], *q.shape[axis + 1 :]))
        if q is None:
            return None
    return q


def _without(q: Quantized, axis: int, shape: Sequence[int]) -> Quantized | None:
    """Drop one axis of size one; which one matters beside others of size one."""
    if is_packed(q, axis):
        return None
    if q.order == "nk" and axis >= q.ndim - 2:
        q = _unswapped(q)
    scales = {name: jnp.squeeze(part, axis) for name, part in scales_of(q).items()}
    kept = [a - (a > axis) for a in _kept(q) if a != axis]
    spec = _with_axes(q.spec, kept, len(shape))
    if q.spec.group_size is not None:
        before, after = group_axis(q.ndim, q.spec), group_axis(len(shape), spec)
        if before is None or after is None:
            return None
        place = q.ndim + before
        if place == axis or place - (place > axis) != len(shape) + after:
            return None
    packed = q.packed_axis
    if packed is not None and packed + q.ndim < axis:
        packed += 1  # counted from the end, which has come nearer
    stored = stored_axes(q).index(axis)
    codes = jnp.squeeze(q.codes, stored)
    return dataclasses.replace(q, codes=codes, **scales, spec=spec, packed_axis=packed)


def _reshape_op(q: Quantized, params: Mapping[str, Any], operands: Any) -> Any:
    if params["dimensions"] is not None or params["sharding"] is not None:
        return None
    return _reshape(q, params["new_sizes"])


def _broadcast(q: Quantized, params: Mapping[str, Any], operands: Any) -> Any:
    """Add axes of size one; a repetition of values is none."""
    shape, dims = params["shape"], params["broadcast_dimensions"]
    if params["sharding"] is not None or math.prod(shape) != q.size:
        return None
    return _reshape(q, shape) if list(dims) == sorted(dims) else None


def _concatenate(
    q: Quantized, params: Mapping[str, Any], operands: Sequence[Any]
) -> Quantized | None:
    """Join arrays of one grid along an axis where every index has scales of its own."""
    axis, parts = params["dimension"], [q, *operands]
    if not all(_is_alike(q, part) for part in parts) or is_packed(q, axis):
        return None
    columns = {name: [scales_of(p)[name] for p in parts] for name in scales_of(q)}
    for column in columns.values():
        if any(
            s.shape[axis] != p.shape[axis] for s, p in zip(column, parts, strict=True)
        ):
            return None
    scales = {name: jnp.concatenate(column, axis) for name, column in columns.items()}
    codes = jnp.concatenate([part.codes for part in parts], stored_place(q, axis))
    return dataclasses.replace(q, codes=codes, **scales)


def _is_alike(q: Quantized, part: Any) -> bool:
    """Tell whether codes of two arrays mean the same and lie the same way."""

    def form(a: Quantized) -> Any:
        spec = _with_axes(a.spec, _kept(a), a.ndim)
        dtypes = {name: scale.dtype for name, scale in scales_of(a).items()}
        return spec, a.dtype, a.codes.dtype, a.packed_axis, a.order, dtypes

    if type(part) is not type(q) or part.ndim != q.ndim:
        return False
    is_plain = part.permutation is None and part.input_scale is None
    return is_plain and form(part) == form(q)


def _same(q: Quantized, params: Any, operands: Any) -> Quantized:
    return q


_RULES: dict[str, Callable[[Quantized, Mapping[str, Any], Sequence[Any]], Any]] = {
    "all_gather": quantized_shards.all_gather,
    "pvary": quantized_shards.vary,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "dynamic_slice": _dynamic_slice,
    "name": _same,
    "reshape": _reshape_op,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stop_gradient": _same,
    "transpose": _transpose,
    "unstack": _unstack,
}


def _unswapped(q: Quantized) -> Quantized:
    """Store codes in the order of the array."""
    if q.order == "kn":
        return q
    packed = q.packed_axis
    packed = None if packed is None else {-1: -2, -2: -1}.get(packed, packed)
    codes = jnp.swapaxes(q.codes, -1, -2)
    return dataclasses.replace(q, codes=codes, order="kn", packed_axis=packed)


def _kept(q: Quantized) -> list[int]:
    """List the axes that keep a scale of their own, counted from the front."""
    if q.spec.axis is None:
        return [q.ndim - 1] if q.ndim >= 2 else []
    axes = (q.spec.axis,) if isinstance(q.spec.axis, int) else q.spec.axis
    return [a % q.ndim for a in axes]


def _with_axes(spec: QuantSpec, kept: Sequence[int], ndim: int) -> QuantSpec:
    return dataclasses.replace(spec, axis=tuple(sorted(a - ndim for a in kept)))
