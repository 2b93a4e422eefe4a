"""What JAX calls things: the one file that knows versions and undocumented attributes.

`trace` turns a function into a `Body`; `control` reads an equation that holds other
bodies (a scan, a branch, a jitted call) into a record of its own, and `bind` runs an
equation as it stands.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Sharding

from jopt.programs.bodies import (
    Body,
    Cond,
    Control,
    CustomRule,
    Inner,
    Remat,
    Scan,
    ShardMap,
    Traced,
    While,
)

Literal = core.Literal
_CLOSED = core.ClosedJaxpr  # type: ignore[attr-defined]

# Equations that call one body with their operands as they are.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "xla_metadata_call": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
)
# All that `control` can read.
ENTERED = frozenset(_CALLS) | {"scan", "while", "cond", "shard_map"}
_REMAT = ("remat2", "checkpoint")
_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def trace(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Traced:
    """Trace a function; the second time at the same shapes costs nothing.

    Args:
        function: a pure one. What it closes over becomes constants, tracers among them.
        args: arrays or their shapes.
        kwargs: the same by name.

    Returns:
        The traced function. At the same shapes the body's jaxpr is the same object,
        unless the function closes over tracers.

    Raises:
        ValueError: the function is not pure.
    """
    try:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    except (jax.errors.UnexpectedTracerError, flax.errors.TraceContextError) as error:
        raise ValueError(
            "apply must be pure: it reads or writes state outside of its arguments; "
            "jopt.functional(module) makes a pure function of a module, "
            "mutable=True one that returns its state"
        ) from error
    except jax.errors.JAXTypeError as error:
        if not isinstance(error, _NEEDS_VALUES):
            raise
        raise ValueError(
            "apply must not need the value of an array in Python, as in `if x:` or "
            f"range(x), got {str(error).splitlines()[0]}; bind what is static with "
            "functools.partial(apply, name=value)"
        ) from error
    return Traced(_open(closed), jax.tree.structure(shapes))


def control(eqn: Any) -> Control | None:
    """Read an equation that runs other bodies and that jopt knows how to enter.

    Args:
        eqn: an equation of a jaxpr.

    Returns:
        Its parts, or None: either it holds no body, or `holds_bodies` and is opaque.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn)
    if name == "while":
        return While(
            _open(params["cond_jaxpr"]),
            _open(params["body_jaxpr"]),
            params["cond_nconsts"],
            params["body_nconsts"],
        )
    if name == "cond":
        branches = tuple(map(_open, params["branches"]))
        return Cond(branches, params.get("branches_platforms"))
    if name == "shard_map":
        return ShardMap(
            _open(params["jaxpr"]),
            params["mesh"],
            tuple(params["in_specs"]),
            tuple(params["out_specs"]),
            frozenset(params.get("newly_manual_axes", params.get("manual_axes", ()))),
            params["check_vma"],
        )
    if name not in _CALLS or _CALLS[name] not in params:
        return None
    body = _open(params[_CALLS[name]])
    if name in _REMAT:
        return Remat(body, params.get("policy"), params.get("prevent_cse", True))
    if name in _CUSTOM_RULES:
        return CustomRule(body, name.partition("_call")[0])
    return Inner(
        body,
        str(params.get("name", name)),
        _shardings(params.get("in_shardings", ())),
        _shardings(params.get("out_shardings", ())),
    )


def holds_bodies(eqn: Any) -> bool:
    """Tell whether an equation has jaxprs among its parameters, known or not.

    Args:
        eqn: an equation of a jaxpr.

    Returns:
        True also for opaque ones, such as Pallas kernels and linear solvers.
    """
    return any(
        isinstance(part, core.Jaxpr | _CLOSED)
        for value in eqn.params.values()
        for part in (value if isinstance(value, tuple | list) else (value,))
    )


def choosers(body: Body) -> dict[int, Any]:
    """Find what users chose the branches of conditionals by.

    JAX turns a predicate into an index, and clamps an index, before the equation; who
    builds the conditional again with `lax.cond` or `lax.switch` starts from there.

    Args:
        body: of a traced function.

    Returns:
        Position of a conditional to the variable of its predicate or free index.
    """
    made = {var: eqn for eqn in body.eqns for var in eqn.outvars}
    found = {}
    for i, eqn in enumerate(body.eqns):
        if eqn.primitive.name != "cond" or isinstance(eqn.invars[0], Literal):
            continue
        maker = made.get(eqn.invars[0])
        if maker is not None and maker.primitive.name == "clamp":
            found[i] = maker.invars[1]
        elif maker is not None and maker.primitive.name == "convert_element_type":
            (source,) = maker.invars
            if source.aval.dtype == bool and len(eqn.params["branches"]) == 2:
                found[i] = source
    return found


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Run an equation as it stands.

    Args:
        eqn: an equation of a jaxpr.
        operands: arrays, one per input of the equation.

    Returns:
        The list of its results.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    with context(eqn):
        if isinstance(params, tuple):  # a list of functions, and the rest
            out = eqn.primitive.bind(*params[0], *operands, **params[1])
        else:
            out = eqn.primitive.bind(*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def context(eqn: Any) -> Any:
    """Enter the mesh, the memory and the settings that an equation was traced under.

    Args:
        eqn: an equation of a jaxpr.

    Returns:
        A context manager.
    """
    return eqn.ctx.manager


@functools.cache
def has_scaled_matmul() -> bool:
    """Tell whether `jax.nn.scaled_matmul` runs on the default backend.

    Returns:
        False where this JAX has no lowering of it.
    """
    shape: Any = jax.ShapeDtypeStruct
    codes = shape((1, 32, 32), jnp.float8_e4m3fn)
    scales = shape((1, 32, 1), jnp.float8_e8m0fnu)
    try:
        jax.jit(jax.nn.scaled_matmul).lower(codes, codes, scales, scales)
    except NotImplementedError:  # what JAX raises without a lowering, and no other
        return False
    return True


def name_stack(eqn: Any) -> str:
    """Name the modules and scopes that an equation was traced in.

    Args:
        eqn: an equation of a jaxpr.

    Returns:
        Their names joined by '/', `''` where the framework sets none.
    """
    return str(eqn.source_info.name_stack)


def scopes(body: Body) -> Iterator[tuple[Any, Iterator[tuple[int, Any]]]]:
    """Group equations by the scope that they were traced in, so that profiles show it.

    Args:
        body: of a traced function.

    Returns:
        Pairs of a context that enters the scope, and of the equations with positions.
    """
    eqns = enumerate(body.eqns)
    for stack, group in itertools.groupby(eqns, lambda e: e[1].source_info.name_stack):
        name = str(stack)
        yield jax.named_scope(name) if name else contextlib.nullcontext(), group


def axis_sizes(mesh: Any) -> dict[Any, int]:
    """Give the size of each axis of a mesh, abstract or of devices.

    Args:
        mesh: the mesh of a `shard_map`.

    Returns:
        Axis name to size.
    """
    return dict(mesh.shape)


def is_ref(aval: Any) -> bool:
    """Tell whether an abstract value is a reference that is read and written.

    Args:
        aval: of a variable.

    Returns:
        True for what `jax.new_ref` makes.
    """
    return hasattr(aval, "inner_aval")


def is_staged(tree: Any) -> bool:
    """Tell whether a call is being traced into a larger program.

    Args:
        tree: of the arguments of the call.

    Returns:
        True inside `jit` and the like; False where unsure.
    """
    # Under eager `grad` and `vmap` arguments are tracers of other kinds.
    return any(type(x).__name__ == "DynamicJaxprTracer" for x in jax.tree.leaves(tree))


def vary(tree: Any) -> Any:
    """Let arrays differ between the devices of a `shard_map` around, in type only.

    Args:
        tree: of arrays.

    Returns:
        The same numbers, of one type wherever they came from.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def varied(leaf: Any) -> Any:
        known = jax.typeof(leaf).manual_axis_type.varying if manual else ()
        missing = tuple(axis for axis in manual if axis not in known)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(varied, tree)


def trace_state() -> Any:
    """Return what two places share if arrays of one may be used in the other."""
    return core.get_opaque_trace_state(convention="flax")  # type: ignore[no-untyped-call]


def aval_of(value: Any) -> jax.ShapeDtypeStruct:
    """Give what a function is traced with: shape, dtype, and place where it is typed.

    Args:
        value: an array, a Python number, a shape or a compressed array.

    Returns:
        The abstract value.
    """
    kind = value
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if is_array or not hasattr(value, "shape"):
        kind = jax.typeof(value)
    if is_ref(kind):
        raise TypeError(
            f"params and inputs must be arrays, got a reference {kind}; read it before "
            "the call and write it after"
        )
    sharding = getattr(kind, "sharding", None)
    return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
        kind.shape,
        kind.dtype,
        sharding=sharding if _is_typed(sharding) else None,
        weak_type=bool(getattr(kind, "weak_type", False)),
        manual_axis_type=getattr(kind, "manual_axis_type", None),
    )


def _is_typed(sharding: Any) -> bool:
    """Tell whether a placement is part of the type: on explicit and manual axes."""
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and any(
        kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types
    )


def _open(closed: Any) -> Body:
    """Separate equations and constants, which newer jaxprs hold together."""
    if _CLOSED is not core.Jaxpr and isinstance(closed, _CLOSED):
        return Body(closed.jaxpr, tuple(closed.consts))
    return Body(closed, tuple(getattr(closed, "consts", ())))


def _scan(eqn: Any) -> Scan:
    params = eqn.params
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        num_consts, num_carry = len(consts), len(carry)
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    return Scan(
        _open(params["jaxpr"]),
        num_consts,
        num_carry,
        int(np.asarray(params["length"])),
        params["reverse"],
        params["unroll"],
    )


def _shardings(shardings: Sequence[Any]) -> tuple[Sharding | None, ...]:
    return tuple(s if isinstance(s, Sharding) else None for s in shardings)
