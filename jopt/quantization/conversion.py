"""Float trees to quantized trees: round to nearest, one array or many."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.codes import check_array
from jopt.arrays.quantized import quantize_array
from jopt.arrays.ranges import Range, scale_of
from jopt.arrays.scale_fits import Fit, check_fit, fitted
from jopt.arrays.specs import QuantSpec
from jopt.programs.sites import SiteTable
from jopt.quantization.specs import SpecOrRules, known_specs, resolve_specs
from jopt.trees import paths, rules
from jopt.trees.calibration import Calibration
from jopt.updates.states import is_masked_node

_fitted = jax.jit(fitted, static_argnums=(0, 2))


def quantize(
    tree: Any,
    spec_or_rules: SpecOrRules | Calibration,
    *,
    sites: SiteTable | None = None,
    scales: Any = None,
    fit: Fit | None = None,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
) -> Any:
    """Round an array, or the selected leaves of a tree, to quantized arrays.

    codes = clip(round(w / scale) + zero_point),   w ~ (codes - zero_point) * scale

    Args:
        tree: a float array, which is always quantized, or any tree.
        spec_or_rules: a `jopt.QuantSpec`, or for a tree ordered rules
            `{pattern: spec or None}`, or a `jopt.Calibration`, which carries its specs
            and, where they were learned, the ranges of weights. Symmetric integers
            have the grid of training; `narrow_range=False` gives them all codes.
        sites: what `jopt.sites(apply, params, *inputs)` returned: leaves that multiply
            or are looked up are quantized, and the roles of their axes say where a spec
            with `axis=None` keeps scales (outputs, layers, rows of a table) and along
            what groups run (inputs).
        scales: what `jopt.get_scales(state)` returned, to use trained scales; computed
            from the weights when None.
        fit: how to compute scales from the weights: a function `(w, spec) -> Scale`,
            such as those of `jopt.scale_fits`; None for those that reach the ends of
            their ranges.
        select: which leaves of a tree are quantized; None for float leaves with at
            least two axes, stacked ones not counted.
        stacked_axes: which axis stacks layers: an int or rules `{pattern: axis}`; each
            layer keeps scales of its own.

    Returns:
        A `QuantizedArray`, or the tree with `QuantizedArray` in place of quantized
        leaves.

    Raises:
        TypeError: `spec_or_rules` or `fit` is none, or a leaf is no float array.
        ValueError: a rule matches nothing, a spec or scale does not fit its leaf, or
            both `scales` and `fit` are given.

    >>> import jax.numpy as jnp, jopt
    >>> q = jopt.quantize(
    ...     jnp.ones((64, 8)), jopt.QuantSpec(jopt.formats.int4, group_size=32)
    ... )
    >>> q.nbytes * 8 / q.size
    4.5
    """
    return convert(
        tree,
        spec_or_rules,
        sites=sites,
        scales=scales,
        fit=fit,
        select=select,
        stacked_axes=stacked_axes,
    )


def convert(
    tree: Any,
    spec_or_rules: SpecOrRules | Calibration,
    *,
    sites: SiteTable | None,
    scales: Any,
    fit: Fit | None,
    select: rules.Select,
    stacked_axes: rules.StackedAxes,
    decide: Callable[[jax.Array, QuantSpec], QuantSpec] | None = None,
) -> Any:
    """Quantize, with a last word on each leaf's spec; see `quantize`."""
    if fit is not None and scales is not None:
        raise ValueError(
            "fit must be None where scales are given, got both; leave one out"
        )
    if fit is not None:
        check_fit(fit)
    if hasattr(tree, "dtype") and hasattr(tree, "shape"):
        if not isinstance(spec_or_rules, QuantSpec):
            raise TypeError(
                "spec_or_rules must be a jopt.QuantSpec for a bare array, "
                f"got {spec_or_rules!r}"
            )
        spec = spec_or_rules
        if fit is not None:
            w = check_array(tree, spec, "w")
            spec = spec if decide is None else decide(w, spec)
            scales = _fitted(fit, w, spec)
        return quantize_array(tree, spec, scale=scales)
    ranges: dict[str, Range] = {}
    if isinstance(spec_or_rules, Calibration):
        ranges = spec_or_rules.weights
        spec_or_rules = known_specs(spec_or_rules, tree)
        select = select or (lambda path, leaf: _is_dense_float(leaf))
    specs = resolve_specs(
        spec_or_rules, tree, select=select, stacked_axes=stacked_axes, sites=sites
    )
    treedef: Any
    grids, treedef = jax.tree.flatten(specs, is_leaf=is_masked_node)
    leaves = treedef.flatten_up_to(tree)
    names = paths.leaf_paths(tree)
    given = [None] * len(leaves) if scales is None else treedef.flatten_up_to(scales)
    arrays = []
    for path, leaf, spec, scale in zip(names, leaves, grids, given, strict=True):
        if is_masked_node(spec):
            arrays.append(leaf)
            continue
        if path in ranges:
            scale = scale_of(ranges[path], spec, leaf.ndim)
        elif fit is not None:
            w = check_array(leaf, spec, path)
            spec = spec if decide is None else decide(w, spec)
            scale = _fitted(fit, w, spec)
        scale = None if is_masked_node(scale) else scale
        arrays.append(quantize_array(leaf, spec, scale=scale, path=path))
    return treedef.unflatten(arrays)


def _is_dense_float(leaf: Any) -> bool:
    is_dense = hasattr(leaf, "dtype") and not paths.is_whole_leaf(leaf)
    return is_dense and bool(jnp.issubdtype(leaf.dtype, jnp.floating))
