"""From a framework's module to a pure function of its parameters, in one line.

    apply, params = functional(module)
    y = apply(params, x)

Everything that is no parameter (batch statistics, random states, static fields) is
closed over as a copy, so that calling `apply` changes nothing outside. Where it must
change, in training, `mutable=True` makes it an argument and a result:

    apply, params, rest = functional(module, mutable=True)
    y, rest = apply(params, rest, x)
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx


def functional(
    module: Any,
    variables: Mapping[str, Any] | None = None,
    *,
    mutable: bool = False,
    method: str = "__call__",
) -> tuple[Any, ...]:
    """Make a pure function of a module's parameters.

    Args:
        module: an NNX module, a Linen module, or a callable pytree such as an Equinox
            module, whose float arrays are its parameters.
        variables: of a Linen module, what its `init` returned.
        mutable: whether what is no parameter is an argument and a result too. An NNX
            module in training mode needs it: its batch statistics and random counts
            would otherwise start at the same values in every call.
        method: the name of the method to call.

    Returns:
        `(apply, params)` with `apply(params, *inputs, **kwargs)`, or with `mutable`
        `(apply, params, rest)` with `apply(params, rest, *inputs, **kwargs)`, which
        returns `(output, rest)`.

    Raises:
        ValueError: a Linen module comes without variables, another one with them, or
            `mutable` is asked of a callable pytree, which takes its state as an input.
        TypeError: `module` is none of these.

    >>> from flax import nnx
    >>> apply, params = functional(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> apply(params, jnp.ones((4, 3))).shape
    (4, 2)
    """
    if isinstance(module, linen.Module):
        return _linen(module, variables, mutable, method)
    if variables is not None:
        raise ValueError(
            "variables belong to Linen modules, got some with "
            f"{type(module).__name__}; leave them out"
        )
    if isinstance(module, nnx.Module):
        return _nnx(module, mutable, method)
    if inspect.isclass(module) or jax.tree_util.all_leaves([module]):
        raise TypeError(
            "module must be an NNX or Linen module or a callable pytree, got "
            f"{module!r}; a pure function apply(params, *inputs) needs no adapter"
        )
    return _pytree(module, mutable, method)


def _nnx(module: nnx.Module, mutable: bool, method: str) -> tuple[Any, ...]:
    split: Any = nnx.split(module, nnx.Param, ...)
    graph, params, rest = split
    # A copy, because a training step of the module may donate its own.
    rest = jax.tree.map(jnp.copy, rest)

    def run(params: Any, rest: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        # Without copy, calling a module writes into the state it was merged from.
        merged = nnx.merge(graph, params, rest, copy=True)
        out = getattr(merged, method)(*inputs, **kwargs)
        changed: Any = nnx.split(merged, nnx.Param, ...)
        return out, changed[2]

    return _closed(run, params, rest, mutable)


def _linen(
    module: linen.Module,
    variables: Mapping[str, Any] | None,
    mutable: bool,
    method: str,
) -> tuple[Any, ...]:
    if variables is None or "params" not in variables:
        raise ValueError(
            "a Linen module needs variables with 'params', got "
            f"{None if variables is None else sorted(variables)}; call "
            "functional(module, module.init(key, *inputs))"
        )
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def run(params: Any, rest: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        out, changed = module.apply(
            {"params": params, **rest},
            *inputs,
            mutable=list(rest) if mutable else [],
            method=method,
            **kwargs,
        )
        return out, {**rest, **changed}

    return _closed(run, variables["params"], rest, mutable)


def _pytree(module: Any, mutable: bool, method: str) -> tuple[Any, ...]:
    if mutable:
        raise ValueError(
            "mutable must be False for a callable pytree, got True: it takes its state "
            "as an input and returns it"
        )
    leaves, treedef = jax.tree.flatten(module)
    structure: Any = treedef
    is_param = [_is_float_array(leaf) for leaf in leaves]
    rest = [None if p else leaf for p, leaf in zip(is_param, leaves, strict=True)]
    params = structure.unflatten(
        [leaf if p else None for p, leaf in zip(is_param, leaves, strict=True)]
    )

    def apply(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        given = iter(structure.flatten_up_to(params))
        whole = [next(given) if r is None else (next(given), r)[1] for r in rest]
        return getattr(structure.unflatten(whole), method)(*inputs, **kwargs)

    return apply, params


def _closed(
    run: Callable[..., tuple[Any, Any]], params: Any, rest: Any, mutable: bool
) -> tuple[Any, ...]:
    if mutable:
        return run, params, rest

    def apply(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return run(params, rest, *inputs, **kwargs)[0]

    return apply, params


def _is_float_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
