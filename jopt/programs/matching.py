"""Which elements of a leaf carry which channel, where a value that is scaled meets it.

A factor per channel is a virtual leaf: what it scales is a `View` of it, whose atoms
run along channels, or repeat (`REPEATED`) where the factor is the same. Two views of
one shape, of factors and of a leaf, say which channel each element of the leaf has.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jopt.programs import views
from jopt.programs.views import REPEATED, Atom, View


class NoMatchError(ValueError):
    """Channels that a leaf cannot hold; the message says why."""


class Link(NamedTuple):
    """The channels of a leaf.

    Attributes:
        leaf: its position in `jax.tree.leaves(params)`.
        channel: of its rank, the channel of each element, -1 for none; of size 1 along
            axes that do not tell channels apart.
    """

    leaf: int
    channel: np.ndarray


Pairs = list[tuple[Atom, Atom]]  # of channels, and of a leaf


def is_channel(dim: Iterable[Atom]) -> bool:
    """Tell whether factors differ along an axis."""
    return any(atom.axis != REPEATED and atom.size > 1 for atom in dim)


def pair(factors: Sequence[Atom], leaf: Sequence[Atom]) -> Pairs:
    """Cut the atoms of two views of one axis to the same sizes.

    Args:
        factors: of the axis, major to minor.
        leaf: of the same axis.

    Returns:
        Pairs of atoms of one size.

    Raises:
        NoMatchError: they do not fit each other, or the leaf repeats where factors
            differ.
    """
    left = [a for a in factors if a.size > 1]
    right = [a for a in leaf if a.size > 1]
    found = []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        size = min(a.size, b.size)
        if max(a.size, b.size) % size:
            raise NoMatchError("channels are cut unevenly")
        for atom, rest in ((a, left), (b, right)):
            if atom.size > size:
                rest.insert(0, dataclasses.replace(atom, size=atom.size // size))
        a, b = (
            dataclasses.replace(x, size=size, stride=x.stride * (x.size // size))
            for x in (a, b)
        )
        if b.axis != REPEATED:
            found.append((a, b))
        elif a.axis != REPEATED:
            raise NoMatchError("several channels share an element")
    if is_channel(left) or any(a.axis != REPEATED for a in right):
        raise NoMatchError("channels do not run along the same axes")
    return found


def pair_loops(factors: View, leaf: View) -> Pairs:
    """Pair the layers of factors with those of a leaf.

    Raises:
        NoMatchError: factors differ in a loop in which the leaf does not.
    """
    of_leaf = dict(leaf.loops)
    found: Pairs = []
    for key, atoms in factors.loops:
        if is_channel(atoms):
            if key not in of_leaf:
                raise NoMatchError("layers share it")
            found += pair(atoms, of_leaf[key])
    return found


def link(
    pairs: Pairs,
    factors: View,
    shape: Sequence[int],
    view: View,
    leaf_shape: Sequence[int],
) -> Link:
    """Say which channel each element of a leaf has.

    Args:
        pairs: of atoms.
        factors: how a value looks at the channels.
        shape: of the channels.
        view: how the value looks at the leaf.
        leaf_shape: of the leaf.

    Returns:
        The link; elements outside of the view have no channel.

    Raises:
        NoMatchError: which part of either it is shows only as the program runs.
    """
    every = [
        a for dim in (*view.dims, *(atoms for _, atoms in view.loops)) for a in dim
    ]
    involved = {b.axis for a, b in pairs if a.axis != REPEATED}
    for axis, size in enumerate(leaf_shape):
        if math.prod(a.size for a in every if a.axis == axis) != size:
            involved.add(axis)  # what is not read keeps its numbers
    if any(view.starts[axis] is None for axis in involved):
        raise NoMatchError("which part of it is read shows only as the program runs")
    pairs = [(a, b) for a, b in pairs if b.axis in involved]
    known = {(b.axis, b.stride) for _, b in pairs}
    pairs += [
        (Atom(REPEATED, b.size), b)
        for b in every
        if b.axis in involved and (b.axis, b.stride) not in known
    ]
    if any(start is None for start in factors.starts):
        raise NoMatchError("which channels are read shows only as the program runs")
    counts = [a.size for a, _ in pairs]
    grid = np.indices(counts).reshape(len(counts), math.prod(counts))
    channel = [np.full(grid.shape[1:], start) for start in factors.starts]
    place = [
        np.full(grid.shape[1:], view.starts[a] or 0) for a in range(len(leaf_shape))
    ]
    for steps, (a, b) in zip(grid, pairs, strict=True):
        if a.axis != REPEATED:
            channel[a.axis] = channel[a.axis] + steps * a.stride
        place[b.axis] = place[b.axis] + steps * b.stride
    sizes = [n if axis in involved else 1 for axis, n in enumerate(leaf_shape)]
    place = [p if axis in involved else p * 0 for axis, p in enumerate(place)]
    index = np.full(sizes, -1, np.int32)
    index[tuple(place)] = np.ravel_multi_index(tuple(channel), tuple(shape))
    return Link(view.leaf, index)


def link_whole(
    factors: View, shape: Sequence[int], leaf: int, leaf_shape: Sequence[int]
) -> Link:
    """Say which channel each element of a leaf has, given its view of the factors.

    Args:
        factors: as the leaf has them.
        shape: of the channels.
        leaf: its position.
        leaf_shape: its shape.

    Returns:
        The link.
    """
    whole = views.whole(leaf, leaf_shape)
    pairs: Pairs = []
    for a, b in zip(factors.dims, whole.dims, strict=True):
        pairs += pair(a, b)
    return link(pairs, factors, shape, whole, leaf_shape)


def spread(pairs: Pairs, factors: View, view: View, leaf_shape: Sequence[int]) -> View:
    """View factors as a whole leaf does, given how both meet in one value.

    Args:
        pairs: of atoms.
        factors: as the value has them.
        view: of the leaf.
        leaf_shape: of the leaf.

    Returns:
        The factors as the leaf has them.

    Raises:
        NoMatchError: the value sees a part of the leaf, or it backwards.
    """
    dims: list[tuple[Atom, ...]] = []
    for axis, size in enumerate(leaf_shape):
        own = sorted(
            (p for p in pairs if p[1].axis == axis), key=lambda p: -p[1].stride
        )
        if not own:
            dims.append((Atom(REPEATED, size),) if size > 1 else ())
            continue
        strides = [math.prod(b.size for _, b in own[i + 1 :]) for i in range(len(own))]
        is_whole = math.prod(b.size for _, b in own) == size
        if not is_whole or strides != [b.stride for _, b in own]:
            raise NoMatchError("a part of it is read elsewhere")
        dims.append(tuple(a for a, _ in own))
    found = View(-1, factors.rank, tuple(dims), factors.starts)
    return canonical(found)


def canonical(view: View) -> View:
    """Merge neighbouring atoms, so that equal factors are equal views."""
    shape = [math.prod(a.size for a in dim) for dim in view.dims]
    merged = views.reshape(view, shape)
    assert merged is not None
    dims = tuple(
        dim if is_channel(dim) or size == 1 else (Atom(REPEATED, size),)
        for dim, size in zip(merged.dims, shape, strict=True)
    )
    return dataclasses.replace(merged, dims=dims)
