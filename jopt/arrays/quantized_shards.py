"""Quantized arrays on several devices of a `shard_map`: shards of codes and scales."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jopt.arrays.axes import varying_axes
from jopt.arrays.quantized_parts import Quantized, is_packed, scales_of, stored_axes


def partition_specs(
    q: Quantized, spec: PartitionSpec, sizes: Mapping[str, int]
) -> Quantized | None:
    """Say how the parts of a quantized array lie on the devices of a `shard_map`.

    Args:
        q: the array.
        spec: how the array that it stands for is split.
        sizes: of the mesh axes.

    Returns:
        The array with a partition spec for each part, such that the parts on a device
        stand for its shard; None where a device would get a part of a group or a byte.
    """
    if q.permutation is not None or q.input_scale is not None:
        return None
    entries = [*spec, *[None] * (q.ndim - len(spec))]
    counts = [
        math.prod(sizes[n] for n in ((e,) if isinstance(e, str) else e or ()))
        for e in entries
    ]
    if any(n > 1 and is_packed(q, a) for a, n in enumerate(counts)):
        return None

    def of(part: jax.Array) -> Any:
        axes = list(zip(part.shape, counts, entries, strict=True))
        if any(size > 1 and size % n for size, n, _ in axes):
            return None
        kept = [entry if size > 1 else None for size, _, entry in axes]
        return PartitionSpec(*kept)  # type: ignore[no-untyped-call]

    scales = {name: of(part) for name, part in scales_of(q).items()}
    if any(found is None for found in scales.values()):
        return None
    stored = [entries[a] for a in stored_axes(q)]
    codes = PartitionSpec(*stored)  # type: ignore[no-untyped-call]
    return dataclasses.replace(q, codes=codes, **scales)


def all_gather(q: Quantized, params: Mapping[str, Any], operands: Any) -> Any:
    """Gather shards in few bytes."""
    axis, names = params["all_gather_dimension"], params["axis_name"]
    if not params["tiled"] or params["axis_index_groups"] or is_packed(q, axis):
        return None

    def gathered(part: jax.Array, place: int) -> jax.Array:
        return lax.all_gather(part, names, axis=place, tiled=True)

    devices = {names} if isinstance(names, str) else set(names)
    for part in scales_of(q).values():
        is_one = part.shape[axis] == 1
        is_tracked = devices <= set(varying_axes(q.codes))
        if is_one and (not is_tracked or devices & set(varying_axes(part))):
            return None  # each device may have another scale there
    scales = {
        name: part if part.shape[axis] == 1 else gathered(part, axis)
        for name, part in scales_of(q).items()
    }
    codes = gathered(q.codes, stored_axes(q).index(axis))
    return dataclasses.replace(q, codes=codes, **scales)


def vary(q: Quantized, params: Mapping[str, Any], operands: Any) -> Quantized:
    """Let parts differ between devices in type, which changes no number."""

    def varied(part: jax.Array) -> jax.Array:
        missing = tuple(a for a in params["axes"] if a not in varying_axes(part))
        return lax.pcast(part, missing, to="varying") if missing else part

    return jax.tree.map(varied, q)
