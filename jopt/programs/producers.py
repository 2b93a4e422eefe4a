"""Where the input of a product is the output of another one, and of nothing else.

    y = (x A + bias) B:    any Q with Q Q^T = I goes into A, bias and B,
                           y = (x A Q + bias Q) (Q^T B)

and no operation is added. Found only where the equations prove it: at the top of the
program, between the products casts, reshapes and the bias alone, and no other reader.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jopt.programs import bodies, compat, view_rules, views
from jopt.programs.flows import Key
from jopt.programs.operations import Site
from jopt.programs.views import REPEATED, Atom, View

_CHAIN = frozenset({"reshape", "squeeze", "expand_dims", "convert_element_type"})


class Producer(NamedTuple):
    """What computes the input of some sites.

    Attributes:
        key: of the product, whose outputs are their inputs in the same order.
        biases: positions of the leaves that are added to the outputs.
    """

    key: Key
    biases: tuple[int, ...]


def contracted_axes(site: Site) -> list[tuple[int, int]]:
    """List the contracted axes of a product, in the order of the parameter's.

    Args:
        site: a `dot_general` or a `ragged_dot`.

    Returns:
        Pairs of the axis of the parameter's operand and that of the other one.
    """
    params = site.params
    if site.primitive == "dot_general":
        contracted, _ = params["dimension_numbers"]
    else:
        contracted, _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return sorted(
        zip(contracted[site.operand], contracted[1 - site.operand], strict=True)
    )


def find_producer(
    body: bodies.Body, sites: Sequence[Site], products: Sequence[Site], num_leaves: int
) -> Producer | None:
    """Find the product whose outputs some sites, and nothing else, take for inputs.

    Args:
        body: of the program.
        sites: that read the same input.
        products: that may compute it.
        num_leaves: of the params, which are the first arguments of the program.

    Returns:
        The producer; None where there is no proof of one.
    """
    if any(len(site.key) != 1 for site in sites):
        return None
    search = _Search(body, num_leaves)
    found = {search.producer(site) for site in sites}
    product = next((p for p in products if {p.key} == found), None)
    if product is None or product.primitive != "dot_general":
        return None
    if not all(search.is_in_order(site, product) for site in sites):
        return None
    readers = search.visited | {int(site.key[0]) for site in sites}
    values = [eqn.outvars[0] for eqn in search.chain()] + [product.eqn.outvars[0]]
    if any(not search.users(value) <= readers for value in values):
        return None
    return Producer(product.key, tuple(search.biases))


class _Search:
    """Walks from the input of sites back to one product."""

    def __init__(self, body: bodies.Body, num_leaves: int) -> None:
        self._body = body
        self._makers = {v: i for i, eqn in enumerate(body.eqns) for v in eqn.outvars}
        self._leaves = {v: i for i, v in enumerate(body.invars[:num_leaves])}
        self.visited: set[int] = set()
        self.biases: dict[int, None] = {}
        self._steps: dict[Key, list[int]] = {}

    def chain(self) -> list[Any]:
        """List the equations between the product and the sites."""
        return [self._body.eqns[i] for i in sorted(self.visited)]

    def users(self, value: Any) -> set[int]:
        """List the equations that read a value; -1 for the result of the program."""
        found = {
            i
            for i, eqn in enumerate(self._body.eqns)
            if any(var is value for var in eqn.invars)
        }
        return found | {-1 for var in self._body.outvars if var is value}

    def producer(self, site: Site) -> Key | None:
        """Walk back to the product that a site reads, over what may lie between."""
        var = site.eqn.invars[1 - site.operand]
        steps: list[int] = []
        while not isinstance(var, compat.Literal) and var in self._makers:
            i = self._makers[var]
            eqn = self._body.eqns[i]
            if eqn.primitive.name == "dot_general":
                self._steps[site.key] = steps[::-1]
                self.visited.update(steps)
                return (i,)
            if eqn.primitive.name == "add":
                ahead = [self._bias(v) is None for v in eqn.invars]
                if ahead.count(True) != 1:
                    return None
                var = eqn.invars[ahead.index(True)]
            elif eqn.primitive.name in _CHAIN and _is_float(eqn.invars[0].aval):
                var = eqn.invars[0]
            else:
                return None
            if not _is_float(eqn.outvars[0].aval):
                return None
            steps.append(i)
        return None

    def _bias(self, var: Any) -> tuple[int, View] | None:
        """Follow a value back to a leaf that nothing else reads, as a view of it."""
        if isinstance(var, compat.Literal):
            return None
        if var in self._leaves:
            if len(self.users(var)) > 1:
                return None
            return self._leaves[var], views.whole(self._leaves[var], var.aval.shape)
        if var not in self._makers or len(self.users(var)) > 1:
            return None
        eqn = self._body.eqns[self._makers[var]]
        if eqn.primitive.name not in _CHAIN | {"broadcast_in_dim"}:
            return None
        before = self._bias(eqn.invars[0])
        if before is None:
            return None
        leaf, view = before
        (after,) = view_rules.step(eqn, view, 0, [False])
        return None if after is None else (leaf, after)

    def is_in_order(self, site: Site, product: Site) -> bool:
        """Tell whether a site contracts the outputs of a product as they lie."""
        outputs = _outputs(product)
        shape = product.out_shape.shape
        view = views.whole(0, shape)
        for i in self._steps[site.key]:
            eqn = self._body.eqns[i]
            if eqn.primitive.name == "add":
                bias = next(b for b in map(self._bias, eqn.invars) if b is not None)
                if view != views.whole(0, shape) or not _runs_along(
                    bias[1], outputs, shape
                ):
                    return False
                self.biases[bias[0]] = None
                continue
            (after,) = view_rules.step(eqn, view, 0, [False])
            if after is None:
                return False
            view = after
        atoms = [a for _, axis in contracted_axes(site) for a in view.dims[axis]]
        whole = [Atom(axis, shape[axis]) for axis in outputs]
        is_all = math.prod(a.size for a in atoms) == math.prod(a.size for a in whole)
        return is_all and _elements(atoms) == _elements(whole)


def _outputs(product: Site) -> list[int]:
    """List the axes of a product's result along which its parameter's outputs lie."""
    contracted, batch = product.params["dimension_numbers"]
    side = product.operand
    free = [
        len(product.in_shapes[i].shape) - len(contracted[i]) - len(batch[i])
        for i in (0, 1)
    ]
    first = len(batch[0]) + (free[0] if side == 1 else 0)
    return list(range(first, first + free[side]))


def _runs_along(view: View, outputs: Sequence[int], shape: Sequence[int]) -> bool:
    """Tell whether a bias has a number per output and is the same along all else."""
    own = [a for axis in outputs for a in view.dims[axis] if a.size != 1]
    others = [a for i, dim in enumerate(view.dims) if i not in outputs for a in dim]
    sizes = math.prod(shape[axis] for axis in outputs)
    return (
        all(a.axis == REPEATED or a.size == 1 for a in others)
        and all(a.axis != REPEATED and a.stride > 0 for a in own)
        and math.prod(a.size for a in own) == sizes
        and [a.axis for a in own] == sorted(a.axis for a in own)
        and len({a.axis for a in own}) == len(own)
    )


def _elements(atoms: Sequence[Atom]) -> list[tuple[int, int]]:
    """Write runs along axes as single steps, so that split ones compare equal."""
    found: list[tuple[int, int]] = []
    for atom in atoms:
        if atom.size == 1:
            continue
        last = found[-1] if found else None
        # An outer run that goes on where the inner one ends is one run.
        if last == (atom.axis, atom.size * atom.stride) and atom.stride > 0:
            found[-1] = (atom.axis, atom.stride)
        else:
            found.append((atom.axis, atom.stride))
    return found


def _is_float(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.floating))
