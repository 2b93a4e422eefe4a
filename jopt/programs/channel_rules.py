"""What operations do to factors per channel: pass them on, or let a weight take them.

A value that is scaled is described by a `View` of its factors, see `matching`. Rules
read an equation and the view of one operand; what they do not know ends in `Stop`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jopt.programs import view_rules, views
from jopt.programs.flows import Key
from jopt.programs.matching import is_channel
from jopt.programs.views import REPEATED, Atom, View

Dims = list[tuple[Sequence[Atom], Sequence[Atom]]]  # of an input, and of the weight

VIEWS = frozenset(
    {"abs", "broadcast_in_dim", "expand_dims", "neg", "reshape", "rev", "slice"}
    | {"split", "squeeze", "transpose", "unstack"}
)
PLAIN = ("add", "add_any", "expand_dims", "reshape", "squeeze", "transpose")
COPIES = ("broadcast_in_dim", "convert_element_type", "copy")
SUMS = ("add", "add_any", "max", "min", "select_n", "sub")
COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
_REDUCTIONS = ("reduce_max", "reduce_min", "reduce_sum")
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")


class Stop(Exception):
    """Factors cannot be passed on; the message says why."""


def channels_of(view: View) -> Any:
    """What tells two views of factors apart, whatever they are repeated along."""
    dims = tuple(dim if is_channel(dim) else () for dim in view.dims)
    return dims, view.starts, view.loops


def broadcast(view: View, eqn: Any) -> View:
    """View the result of an operation on numbers by themselves."""
    shape = eqn.outvars[0].aval.shape
    dims = tuple(
        dim if is_channel(dim) else () if n == 1 else (Atom(REPEATED, n),)
        for dim, n in zip(view.dims, shape, strict=True)
    )
    return dataclasses.replace(view, dims=dims)


def unstacked(view: View, key: Key) -> View:
    """View the factors of one step of a scan."""
    first, *rest = view.dims
    if is_channel(first):
        return views.unstack(view, key)
    return dataclasses.replace(view, dims=tuple(rest))


def stacked(view: View, key: Key, length: int) -> View:
    """View the factors of what the steps of a scan return."""
    own = [atoms for k, atoms in view.loops if k == key]
    loops = tuple(loop for loop in view.loops if loop[0] != key)
    first = own[0] if own else (Atom(REPEATED, length),)
    return dataclasses.replace(view, dims=(first, *view.dims), loops=loops)


def viewed(eqn: Any, position: int, view: View, count: int) -> list[View | None]:
    """Pass factors through what moves numbers around."""
    if eqn.primitive.name == "abs":
        return [view]
    found = view_rules.step(eqn, view, position, [False] * count)
    if any(v is None for v in found):
        raise Stop(f"{eqn.primitive.name} cuts its channels")
    return found


def multiplied(eqn: Any, i: int, view: View) -> View | None:
    """Pass factors through a product of which one operand is scaled.

    Args:
        eqn: a `dot_general` or a convolution.
        i: which operand.
        view: of it.

    Returns:
        The view of the result; None where the factors are contracted.
    """
    if eqn.primitive.name == "dot_general":
        return _dot(eqn, i, view)
    numbers = eqn.params["dimension_numbers"]
    if eqn.params["batch_group_count"] > 1:
        raise Stop("a convolution has groups of images")
    kept = numbers.rhs_spec[0] if i == 1 else numbers.lhs_spec[1]
    if any(is_channel(d) for a, d in enumerate(view.dims) if a != kept):
        raise Stop("a convolution slides along its channels")
    if i == 0:
        return None
    shape = eqn.outvars[0].aval.shape
    dims: list[tuple[Atom, ...]] = [_repeated(n) for n in shape]
    dims[numbers.out_spec[1]] = view.dims[kept]
    return dataclasses.replace(view, dims=tuple(dims))


def _dot(eqn: Any, i: int, view: View) -> View | None:
    contracted, batch = eqn.params["dimension_numbers"]
    own, other = (
        [a for a in range(len(eqn.invars[j].aval.shape)) if a not in used]
        for j, used in ((j, (*contracted[j], *batch[j])) for j in (i, 1 - i))
    )
    if any(is_channel(view.dims[a]) for a in contracted[i]):
        if any(is_channel(view.dims[a]) for a in own):
            raise Stop("a part of its channels is contracted")
        return None
    mine = [view.dims[a] for a in own]
    rest = [_repeated(eqn.invars[1 - i].aval.shape[a]) for a in other]
    both = [mine, rest] if i == 0 else [rest, mine]
    dims = [*(view.dims[a] for a in batch[i]), *both[0], *both[1]]
    return dataclasses.replace(view, dims=tuple(dims))


def contracted_dims(eqn: Any, i: int, view: View, weight: View) -> Dims:
    """Say what of a weight meets the channels of its input.

    Args:
        eqn: a `dot_general` or a convolution.
        i: which operand the input is.
        view: of its factors.
        weight: how the other operand looks at its leaf.

    Returns:
        Pairs of atoms of the same axes.
    """
    if eqn.primitive.name == "dot_general":
        contracted, batch = eqn.params["dimension_numbers"]
        places = [*zip(contracted[i], contracted[1 - i], strict=True)]
        places += zip(batch[i], batch[1 - i], strict=True)
        return [(view.dims[a], weight.dims[b]) for a, b in places]
    numbers = eqn.params["dimension_numbers"]
    out, inner = (weight.dims[a] for a in numbers.rhs_spec[:2])
    groups = eqn.params["feature_group_count"]
    # Inputs of group g meet outputs of group g.
    of_groups, of_inputs = _cut(view.dims[numbers.lhs_spec[1]], groups)
    own, rest = _cut(out, groups)
    same = [dataclasses.replace(atom, axis=REPEATED) for atom in rest]
    return [(of_groups, own), (same, rest), (of_inputs, inner)]


def _repeated(size: int) -> tuple[Atom, ...]:
    return () if size == 1 else (Atom(REPEATED, size),)


def _cut(dim: Sequence[Atom], count: int) -> tuple[list[Atom], list[Atom]]:
    """Cut an axis into groups, and what is in one."""
    size = int(np.prod([a.size for a in dim]))
    blank = View(-1, 0, (tuple(dim),))
    found = views.reshape(blank, (count, size // count))
    if found is None:
        raise Stop("groups cut through its channels")
    return list(found.dims[0]), list(found.dims[1])


def reduced(eqn: Any, view: View) -> tuple[tuple[Atom, ...], ...] | None:
    """Pass factors through what mixes other axes than theirs; None for all else."""
    name, params = eqn.primitive.name, eqn.params
    if name in _REDUCTIONS:
        gone = params["axes"]
        if any(is_channel(view.dims[a]) for a in gone):
            return None
        return tuple(d for a, d in enumerate(view.dims) if a not in gone)
    if name in _WINDOWS:
        moved = [a for a, n in enumerate(params["window_dimensions"]) if n != 1]
    elif name in ("cumsum", "cummax", "cummin"):
        moved = [params["axis"]]
    else:
        return None
    if any(is_channel(view.dims[a]) for a in moved):
        return None
    return broadcast(view, eqn).dims
