"""Where a value comes from: a view is one parameter leaf, looked at another way.

A view says of each axis of a value which axes of the leaf it runs along. An axis is a
product of atoms, from major to minor, so that reshape may split and merge:

    w[d, h, k] -> reshape [d, h * k]: ((d,), (h, k))

Casts, transposes, slices of stacked layers, scaling by a constant and placement leave a
view a view. Whatever is not listed here ends it, and is then neither wrong nor silent:
the value is derived from its leaves, and the table of sites says so.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

REPEATED = -1  # the leaf axis of an atom along which the value repeats itself


@dataclasses.dataclass(frozen=True)
class Atom:
    """A run along one axis of a leaf.

    Attributes:
        axis: of the leaf, or `REPEATED`.
        size: the number of steps.
        stride: between two of them, in elements of the leaf's axis.
    """

    axis: int
    size: int
    stride: int = 1


Dims = tuple[tuple[Atom, ...], ...]


@dataclasses.dataclass(frozen=True)
class View:
    """One leaf, looked at another way.

    Attributes:
        leaf: its position in `jax.tree.leaves(params)`.
        rank: the number of axes of the leaf.
        dims: the atoms of each axis of the value, major to minor; an axis of size one
            that the leaf does not have is `()`.
    """

    leaf: int
    rank: int
    dims: Dims


def whole(leaf: int, shape: Sequence[int]) -> View:
    """View a leaf as it is.

    Args:
        leaf: its position.
        shape: its shape.

    Returns:
        The view with one atom per axis.

    >>> whole(0, (3,)).dims
    ((Atom(axis=0, size=3, stride=1),),)
    """
    dims = tuple((Atom(axis, size),) for axis, size in enumerate(shape))
    return View(leaf, len(shape), dims)


def axes_of(view: View) -> list[set[int]]:
    """List the leaf axes that each axis of a view runs along.

    Args:
        view: a view.

    Returns:
        One set per axis of the value.

    >>> axes_of(reshape(whole(0, (4, 2, 3)), (4, 6)))
    [{0}, {1, 2}]
    """
    return [{a.axis for a in atoms if a.axis != REPEATED} for atoms in view.dims]


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """Split and merge axes.

    Args:
        view: what is reshaped.
        shape: the new shape.

    Returns:
        The new view; None where the new axes cut an atom unevenly.
    """
    atoms = [a for dim in view.dims for a in dim if a.size != 1]
    dims: list[tuple[Atom, ...]] = []
    for size in shape:
        dim: list[Atom] = []
        while size > 1:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if size % atom.size == 0:
                dim.append(atom)
                size //= atom.size
            elif atom.size % size == 0:
                inner = atom.size // size
                dim.append(
                    dataclasses.replace(atom, size=size, stride=atom.stride * inner)
                )
                atoms.insert(0, dataclasses.replace(atom, size=inner))
                size = 1
            else:
                return None
        dims.append(_merge(dim))
    return dataclasses.replace(view, dims=tuple(dims)) if not atoms else None


def take(view: View, axis: int, size: int, step: int = 1) -> View | None:
    """Slice one axis.

    Args:
        view: what is sliced.
        axis: of the value.
        size: the number of elements that are left.
        step: between them.

    Returns:
        The new view; None where a slice cuts through merged axes.
    """
    dim = view.dims[axis]
    if size == math.prod(a.size for a in dim):
        return view
    if size == 1 and len(dim) != 1:
        return _with_dim(view, axis, ())
    if len(dim) != 1:
        return None
    (atom,) = dim
    atom = dataclasses.replace(atom, size=size, stride=atom.stride * step)
    return _with_dim(view, axis, (atom,))


def resize(view: View, shape: Sequence[int]) -> View | None:
    """Change sizes where a leaf is sharded or gathered: its axes stay what they are.

    Args:
        view: of the whole, or of a shard.
        shape: of the shard, or of the whole.

    Returns:
        The new view; None where merged axes are cut.
    """
    dims = []
    for dim, size in zip(view.dims, shape, strict=True):
        old = math.prod(a.size for a in dim)
        if size == old:
            dims.append(dim)
        elif not dim:
            dims.append((Atom(REPEATED, size),))
        else:
            major, *minor = dim
            if major.size * size % old:
                return None
            major = dataclasses.replace(major, size=major.size * size // old)
            dims.append((major, *minor))
    return dataclasses.replace(view, dims=tuple(dims))


def _merge(dim: Sequence[Atom]) -> tuple[Atom, ...]:
    """Join neighbours that run along one axis without a gap."""
    merged: list[Atom] = []
    for atom in dim:
        last = merged[-1] if merged else None
        if last and last.axis == atom.axis and last.stride == atom.size * atom.stride:
            merged[-1] = Atom(atom.axis, last.size * atom.size, atom.stride)
        else:
            merged.append(atom)
    return tuple(merged)


def _with_dim(view: View, axis: int, dim: tuple[Atom, ...]) -> View:
    dims = view.dims[:axis] + (dim,) + view.dims[axis + 1 :]
    return dataclasses.replace(view, dims=dims)


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
    return [reshape(view, eqn.outvars[0].aval.shape)]


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
            result = take(result, axis, size, steps[axis])
    return [result]


def _dynamic_slice(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    result: View | None = view
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if result is not None and size != _size(eqn, axis):
            result = take(result, axis, size)
    return [result]


def _split(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    return [take(view, eqn.params["axis"], int(size)) for size in eqn.params["sizes"]]


def _unstack(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    axis = eqn.params["axis"] % len(view.dims)
    dims = view.dims[:axis] + view.dims[axis + 1 :]
    return [dataclasses.replace(view, dims=dims) for _ in eqn.outvars]


def _gather(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    """One index for the whole array is a slice; many are a lookup, which is a site."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if math.prod(eqn.invars[1].aval.shape[:-1]) != 1 or numbers.operand_batching_dims:
        return [None]
    result: View | None = view
    for axis, size in enumerate(sizes):
        if result is not None and size != _size(eqn, axis):
            result = take(result, axis, size)
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


def _concatenate(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    return [view if len(eqn.invars) == 1 else None]


def _gathered(eqn: Any, view: View, others: Sequence[bool]) -> list[View | None]:
    shape = eqn.outvars[0].aval.shape
    if eqn.params.get("tiled"):
        return [resize(view, shape)]
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
    "rev": _same,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "unstack": _unstack,
}
