"""The operations that multiply or look up: what their axes do, and what they cost."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


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
    numbers = eqn.params["dimension_numbers"]
    batch = numbers.operand_batching_dims
    return _roles(eqn, operand, {"index": numbers.start_index_map, "batch": batch})


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
    "gather": Operation(_gather_roles, lambda eqn: 0, _gather_bytes),
}
