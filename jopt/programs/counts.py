"""The sites of a function as people read them, and what they cost.

    print(sites(apply, params, x))        a table, and below it what is not covered
    count_flops(apply, params, x)         operations per site
    count_bytes(apply, params, x)         bytes read and written per site

Nothing is computed: one trace tells all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jopt.arrays.compressed import CompressedArray
from jopt.programs import interpret
from jopt.programs.handlers import Handler, Use, is_compressed
from jopt.programs.operations import Site
from jopt.programs.sites import Analysis, SiteTable, analyse
from jopt.trees import paths


def sites(
    apply: Callable[..., Any], params: Any, *inputs: Any, **kwargs: Any
) -> SiteTable:
    """Find every operation that consumes a parameter.

    Args:
        apply: a pure function `apply(params, *inputs, **kwargs)`.
        params: any pytree of arrays or of their shapes.
        *inputs: arrays or their shapes; nothing is computed with them.
        **kwargs: the same by name.

    Returns:
        The table of sites; `print` it. Names, activations, uncovered leaves, FLOPs and
        bytes are its attributes.

    Raises:
        ValueError: `params` has no leaf, or `apply` is not pure.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4))}
    >>> table = sites(lambda p, x: x @ p["a"] + p["b"], params, jnp.ones((2, 3)))
    >>> table["a"].roles, table.flops, table.uncovered
    ({0: 'in', 1: 'out'}, 48, {'b': 'used by add'})
    """
    analysis = analyse(apply, params, inputs, kwargs)
    found = _where_compressed(analysis, params, inputs, kwargs)
    return dataclasses.replace(analysis.table, compressed=found)


def count_flops(
    apply: Callable[..., Any], params: Any, *inputs: Any, **kwargs: Any
) -> dict[str, int]:
    """Count the floating point operations of every site.

    A product of [m, k] and [k, n] has 2 m k n; a site inside a scan runs once per step,
    inside a `shard_map` once per device, inside a `while` loop it counts once.

    Args:
        apply: a pure function `apply(params, *inputs, **kwargs)`.
        params: any pytree of arrays or of their shapes.
        *inputs: arrays or their shapes; nothing is computed with them.
        **kwargs: the same by name.

    Returns:
        Name of a site to its operations. The sum over all but the cheaper branches is
        `sites(...).flops`.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((5, 3, 3))}
    >>> def apply(params, x):
    ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]
    >>> count_flops(apply, params, jnp.ones((2, 3)))
    {'w': 180}
    """
    table = analyse(apply, params, inputs, kwargs).table
    return {site.name: site.flops for site in table}


def count_bytes(
    apply: Callable[..., Any], params: Any, *inputs: Any, **kwargs: Any
) -> dict[str, int]:
    """Count the bytes that every site reads and writes.

    Operands and results count in full, as if nothing were fused; a lookup counts the
    rows that it returns, and a compressed leaf the bytes that it is stored in.

    Args:
        apply: a pure function `apply(params, *inputs, **kwargs)`.
        params: any pytree of arrays, of their shapes or of compressed arrays.
        *inputs: arrays or their shapes; nothing is computed with them.
        **kwargs: the same by name.

    Returns:
        Name of a site to its bytes, over all runs.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((4, 8))}
    >>> count_bytes(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
    {'w': 224}
    """
    table = analyse(apply, params, inputs, kwargs).table
    leaves = dict(paths.leaves_with_path(params))
    return {site.name: site.bytes - _saved(site, leaves) for site in table}


def _saved(site: Site, leaves: Mapping[str, Any]) -> int:
    """Count the bytes that a compressed leaf spares a site."""
    leaf = leaves.get(site.path)
    if not isinstance(leaf, CompressedArray) or site.kind == "gather":
        return 0
    operand = site.in_shapes[site.operand]
    size = math.prod(operand.shape)
    stored = sum(c.size * c.dtype.itemsize for c in jax.tree.leaves(leaf))
    spared = size * operand.dtype.itemsize - size * stored / max(leaf.size, 1)
    return round(spared) * site.runs


def _where_compressed(
    analysis: Analysis, params: Any, inputs: Any, kwargs: Any
) -> dict[str, bool]:
    """Tell which sites meet a compressed leaf in its few bytes."""
    leaves = dict(paths.leaves_with_path(params))
    if not any(map(is_compressed, leaves.values())):
        return {}
    found = {
        site.name: False
        for site in analysis.table
        if site.is_weight and is_compressed(leaves[site.path])
    }

    def look(use: Use) -> jax.Array:
        found[use.site.name] = is_compressed(use.weight)
        return use.run()

    handler = Handler(look, select=lambda site: site.name in found)
    run = functools.partial(interpret.evaluate, analysis, handler, values={})
    jax.eval_shape(run, params, inputs, kwargs)
    return found
