"""GPTQ on one matrix: round, and let the weights that follow make up for it.

With the Gram matrix of the inputs H = X^T X + damping, and W [inputs, outputs], inputs
are taken one after another. Rounding input i leaves an error, which the inputs that
follow take up as well as they can:

    q_i = round(w_i),   e = (w_i - q_i) / R_ii,   W_j -= R_ij e for j > i,
    R^T R = H^-1, R upper

so Q ends near the minimum of ||X W - X Q||^2 over the grid: see `jopt.arrays.sweeps`.
The scales of a group are those of its weights as they are when its first input is
reached, or, static, as they are before anything is rounded: what a group takes up from
those before widens its range, which costs more than it gains where bits are few and
scales reach the largest weights (`jopt.scale_fits.by_range`). In activation order
inputs with the largest diagonal of H come first, and scales are static, so that groups
stay what they are in memory.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers, arXiv:2210.17323.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.arguments import check_flags, check_strength, require_count
from jopt.arrays.codes import compute_levels, scale_levels
from jopt.arrays.factors import inverse_factor
from jopt.arrays.scale_fits import (
    Fit,
    by_range,
    by_squared_error,
    check_fit,
    fitted,
)
from jopt.arrays.scales import Scale
from jopt.arrays.specs import QuantSpec
from jopt.arrays.sweeps import sweep
from jopt.quantization.layer_solving import Solved

_ROWS = 128  # planned together where scales are known beforehand


def gptq_matrix(
    weights: jax.Array,
    gram: jax.Array,
    spec: QuantSpec,
    *,
    activation_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
    fit: Fit = by_squared_error,
) -> tuple[jax.Array, Scale]:
    """Quantize one matrix by GPTQ.

    Args:
        weights: [inputs, outputs].
        gram: [inputs, inputs]: X^T X over the calibration rows, at any scale.
        spec: the format and the groups, which run along the inputs.
        activation_order: whether inputs with the largest diagonal come first.
        static_groups: whether scales are those before anything is rounded.
        block_size: inputs whose errors are passed on together; the result does not
            depend on it but for rounding.
        damping: added to the diagonal of H, as a fraction of its mean.
        fit: how scales follow from weights, see `jopt.arrays.scale_fits`.

    Returns:
        The weights on the grid, float32, and their scales [groups, outputs]. All NaN if
        H is not positive definite: see `inverse_factor`.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: shapes do not fit, or a number is out of range.

    >>> from jopt.arrays import formats
    >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> spec = QuantSpec(formats.int4)
    >>> values, scale = gptq_matrix(jnp.array([[7.0], [2.4]]), gram, spec)
    >>> values[:, 0], scale.scale[0]
    (Array([7., 2.], dtype=float32), Array([1], dtype=bfloat16))
    """
    if gram.shape != (weights.shape[0],) * 2:
        raise ValueError(
            f"gram must have shape {(weights.shape[0],) * 2} for weights of shape "
            f"{weights.shape}, got {gram.shape}"
        )
    wide = weights.astype(jnp.float32)
    options: dict[str, Any] = {
        "activation_order": activation_order,
        "static_groups": static_groups,
        "block_size": block_size,
        "damping": damping,
        "fit": fit,
    }
    check(**options)
    found = round_prepared(
        wide,
        prepare(gram, **options),
        jnp.diagonal(gram),
        fit(wide, spec),
        spec,
        **options,
    )
    return found.values, found.scale


def check(
    *,
    activation_order: bool,
    static_groups: bool,
    block_size: int,
    damping: float,
    fit: Fit,
) -> None:
    """Raise for options that are wrong whatever the weights.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: a number is out of range.
    """
    check_flags(activation_order=activation_order, static_groups=static_groups)
    require_count("block_size", block_size, least=1)
    check_strength("damping", damping, "0.01 is usual")
    check_fit(fit)


@functools.lru_cache(maxsize=64)
def before_its_turn(fit: Fit) -> Fit:
    """Return the fit of a leaf whose groups find their scales when they are reached.

    What a leaf has before that is for layers that nothing reaches, and need not be
    searched: on a large leaf that takes as long as half of the rounding.

    Args:
        fit: of the groups.

    Returns:
        A fit, the same for the same one: `by_range` where groups have scales of their
        own, and `fit` where there are none, or an outer scale.
    """

    def first(w: jax.Array, spec: QuantSpec) -> Scale:
        whole = by_range(w, spec)
        is_later = spec.group_size is not None and whole.outer_scale is None
        return whole if is_later else fit(w, spec)

    return first


def input_order(squares: jax.Array, **options: Any) -> jax.Array:
    """Return the inputs in activation order.

    Args:
        squares: [inputs], the diagonal of the Gram matrix.
        options: of `gptq_matrix`.

    Returns:
        [inputs]: those of equal squares as they stand.
    """
    del options
    return jnp.argsort(-squares, stable=True)


def prepare(gram: jax.Array, **options: Any) -> jax.Array:
    """Put R into a Gram matrix in the order of rounding, see `inverse_factor`.

    Args:
        gram: [inputs, inputs].
        options: of `gptq_matrix`.

    Returns:
        [inputs, inputs], float32.
    """
    if options["activation_order"]:
        order = input_order(jnp.diagonal(gram))
        gram = gram[order][:, order]
    return inverse_factor(gram, options["damping"])


def round_prepared(
    weights: jax.Array,
    prepared: jax.Array,
    squares: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    **options: Any,
) -> Solved:
    """Quantize one matrix, given what `prepare` returned.

    Args:
        weights: [inputs, outputs], float32.
        prepared: [inputs, inputs].
        squares: [inputs], the diagonal of the Gram matrix.
        scale: of rounding to nearest, fields [groups, outputs].
        spec: of the matrix.
        options: of `gptq_matrix`.

    Returns:
        The weights on the grid, and their scales.
    """
    size, block = weights.shape[0], options["block_size"]
    width = spec.group_size or size
    if options["activation_order"]:
        order = input_order(squares)
        group = order // width
        values = _with_scales(weights[order], prepared, scale, group, spec, block)
        values = jnp.zeros_like(values).at[order].set(values)
    elif (
        options["static_groups"]
        or spec.group_size is None
        or scale.outer_scale is not None  # one of all groups: not to be had one by one
    ):
        group = jnp.arange(size) // width
        values = _with_scales(weights, prepared, scale, group, spec, block)
    else:
        values, scale = _with_groups(weights, prepared, spec, block, options["fit"])
    # Whatever of R is not a number, its first is not one either.
    values = jnp.where(jnp.isfinite(prepared[0, 0]), values, jnp.nan)
    return Solved(values, scale)


def _with_scales(
    weights: jax.Array,
    prepared: jax.Array,
    scale: Scale,
    group: jax.Array,
    spec: QuantSpec,
    block: int,
) -> jax.Array:
    """Round with scales that are known beforehand, the group of each input given."""
    unit = min(_ROWS, block, weights.shape[0])

    def plan(rows: jax.Array, diagonal: jax.Array, start: jax.Array) -> jax.Array:
        return start

    def decide(w: jax.Array, start: jax.Array, i: jax.Array) -> jax.Array:
        at = jnp.minimum(start + i, group.shape[0] - 1)
        own = jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else x[group[at]], scale)
        return _round_row(w, own, spec)

    values, _ = sweep(weights, prepared, plan, decide, unit=unit, block=block)
    return values


def _with_groups(
    weights: jax.Array, prepared: jax.Array, spec: QuantSpec, block: int, fit: Fit
) -> tuple[jax.Array, Scale]:
    """Round with the scales that groups have when they are reached."""

    def plan(rows: jax.Array, diagonal: jax.Array, start: jax.Array) -> Scale:
        return jax.tree.map(lambda x: x[0], fitted(fit, rows, spec))

    def decide(w: jax.Array, own: Scale, i: jax.Array) -> jax.Array:
        return _round_row(w, own, spec)

    unit = spec.group_size or weights.shape[0]
    values, scale = sweep(weights, prepared, plan, decide, unit=unit, block=block)
    return values, jax.tree.map(lambda x: x[: weights.shape[0] // unit], scale)


def _round_row(w: jax.Array, scale: Scale, spec: QuantSpec) -> jax.Array:
    """Round the weights of one input, [outputs], with scales of that shape."""
    return scale_levels(compute_levels(w, scale, spec), scale, jnp.float32)
