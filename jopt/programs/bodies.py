"""The parts of a traced program: bodies, and the equations that run other bodies."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """A traced function: equations over variables, and the constants it closes over."""

    jaxpr: Any
    consts: tuple[Any, ...]

    @property
    def eqns(self) -> Sequence[Any]:
        """The equations in program order."""
        return self.jaxpr.eqns

    @property
    def invars(self) -> Sequence[Any]:
        """The arguments."""
        return self.jaxpr.invars

    @property
    def outvars(self) -> Sequence[Any]:
        """The results, variables or literals."""
        return self.jaxpr.outvars

    @property
    def constvars(self) -> Sequence[Any]:
        """The variables that stand for `consts`."""
        return self.jaxpr.constvars


@dataclasses.dataclass(frozen=True, eq=False)
class Inner:
    """A body called with the operands of the equation."""

    body: Body
    name: str
    in_shardings: tuple[Sharding | None, ...] = ()
    out_shardings: tuple[Sharding | None, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Remat:
    """A body that is computed again in the backward pass."""

    body: Body
    policy: Callable[..., Any] | None
    prevent_cse: bool | tuple[bool, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class CustomRule:
    """A body with a derivative of its own, `custom_jvp` or `custom_vjp`."""

    body: Body
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """A body run `length` times: operands are constants, carries and stacked inputs."""

    body: Body
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int | bool


@dataclasses.dataclass(frozen=True, eq=False)
class While:
    """A body run until a condition fails: its constants first, then the body's."""

    condition: Body
    body: Body
    num_condition_consts: int
    num_body_consts: int


@dataclasses.dataclass(frozen=True, eq=False)
class Cond:
    """One of several bodies, chosen by the first operand, or by the platform."""

    branches: tuple[Body, ...]
    platforms: tuple[tuple[str, ...] | None, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ShardMap:
    """A body run by each device on its own shards."""

    body: Body
    mesh: Any
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    axis_names: frozenset[Any]
    check_vma: bool


Control = Inner | Remat | CustomRule | Scan | While | Cond | ShardMap


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A function traced at given shapes: its body, and the structure of its results."""

    body: Body
    out_tree: Any
