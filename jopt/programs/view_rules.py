"""What equations do to views of leaves.

Casts, transposes, slices of stacked layers, scaling by a constant and placement leave a
view a view. Whatever is not listed here ends it, and is then neither wrong nor silent:
the value is derived from its leaves, and the table of sites says so.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jopt.programs import views
from jopt.programs.views import REPEATED, Atom, View

# Rules: an equation whose operand `position` is a view, to the views of its results.

Rule = Callable[[Any, View, Sequence[bool]], "list[View | None]"]


def step(
    eqn: Any, view: View, position: int, is_const: Sequence[bool]
) -> list[View | None]:
    """Look through one equation.

    Args:
        eqn: an equation.
        view: of one operand.
        position: of that operand.
        is_const: per operand, whether it depends neither on params nor on inputs.

    Returns:
        Per result its view, or None where it is none.
    """
    name = eqn.primitive.name
    if name in SAME:
        results: list[View | None] = [None] * len(eqn.outvars)
        results[position] = view
        return results
    rule = RULES.get(name)
    if rule is None or (position != 0 and name != "mul"):  # 1 / w is no view of w
        return [None] * len(eqn.outvars)
    others = [c for i, c in enumerate(is_const) if i != position]
    return rule(eqn, view, others)


def _transpose(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    order = eqn.params["permutation"]
    return [dataclasses.replace(view, dims=tuple(view.dims[i] for i in order))]


def _reshape(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    return [views.reshape(view, eqn.outvars[0].aval.shape)]


def _squeeze(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    gone = {d % len(view.dims) for d in eqn.params["dimensions"]}
    dims = tuple(dim for i, dim in enumerate(view.dims) if i not in gone)
    return [dataclasses.replace(view, dims=dims)]


def _broadcast(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    old = eqn.invars[0].aval.shape
    dims: list[tuple[Atom, ...]] = [
        () if size == 1 else (Atom(REPEATED, size),) for size in shape
    ]
    for i, place in enumerate(places):
        if old[i] == shape[place]:
            dims[place] = view.dims[i]
    return [dataclasses.replace(view, dims=tuple(dims))]


def _slice(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    result: View | None = view
    for axis, size in enumerate(eqn.outvars[0].aval.shape):
        untouched = size == _size(eqn, axis) and limits[axis] - starts[axis] == size
        if result is not None and not untouched:
            result = views.take(result, axis, size, steps[axis], start=starts[axis])
    return [result]


def _dynamic_slice(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    result: View | None = view
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if result is not None and size != _size(eqn, axis):
            result = views.take(result, axis, size)
    return [result]


def _split(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    axis, sizes = eqn.params["axis"], [int(size) for size in eqn.params["sizes"]]
    starts = itertools.accumulate([0, *sizes])
    return [
        views.take(view, axis, size, start=start)
        for size, start in zip(sizes, starts, strict=False)
    ]


def _unstack(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    axis = eqn.params["axis"] % len(view.dims)
    dims = view.dims[:axis] + view.dims[axis + 1 :]
    layers = [views.move(view, view.dims[axis], i) for i in range(len(eqn.outvars))]
    return [dataclasses.replace(layer, dims=dims) for layer in layers]


def _gather(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    """One index for the whole array is a slice; many are a lookup, which is a site."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if math.prod(eqn.invars[1].aval.shape[:-1]) != 1 or numbers.operand_batching_dims:
        return [None]
    result: View | None = view
    for axis, size in enumerate(sizes):
        if result is not None and size != _size(eqn, axis):
            result = views.take(result, axis, size)
    if result is None:
        return [None]
    kept = [
        dim
        for i, dim in enumerate(result.dims)
        if i not in numbers.collapsed_slice_dims
    ]
    dims: list[tuple[Atom, ...]] = [()] * len(eqn.outvars[0].aval.shape)
    for place, dim in zip(numbers.offset_dims, kept, strict=True):
        dims[place] = dim
    return [dataclasses.replace(result, dims=tuple(dims))]


def _scaled(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    """Scaling by a constant number keeps every role; by anything else it does not."""
    if eqn.outvars[0].aval.shape != _shape_of(view) or not all(others):
        return [None]
    return [view]


def _same(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    return [view]


def _reversed(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    dims = list(view.dims)
    for axis in eqn.params["dimensions"]:
        last = math.prod(atom.size for atom in dims[axis]) - 1
        view = views.move(view, dims[axis], last)
        dims[axis] = tuple(
            dataclasses.replace(atom, stride=-atom.stride) for atom in dims[axis]
        )
    return [dataclasses.replace(view, dims=tuple(dims))]


def _concatenate(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    return [view if len(eqn.invars) == 1 else None]


def _gathered(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    shape = eqn.outvars[0].aval.shape
    if eqn.params.get("tiled"):
        return [views.resize(view, shape)]
    place = eqn.params["all_gather_dimension"]
    dims = view.dims[:place] + ((Atom(REPEATED, shape[place]),),) + view.dims[place:]
    return [dataclasses.replace(view, dims=dims)]


def _size(eqn: Any, axis: int) -> int:
    return int(eqn.invars[0].aval.shape[axis])


def _shape_of(view: View) -> tuple[int, ...]:
    return tuple(math.prod(a.size for a in dim) for dim in view.dims)


# Every result is the operand in the same position.
SAME = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "mesh_cast",
        "name",
        "optimization_barrier",
        "pbroadcast",
        "pcast",
        "pvary",
        "reduce_precision",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)

RULES: dict[str, Rule] = {
    "all_gather": _gathered,
    "all_gather_invariant": _gathered,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "div": _scaled,
    "dynamic_slice": _dynamic_slice,
    "expand_dims": _reshape,
    "gather": _gather,
    "mul": _scaled,
    "neg": _same,
    "reshape": _reshape,
    "rev": _reversed,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "unstack": _unstack,
}
