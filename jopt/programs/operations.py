"""The operations that multiply or look up: what their axes do, and what they cost.

A `Site` is one of them in a program, beside the parameter that it consumes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from jopt.programs import compat, views
from jopt.programs.flows import Key, Kind
from jopt.programs.views import View


class Operation(NamedTuple):
    """What is known of a primitive that multiplies or looks up.

    Attributes:
        roles: equation and operand to the role of each axis of that operand.
        flops: of one run, multiply and add counted as two.
        bytes: that one run reads and writes.
    """

    roles: Callable[[Any, int], list[str]]
    flops: Callable[[Any], int]
    bytes: Callable[[Any], int]


def _dot_roles(eqn: Any, operand: int) -> list[str]:
    contracted, batch = eqn.params["dimension_numbers"]
    return _roles(eqn, operand, {"in": contracted[operand], "batch": batch[operand]})


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    inner = math.prod(shape[axis] for axis in contracted)
    return int(2 * inner * math.prod(eqn.outvars[0].aval.shape))


def _conv_roles(eqn: Any, operand: int) -> list[str]:
    numbers = eqn.params["dimension_numbers"]
    out, *contracted = numbers.rhs_spec if operand == 1 else numbers.lhs_spec
    return _roles(eqn, operand, {"in": contracted, "out": [out]})


def _conv_flops(eqn: Any) -> int:
    """Count outputs times window; holes between dilated inputs are not read."""
    kernel = eqn.invars[1].aval.shape
    _, *window = eqn.params["dimension_numbers"].rhs_spec
    per_output = math.prod(kernel[axis] for axis in window)
    holes = math.prod(eqn.params["lhs_dilation"] or ())
    return int(2 * per_output * math.prod(eqn.outvars[0].aval.shape) // holes)


def _ragged_roles(eqn: Any, operand: int) -> list[str]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions if operand == 1 else ()
    return _roles(
        eqn, operand, {"in": contracted[operand], "batch": [*batch[operand], *groups]}
    )


def _ragged_flops(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs = eqn.invars[0].aval.shape
    inner = math.prod(lhs[axis] for axis in contracted)
    out = eqn.outvars[0].aval.shape
    # Where the contracted axis is ragged, every group adds up its own part of it.
    if set(numbers.lhs_ragged_dimensions) & set(contracted):
        out = out[1:]
    return int(2 * inner * math.prod(out))


def _gather_roles(eqn: Any, operand: int) -> list[str]:
    if operand == 1:
        return ["index"] * len(eqn.invars[1].aval.shape)
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    # A slice as long as its axis starts at 0, whatever its index says.
    index = [a for a in numbers.start_index_map if sizes[a] != shape[a]]
    batch = numbers.operand_batching_dims
    return _roles(eqn, operand, {"index": index, "batch": batch})


def _slice_roles(eqn: Any, operand: int) -> list[str]:
    """A slice that starts where the inputs say is a lookup of one row."""
    if operand == 1:
        return []
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    index = [a for a, size in enumerate(sizes) if size != shape[a]]
    return _roles(eqn, operand, {"index": index})


def _roles(eqn: Any, operand: int, axes: dict[str, Sequence[int]]) -> list[str]:
    roles = ["out"] * len(eqn.invars[operand].aval.shape)
    for role, members in axes.items():
        for axis in members:
            roles[axis] = role
    return roles


def _all_bytes(eqn: Any) -> int:
    return sum(_nbytes(var.aval) for var in (*eqn.invars[:2], *eqn.outvars))


def _gather_bytes(eqn: Any) -> int:
    """A lookup reads the rows that it returns, not the table."""
    return 2 * _nbytes(eqn.outvars[0].aval) + _nbytes(eqn.invars[1].aval)


def _nbytes(aval: Any) -> int:
    return math.prod(aval.shape) * int(aval.dtype.itemsize)


TABLE: dict[str, Operation] = {
    "dot_general": Operation(_dot_roles, _dot_flops, _all_bytes),
    "conv_general_dilated": Operation(_conv_roles, _conv_flops, _all_bytes),
    "ragged_dot_general": Operation(_ragged_roles, _ragged_flops, _all_bytes),
    "ragged_dot": Operation(_ragged_roles, _ragged_flops, _all_bytes),
    "dynamic_slice": Operation(_slice_roles, lambda eqn: 0, _gather_bytes),
    "gather": Operation(_gather_roles, lambda eqn: 0, _gather_bytes),
}


class Around(NamedTuple):
    """What runs a site several times.

    Attributes:
        key: of the equation.
        size: how often.
        kind: "layers" is a scan that slices params, or whose counter slices the leaf;
            "steps" any other scan; "devices" a `shard_map`.
    """

    key: Key
    size: int
    kind: Literal["layers", "steps", "devices"]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One operation that multiplies or looks up.

    Attributes:
        name: the path of the leaf, with '#k' for its later uses; of sites without one
            leaf, the kind and an ordinal.
        key: the way to the equation through the bodies of the program.
        kind: "weight" and "gather" consume a view of one leaf, "derived" a value
            computed from leaves, "activation" two values that depend on the inputs;
            "constant" has an operand that depends on neither.
        eqn: the equation of the traced program.
        operand: which operand the leaf is, 0 or 1.
        view: how the operand looks at the leaf; None if it is not one leaf.
        parts: of an operand that is several leaves joined, how it looks at each.
        leaves: positions of the leaves, in the order of `jax.tree.leaves`.
        around: the scans and `shard_map`s around it, outermost first.
        guards: the branches and `while` loops around it.
        runs: how often it runs, on all devices.
        why_not: why a handler never sees it, or None.
        leaf_paths: the paths of the leaves.
    """

    key: Key
    kind: Kind
    eqn: Any = dataclasses.field(repr=False)
    operand: int
    view: View | None
    parts: tuple[View, ...]
    leaves: frozenset[int]
    around: tuple[Around, ...]
    guards: tuple[str, ...]
    runs: int
    why_not: str | None
    name: str = ""
    leaf_paths: tuple[str, ...] = ()

    @property
    def primitive(self) -> str:
        """Its name in JAX."""
        return str(self.eqn.primitive.name)

    @property
    def params(self) -> dict[str, Any]:
        """Those of the primitive in JAX, such as its dimension numbers."""
        return dict(self.eqn.params)

    @property
    def stack(self) -> str:
        """The modules it was traced in, where the framework says so."""
        return compat.name_stack(self.eqn)

    @property
    def in_shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the operands."""
        return tuple(compat.aval_of(var.aval) for var in self.eqn.invars)

    @property
    def out_shape(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the result."""
        return compat.aval_of(self.eqn.outvars[0].aval)

    @property
    def flops(self) -> int:
        """Operations of all runs, multiply and add counted as two."""
        return self._operation.flops(self.eqn) * self.runs

    @property
    def bytes(self) -> int:
        """Bytes read and written by all runs."""
        return self._operation.bytes(self.eqn) * self.runs

    @property
    def operand_roles(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The roles of the axes of both operands."""
        lhs, rhs = (tuple(self._operation.roles(self.eqn, i)) for i in (0, 1))
        return lhs, rhs

    @property
    def roles(self) -> dict[int, str]:
        """The roles of the axes of the leaf.

        "in" is contracted, "out" stays, "batch" is shared by both operands, "index" is
        looked up, "stacked" is sliced away layer by layer, "mixed" is several of them.
        """
        if self.view is None:
            return {}
        return _leaf_roles(self.view, self.operand_roles[self.operand])

    @property
    def roles_by_path(self) -> dict[str, dict[int, str]]:
        """The roles of the axes of every leaf that the operand is, whole or joined."""
        paths = dict(zip(sorted(self.leaves), self.leaf_paths, strict=True))
        views = self.parts if self.view is None else (self.view,)
        roles = self.operand_roles[self.operand]
        return {paths[view.leaf]: _leaf_roles(view, roles) for view in views}

    @property
    def _operation(self) -> Operation:
        return TABLE[self.primitive]

    @property
    def reachable(self) -> bool:
        """Whether a handler can be called here."""
        return self.why_not is None

    @property
    def is_weight(self) -> bool:
        """Whether one operand is a view of one leaf."""
        return self.kind in ("weight", "gather")

    @property
    def path(self) -> str:
        """The path of the leaf, `''` if there is not exactly one."""
        return self.leaf_paths[0] if self.is_weight else ""


def _leaf_roles(view: View, roles: Sequence[str]) -> dict[int, str]:
    """Turn the roles of an operand's axes into those of the leaf's."""
    found: dict[int, set[str]] = {axis: set() for axis in range(view.rank)}
    for axes, role in zip(views.axes_of(view), roles, strict=True):
        for axis in axes:
            found[axis].add(role)
    return {
        axis: "stacked" if not r else r.pop() if len(r) == 1 else "mixed"
        for axis, r in found.items()
    }
