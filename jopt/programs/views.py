"""Where a value comes from: a view is one parameter leaf, looked at another way.

A view says of each axis of a value which axes of the leaf it runs along. An axis is a
product of atoms, from major to minor, so that reshape may split and merge:

    w[d, h, k] -> reshape [d, h * k]: ((d,), (h, k))

Of slices it also says where along the leaf they start, and of loops over layers which
axis they run along, so that what is computed of a view can be put back into the leaf.

What equations do to views stands in `view_rules`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

REPEATED = -1  # the leaf axis of an atom along which the value repeats itself


@dataclasses.dataclass(frozen=True)
class Atom:
    """A run along one axis of a leaf.

    Attributes:
        axis: of the leaf, or `REPEATED`.
        size: the number of steps.
        stride: between two of them, in elements of the leaf's axis; negative where the
            value runs backwards.
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
        starts: index of the value's first element along each axis of the leaf; None
            where it is not known before the program runs.
        loops: of loops that slice it layer by layer, outermost first, the key and the
            atoms that their counter runs along.
    """

    leaf: int
    rank: int
    dims: Dims
    starts: tuple[int | None, ...] = ()
    loops: tuple[tuple[Any, tuple[Atom, ...]], ...] = ()


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
    return View(leaf, len(shape), dims, (0,) * len(shape))


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
        if size == 0 and atoms and atoms[0].size == 0:
            dim.append(atoms.pop(0))  # an axis without elements stays one
        while size > 1:
            if not atoms or atoms[0].size == 0:
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


def take(
    view: View, axis: int, size: int, step: int = 1, *, start: int | None = None
) -> View | None:
    """Slice one axis.

    Args:
        view: what is sliced.
        axis: of the value.
        size: the number of elements that are left.
        step: between them.
        start: index of the first of them, if it is known.

    Returns:
        The new view; None where a slice cuts through merged axes.
    """
    dim = view.dims[axis]
    if size == math.prod(a.size for a in dim):
        return view
    if size != 1 and len(dim) != 1:
        return None
    view = move(view, dim, start)
    if len(dim) != 1:
        return _with_dim(view, axis, ())
    (atom,) = dim
    atom = dataclasses.replace(atom, size=size, stride=atom.stride * step)
    return _with_dim(view, axis, (atom,))


def unstack(view: View, loop: Any) -> View:
    """Slice the first axis layer by layer.

    Args:
        view: of all layers.
        loop: the key of the loop that does.

    Returns:
        The view of one layer.

    >>> unstack(whole(0, (3, 4)), "loop").loops
    (('loop', (Atom(axis=0, size=3, stride=1),)),)
    """
    first, *rest = view.dims
    loops = (*view.loops, (loop, first))
    return dataclasses.replace(view, dims=tuple(rest), loops=loops)


def resize(view: View, shape: Sequence[int]) -> View | None:
    """Change sizes where a leaf is sharded or gathered: its axes stay what they are.

    Args:
        view: of the whole, or of a shard.
        shape: of the shard, or of the whole.

    Returns:
        The new view; None where merged axes are cut.
    """
    dims = []
    starts = list(view.starts)
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
            if major.axis != REPEATED:
                starts[major.axis] = None  # of a shard: another one on each device
            major = dataclasses.replace(major, size=major.size * size // old)
            dims.append((major, *minor))
    return dataclasses.replace(view, dims=tuple(dims), starts=tuple(starts))


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


def move(view: View, dim: Sequence[Atom], start: int | None) -> View:
    """Start at another index of an axis of the value.

    Args:
        view: of the value.
        dim: the atoms of the axis.
        start: the index, or None if it is not known.

    Returns:
        The view with other starts.
    """
    starts = list(view.starts)
    for atom in reversed(dim):
        if atom.axis != REPEATED:
            before = starts[atom.axis]
            is_known = start is not None and before is not None
            offset = 0 if start is None else start % atom.size * atom.stride
            starts[atom.axis] = (before or 0) + offset if is_known else None
        start = None if start is None else start // atom.size
    return dataclasses.replace(view, starts=tuple(starts))


def _with_dim(view: View, axis: int, dim: tuple[Atom, ...]) -> View:
    dims = view.dims[:axis] + (dim,) + view.dims[axis + 1 :]
    return dataclasses.replace(view, dims=dims)
