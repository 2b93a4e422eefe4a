"""Run a pure function again, with a handler at each site.

    apply' = rewrite(apply, handler)

has the calling convention of `apply` and works under `jit`, `grad`, `vmap`, `scan` and
`shard_map` like it. At every site that the handler selects, `handler.call(use)` gives
the result in place of JAX's own operation; all else runs as it stood. Bodies without a
selected site, and those that jopt does not know, are not opened.

A handler may return an aux value beside the result, of the structure of
`handler.initial`. It comes out by site name: stacked over the layers of scans and over
the devices of a `shard_map`, merged over the steps of `while` loops and of scans that
slice no params (time, batches), and initial where a branch was not taken. A handler
without a `merge` has it stacked over all scans.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jopt.programs import compat, flags, sites
from jopt.programs.handlers import Handler, is_compressed, to_array
from jopt.programs.interpreter import Interpreter


def rewrite(
    apply: Callable[..., Any],
    handler: Handler,
    *,
    inline_custom_rules: bool = False,
) -> Callable[..., Any]:
    """Return a function that runs `apply` with a handler at each selected site.

    Args:
        apply: a pure function `apply(params, *inputs, **kwargs)` of arrays.
        handler: what to do at which sites.
        inline_custom_rules: open `custom_jvp` and `custom_vjp` functions that hold a
            selected site, and lose their gradient rules; otherwise they run as they are
            and their sites are listed as not entered.

    Returns:
        `apply'(params, *inputs, **kwargs)`, which returns what `apply` does, and for a
        handler with aux values the pair of that and `{site name: aux value}`. Leaves of
        `params` may be compressed arrays.

    Raises:
        ValueError: (when called) `apply` is not pure, or the handler returns a result
            of another shape or selects a site inside a `while` loop without a `merge`.

    >>> import jax.numpy as jnp
    >>> halved = Handler(lambda use: use.run(weight=to_array(use.weight) / 2))
    >>> apply = lambda params, x: x @ params["w"]
    >>> rewrite(apply, halved)({"w": jnp.eye(2)}, jnp.ones((1, 2)))
    Array([[0.5, 0.5]], dtype=float32)
    """

    def run(params: Any, inputs: Any, kwargs: Any) -> Any:
        analysis = sites.analyse(
            apply, params, inputs, kwargs, inline_custom_rules=inline_custom_rules
        )
        return evaluate(analysis, handler, params, inputs, kwargs, {})

    call = compiled_if_eager(run)

    def rewritten(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return call(params, inputs, kwargs)

    return (
        functools.wraps(apply)(rewritten) if hasattr(apply, "__name__") else rewritten
    )


def compiled_if_eager(run: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of `(params, inputs, kwargs, *rest)` if it is called eagerly.

    Inside `jit` it is written into the program around, as the function that it stands
    for would be. Inputs that are no arrays or numbers (`train=True`) are static.

    Args:
        run: what to call.

    Returns:
        What to call in its place.
    """
    compiled = jax.jit(run)

    def call(params: Any, inputs: Any, kwargs: Any, *rest: Any) -> Any:
        inputs, kwargs = flags.fix((inputs, kwargs))
        args = (params, inputs, kwargs, *rest)
        return run(*args) if compat.is_staged(args) else compiled(*args)

    return call


def evaluate(
    analysis: sites.Analysis,
    handler: Handler,
    params: Any,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Any],
) -> Any:
    """Run an analysed function once, with a handler at each selected site.

    Args:
        analysis: of the function, at the shapes of what follows.
        handler: what to do at which sites.
        params: the parameters, compressed or not.
        inputs: the further arguments.
        kwargs: those by name.
        values: site name to what its `Use.value` holds, with a leading axis for each
            scan over layers around it.

    Returns:
        What the function returns, and beside it the aux values if there are any.

    Raises:
        ValueError: a value is named after no site.
    """
    chosen = {
        site.key: site
        for site in analysis.table
        if site.reachable and handler.select(site)
    }
    strangers = set(values) - {site.name for site in chosen.values()}
    if strangers:
        raise ValueError(
            f"values must be named after selected sites, got {sorted(strangers)} "
            f"where the sites are {[site.name for site in chosen.values()]}"
        )
    leaves = jax.tree.leaves(params, is_leaf=is_compressed)
    operands = leaves + jax.tree.leaves((inputs, kwargs))
    interpreter = Interpreter(handler, chosen, any(map(is_compressed, leaves)))
    results, aux = interpreter.body(analysis.traced.body, operands, (), dict(values))
    out = jax.tree.unflatten(analysis.traced.out_tree, map(to_array, results))
    return out if handler.initial is None else (out, aux)
