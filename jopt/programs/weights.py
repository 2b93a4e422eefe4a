"""A parameter as the matrices that multiply, and back again.

    y = x w,    x [batch, rows, columns],    w [batch, columns, outputs]

`weight_matrix` arranges the operand of a site as `matrices.input_matrix` arranges what
meets it. A `Layout` does so with the leaf behind it, of all layers at once

    leaf  <->  [layers, batch, columns, outputs]

and puts back what an algorithm on matrices made of them: both are slices, reshapes and
transposes that the view of the leaf writes down, so each undoes the other exactly.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jopt.programs import views
from jopt.programs.layouts import Layout
from jopt.programs.operations import Around, Site
from jopt.programs.views import REPEATED, Atom, View


class LayoutError(ValueError):
    """A site whose leaf cannot be read as matrices; the message says why."""


class _Axes(NamedTuple):
    """How the axes of an operand make up a matrix, after a split into groups."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    columns: tuple[int, ...]
    outputs: tuple[int, ...]


def weight_matrix(site: Site, operand: jax.Array) -> jax.Array:
    """Arrange the parameter's operand of a site as a matrix.

    Args:
        site: that multiplies.
        operand: its weight, or the part of it that a joined leaf is.

    Returns:
        `[batch, columns, outputs]`, in the order of `input_matrix`.

    Raises:
        LayoutError: the site looks up, or the parameter is the image of a convolution.
    """
    axes = _axes(site, operand.shape)
    order = (*axes.batch, *axes.columns, *axes.outputs)
    sizes = [math.prod(axes.shape[a] for a in group) for group in axes[1:]]
    return jnp.transpose(operand.reshape(axes.shape), order).reshape(sizes)


def _axes(site: Site, shape: Sequence[int]) -> _Axes:
    shape, operand = tuple(shape), site.operand
    match site.primitive:
        case "dot_general":
            contracted, batch = site.params["dimension_numbers"]
            return _split(shape, batch[operand], contracted[operand])
        case "ragged_dot_general" | "ragged_dot" if operand == 1:
            numbers = site.params["ragged_dot_dimension_numbers"]
            contracted, _ = numbers.dot_dimension_numbers
            return _split(shape, numbers.rhs_group_dimensions, contracted[1])
        case "conv_general_dilated" if operand == 1:
            out, *_ = site.params["dimension_numbers"].rhs_spec
            groups = _num_groups(site)
            split = (*shape[:out], groups, shape[out] // groups, *shape[out + 1 :])
            columns = [a for a in range(len(split)) if a not in (out, out + 1)]
            return _Axes(split, (out,), tuple(columns), (out + 1,))
    raise LayoutError(f"it is operand {operand} of {site.primitive}")


def _num_groups(site: Site) -> int:
    """Count the groups of a convolution, of features or of images: never both."""
    features = site.params.get("feature_group_count", 1)
    return int(features * site.params.get("batch_group_count", 1))


def _split(
    shape: tuple[int, ...], batch: Sequence[int], columns: Sequence[int]
) -> _Axes:
    outputs = (a for a in range(len(shape)) if a not in (*batch, *columns))
    return _Axes(shape, tuple(batch), tuple(sorted(columns)), tuple(outputs))


def layout(site: Site, shape: Sequence[int], *, view: View | None = None) -> Layout:
    """Find how a leaf is read as the matrices of a site.

    Args:
        site: that multiplies by the leaf.
        shape: of the leaf.
        view: of a part of the operand, see `joined`; by default the site's.

    Returns:
        The layout.

    Raises:
        LayoutError: the operand is no view that can be undone.

    >>> import jax.numpy as jnp
    >>> from jopt.programs.counts import sites
    >>> params = {"w": jnp.arange(12.0).reshape(3, 2, 2)}
    >>> def apply(params, x):
    ...     return jnp.einsum("bi,oij->boj", x, params["w"])
    >>> found = layout(sites(apply, params, jnp.ones((1, 2)))["w"], (3, 2, 2))
    >>> found.to_matrices(params["w"])[0, 0]
    Array([[ 0.,  1.,  4.,  5.,  8.,  9.],
           [ 2.,  3.,  6.,  7., 10., 11.]], dtype=float32)
    """
    view = site.view if view is None else view
    if view is None:
        raise LayoutError("it is computed from leaves, not one of them")
    axes = _axes(site, [math.prod(a.size for a in dim) for dim in view.dims])
    parted = views.reshape(view, axes.shape)
    if parted is None:
        raise LayoutError("its groups cut through an axis of the leaf")
    batch, columns, outputs = (
        [atom for axis in group for atom in parted.dims[axis] if atom.size != 1]
        for group in axes[1:]
    )
    if any(atom.axis == REPEATED for atom in (*columns, *outputs)):
        raise LayoutError("it is repeated along its inputs or outputs")
    loops = _loops(site, view, shape)
    groups = tuple(
        tuple(a for a in atoms if a.axis != REPEATED and a.size != 1)
        for atoms in ([a for _, atoms in loops for a in atoms], batch, columns, outputs)
    )
    starts, steps = [], []
    for axis, size in enumerate(shape):
        atoms = [atom for group in groups for atom in group if atom.axis == axis]
        low, step = _run(atoms, size, view.starts[axis])
        starts.append(low)
        steps.append(step)
    return Layout(tuple(shape), tuple(starts), tuple(steps), groups)


def _run(atoms: Sequence[Atom], size: int, start: int | None) -> tuple[int, int]:
    """Find the lowest index and the step of atoms that run along one axis."""
    atoms = sorted(atoms, key=lambda atom: -abs(atom.stride))
    count = math.prod(atom.size for atom in atoms)
    for outer, inner in itertools.pairwise(atoms):
        if abs(outer.stride) != inner.size * abs(inner.stride):
            raise LayoutError("its slices leave gaps in an axis of the leaf")
    if count == size:
        return 0, 1
    if start is None:
        raise LayoutError("which part of the leaf it is shows only as the program runs")
    back = sum((a.size - 1) * a.stride for a in atoms if a.stride < 0)
    return start + back, abs(atoms[-1].stride) if atoms else 1


def _loops(
    site: Site, view: View, shape: Sequence[int]
) -> list[tuple[Around, tuple[Atom, ...]]]:
    """Say which atoms the counter of each loop around a site runs along.

    Where an index slices the layers off, it is taken for the counter of the loop of
    that length; whoever relies on it compares with what the site really met.
    """
    known = dict(view.loops)
    if set(known) - {around.key for around in site.around}:
        raise LayoutError("it was sliced by a loop that it is not in")
    used = {a.axis for dim in view.dims for a in dim if a.size != 1}
    used |= {a.axis for atoms in known.values() for a in atoms}
    free = [
        axis
        for axis, start in enumerate(view.starts)
        if start is None and axis not in used and shape[axis] != 1
    ]
    loops = []
    for around in site.around:
        atoms = known.get(around.key, ())
        if around.kind == "layers" and around.key not in known:
            axis = next((a for a in free if shape[a] == around.size), None)
            if axis is not None:
                free.remove(axis)
                atoms = (Atom(axis, around.size),)
        loops.append((around, atoms))
    return loops


def layered(site: Site, view: View | None, shape: Sequence[int]) -> tuple[bool, ...]:
    """Say which of the leading axes of a site's statistics are layers of the leaf.

    Args:
        site: with a layout.
        view: as in `layout`.
        shape: of the leaf.

    Returns:
        For each scan over layers and each `shard_map` around the site, outermost first,
        whether the leaf has layers of its own there; along the others it is the same,
        and its statistics add up.
    """
    view = site.view if view is None else view
    assert view is not None
    return tuple(
        any(atom.axis != REPEATED for atom in atoms)
        for around, atoms in _loops(site, view, shape)
        if around.kind != "steps"
    )


def shares_batch(site: Site, view: View | None = None) -> bool:
    """Say whether one matrix is repeated along batch dimensions.

    Args:
        site: with a layout.
        view: as in `layout`.

    Returns:
        Whether `shared_batch` adds anything up.
    """
    return bool(_repeated(_batch(site, view)))


def shared_batch(site: Site, value: jax.Array, view: View | None = None) -> jax.Array:
    """Add up what meets the same matrix, repeated along batch dimensions.

    Args:
        site: with a layout.
        value: `[batch, ...]`, a sum over the rows of `input_matrix`.
        view: as in `layout`.

    Returns:
        `[batch, ...]`, the batch of the layout.
    """
    atoms = _batch(site, view)
    repeated = _repeated(atoms)
    if not repeated:
        return value
    split = value.reshape([*(atom.size for atom in atoms), *value.shape[1:]])
    return jnp.sum(split, axis=repeated).reshape(-1, *value.shape[1:])


def repeated_batch(site: Site, value: jax.Array, view: View | None = None) -> jax.Array:
    """Repeat matrices along the batch dimensions that share them.

    Args:
        site: with a layout.
        value: `[batch, ...]`, the batch of the layout.
        view: as in `layout`.

    Returns:
        `[batch, ...]`, the batch of `input_matrix`.
    """
    atoms = _batch(site, view)
    rest = value.shape[1:]
    own = [1 if atom.axis == REPEATED else atom.size for atom in atoms]
    whole = [atom.size for atom in atoms]
    split = jnp.broadcast_to(value.reshape([*own, *rest]), [*whole, *rest])
    return split.reshape(-1, *rest)


def _repeated(atoms: Sequence[Atom]) -> tuple[int, ...]:
    return tuple(i for i, atom in enumerate(atoms) if atom.axis == REPEATED)


def _batch(site: Site, view: View | None) -> list[Atom]:
    """List the atoms of the batch dimensions of a site's weight."""
    view = site.view if view is None else view
    assert view is not None
    axes = _axes(site, [math.prod(a.size for a in dim) for dim in view.dims])
    parted = views.reshape(view, axes.shape)
    assert parted is not None
    return [atom for axis in axes.batch for atom in parted.dims[axis]]


class Part(NamedTuple):
    """A leaf that a site multiplies by: the whole of its operand, or a part of it.

    Attributes:
        view: of the leaf.
        axis: of the operand, along which parts are joined; None for the whole.
        start: of this part along the axis.
        size: of this part along the axis.
    """

    view: View
    axis: int | None = None
    start: int = 0
    size: int = 0

    def of(self, operand: jax.Array) -> jax.Array:
        """Cut this part out of the operand."""
        if self.axis is None:
            return operand
        return lax.slice_in_dim(
            operand, self.start, self.start + self.size, 1, self.axis
        )


def parts(site: Site) -> tuple[Part, ...]:
    """List the leaves that a site multiplies by.

    Args:
        site: that multiplies.

    Returns:
        One part if the operand is one leaf; several if it is leaves joined along what
        stays, which then all meet the same inputs; none if it is anything else.
    """
    if site.view is not None:
        return (Part(site.view),)
    shape = site.in_shapes[site.operand].shape
    sizes = [[math.prod(a.size for a in dim) for dim in v.dims] for v in site.parts]
    odd = {
        axis
        for axis, size in enumerate(shape)
        if any(found[axis] != size for found in sizes)
    }
    if not sizes or len(odd) != 1:
        return ()
    (axis,) = odd
    is_grouped = _num_groups(site) > 1
    if is_grouped or site.operand_roles[site.operand][axis] != "out":
        return ()
    found, start = [], 0
    for view, size in zip(site.parts, sizes, strict=True):
        found.append(Part(view, axis, start, size[axis]))
        start += size[axis]
    return tuple(found)
