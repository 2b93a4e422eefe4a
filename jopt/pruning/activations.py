"""Sparse activations: what meets a weight keeps its largest entries alone.

    y = (x where m else 0) W,    m = top k of |x| in each row, or n of every m inputs

with the gradient of the identity to x (straight through; Bengio et al.,
arXiv:1308.3432), so that inputs that are zero now can come back. Top-k of activations
goes back to k-sparse autoencoders (Makhzani and Frey, arXiv:1312.5663).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays import axis_selection, patterns
from jopt.arrays.straight_through import straight_through
from jopt.programs import interpret, sites
from jopt.programs.handlers import Handler, Use
from jopt.programs.operations import Site
from jopt.pruning.wanda import num_kept
from jopt.trees import rules

Select = Callable[[str, Site], bool] | rules.Matching | None


def sparsify_activations(
    apply: Callable[..., Any],
    *,
    sparsity: Any = None,
    pattern: patterns.Pattern = patterns.Unstructured(),  # noqa: B008
    select: Select = None,
) -> Callable[..., Any]:
    """Keep only the largest inputs of every product with a parameter.

    Args:
        apply: a pure function `apply(params, *inputs, **kwargs)`.
        sparsity: fraction of zeros of each row, a number or a traced scalar; None for
            `jopt.NM`.
        pattern: `Unstructured`: of K contracted inputs K - round(sparsity * K) stay, by
            |x|, ties to the lower index, NaN first to go; `NM`: n of every m inputs in
            a row, whatever its axis. Several contracted axes count as one, in their
            order; a convolution has a row of channels at each place.
        select: which sites: a predicate `(name, site) -> bool` or `jopt.matching(...)`
            on names; None for all that multiply a parameter.

    Returns:
        `apply'` of the same calling convention, under `jit`, `grad`, `vmap`, `scan` and
        `shard_map` like `apply`. What `jopt.sites` lists as not reached runs as it is.

    Raises:
        TypeError: `apply` is no function.
        ValueError: `sparsity` is missing, out of range or given beside `NM`; (when
            called) m does not divide the inputs of a site, an input is no float array,
            or no site is selected.

    >>> params = {"w": jnp.ones((4, 1))}
    >>> apply = sparsify_activations(lambda p, x: x @ p["w"], sparsity=0.5)
    >>> x = jnp.array([[1.0, -5.0, 2.0, 3.0]])
    >>> apply(params, x), jax.grad(lambda x: apply(params, x).sum())(x)
    (Array([[-2.]], dtype=float32), Array([[1., 1., 1., 1.]], dtype=float32))
    """
    if not callable(apply):
        raise TypeError(
            f"apply must be a function (params, *inputs), got {type(apply).__name__}; "
            "jopt.functional makes one of a module"
        )
    _check(sparsity, pattern)

    def run(params: Any, inputs: Any, kwargs: Any) -> Any:
        analysis = sites.analyse(apply, params, inputs, kwargs)
        chosen = _choose(analysis.table, select)
        handler = Handler(
            lambda use: use.run(x=_sparse(use, sparsity, pattern)),
            select=lambda site: site.name in chosen,
        )
        return interpret.evaluate(analysis, handler, params, inputs, kwargs, {})

    call = interpret.compiled_if_eager(run)

    def sparsified(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return call(params, inputs, kwargs)

    named = hasattr(apply, "__name__")
    return functools.wraps(apply)(sparsified) if named else sparsified


def _check(sparsity: Any, pattern: patterns.Pattern) -> None:
    if not isinstance(pattern, patterns.Unstructured | patterns.NM):
        raise ValueError(
            f"pattern must be Unstructured() or NM(n, m) for activations, got {pattern}"
        )
    is_nm = isinstance(pattern, patterns.NM)
    if is_nm and sparsity is not None:
        raise ValueError(
            f"sparsity must be None with {pattern}, which fixes it, got {sparsity}"
        )
    if not is_nm and sparsity is None:
        raise ValueError(
            f"sparsity must be given with {pattern}, got None; 0.5 keeps half"
        )
    if not is_nm:
        num_kept(1, sparsity)  # raises for what is no fraction


def _choose(table: sites.SiteTable, select: Select) -> frozenset[str]:
    """Name the sites whose input becomes sparse."""
    products = [s for s in table if s.kind in ("weight", "derived")]
    if isinstance(select, rules.Matching):
        rules.check_patterns(select.patterns, [site.name for site in products])
    found = [s for s in products if select is None or select(s.name, s)]
    chosen = frozenset(site.name for site in found if site.reachable)
    if not chosen:
        raise ValueError(
            "select must choose at least one site that multiplies a parameter, got "
            f"none of {[site.name for site in products]}"
        )
    return chosen


def _sparse(use: Use, sparsity: Any, pattern: patterns.Pattern) -> jax.Array:
    """Zero the smallest inputs of a site, passing gradients straight through."""
    x = jnp.asarray(use.x)
    name = use.site.name
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"inputs of {name!r} must be floats to be ranked, got {x.dtype}; leave it "
            "out with select="
        )
    contracted = _contracted(use.site)
    # One axis stays where it is; several are merged to one, the last.
    rest = [axis for axis in range(x.ndim) if axis not in contracted]
    order = [*rest, *contracted]
    is_single = len(contracted) == 1
    rows = x if is_single else jnp.transpose(x, order).reshape(*_sizes(x, rest), -1)
    axis = contracted[0] if is_single else len(rest)
    mask = _mask(jnp.abs(rows), axis, sparsity, pattern, name)
    if not is_single:
        unmerged = mask.reshape(*_sizes(x, rest), *_sizes(x, contracted))
        mask = jnp.transpose(unmerged, [order.index(a) for a in range(x.ndim)])
    return straight_through(jnp.where(mask, x, jnp.zeros_like(x)), x)


def _sizes(x: jax.Array, axes: list[int]) -> list[int]:
    return [x.shape[axis] for axis in axes]


def _mask(
    magnitudes: jax.Array,
    axis: int,
    sparsity: Any,
    pattern: patterns.Pattern,
    name: str,
) -> jax.Array:
    magnitudes = jax.lax.stop_gradient(magnitudes)
    if isinstance(pattern, patterns.NM):
        along = dataclasses.replace(pattern, axis=axis)
        patterns.check_pattern(along, magnitudes.shape, path=f"input of {name}")
        return patterns.make_mask(magnitudes, pattern=along)
    kept = num_kept(magnitudes.shape[axis], sparsity)
    return axis_selection.top_k_along(magnitudes, kept, axis=axis)


def _contracted(site: Site) -> list[int]:
    """List the axes of the input that are summed over, in the parameter's order."""
    side = 1 - site.operand
    match site.primitive:
        case "dot_general":
            axes, _ = site.params["dimension_numbers"]
        case "ragged_dot_general" | "ragged_dot":
            numbers = site.params["ragged_dot_dimension_numbers"]
            axes, _ = numbers.dot_dimension_numbers
        case "conv_general_dilated" if site.operand == 1:
            return [site.params["dimension_numbers"].lhs_spec[1]]
        case _:
            raise ValueError(
                f"inputs of {site.name!r} ({site.primitive}) have no row that meets "
                "the parameter; leave it out with select="
            )
    return [a for _, a in sorted(zip(axes[site.operand], axes[side], strict=True))]
