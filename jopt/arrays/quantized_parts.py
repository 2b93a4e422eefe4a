"""The parts of a quantized array, and which axis of each is which of the array's."""

from typing import Any

import jax

Quantized = Any  # a QuantizedArray, whose module imports this one
_SCALES = ("scale", "zero_point", "outer_scale")


def scales_of(q: Quantized) -> dict[str, jax.Array]:
    """Return by name the parts that have the rank of the array, in its axis order."""
    found = {name: getattr(q, name) for name in _SCALES}
    return {name: part for name, part in found.items() if part is not None}


def stored_axes(q: Quantized) -> list[int]:
    """List the axes of the array in the order in which codes are stored."""
    axes = list(range(q.ndim))
    if q.order == "nk":
        axes[-2:] = axes[-1], axes[-2]
    return axes


def stored_place(q: Quantized, axis: int) -> int:
    """Return where the codes have an axis of the array."""
    return stored_axes(q).index(axis)


def is_packed(q: Quantized, axis: int) -> bool:
    """Tell whether several codes along an axis share a byte."""
    if q.packed_axis is None:
        return False
    return stored_place(q, axis) == q.packed_axis % q.ndim
