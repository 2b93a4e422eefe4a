"""Scales fitted to the numbers of a group, instead of to its range.

Rounding to nearest takes the scale that reaches the largest number of a group, which
wastes levels where that is an outlier. A fit is a function `fit(w, spec) -> Scale`:

    by_range         scale = range / levels                      rounding to nearest
    least_error      the range shrunk to the share with the smallest  sum |w - q|^norm
    by_squared_error the same with norm 2 and few shares         the default of `gptq`
    half_quadratic   scale and zero point that lower  sum |w - q|^norm, norm < 1

Each group keeps the best that was met, the scale of rounding to nearest among them, so
by its own measure no fit is worse than that. All need the weights alone.

References:
    Frantar et al., GPTQ, arXiv:2210.17323 (least error, in its published code).
    Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models,
    https://mobiusml.github.io/hqq_blog, 2023.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays.arguments import check_function, require_count
from jopt.arrays.codes import compute_levels, scale_levels
from jopt.arrays.scales import (
    Scale,
    compute_range,
    compute_scale,
    effective_scale,
    highest_level,
    lowest_code,
    reduce_groups,
    round_scale,
    smallest_scale,
    spread_groups,
    sum_groups,
)
from jopt.arrays.specs import QuantSpec

__all__ = ["Fit", "by_range", "by_squared_error", "half_quadratic", "least_error"]

Fit = Callable[[jax.Array, QuantSpec], Scale]


def check_fit(fit: Any) -> None:
    """Raise for what cannot fit scales."""
    check_function(
        "fit", fit, "(w, spec) -> scale", "for example jopt.scale_fits.least_error()"
    )
    for maker in (least_error, half_quadratic):
        if fit is maker:
            raise TypeError(
                f"fit must be what {maker.__name__}(...) returns, got {maker.__name__} "
                f"itself; call it: fit=jopt.scale_fits.{maker.__name__}()"
            )


def fitted(fit: Fit, w: jax.Array, spec: QuantSpec) -> Scale:
    """Return the scales of a fit, or raise where it returns something else.

    Args:
        fit: of the caller.
        w: float array of any shape.
        spec: the format, and which elements make a group.

    Returns:
        The scales.

    Raises:
        TypeError: the fit returned no scale.
    """
    found: Any = fit(w, spec)
    if not isinstance(found, Scale):
        raise TypeError(
            "fit must return a scale, as jopt.scale_fits.by_range does, got "
            f"{type(found).__name__}"
        )
    return found


def by_range(w: jax.Array, spec: QuantSpec) -> Scale:
    """Take the scales that reach the ends of the ranges, those of rounding to nearest.

    Args:
        w: float array of any shape.
        spec: the format, and which elements make a group.

    Returns:
        The scales.

    >>> from jopt.arrays import formats
    >>> by_range(jnp.array([7.0, -3.0]), QuantSpec(formats.int4)).scale
    Array([1], dtype=bfloat16)
    """
    return compute_scale(*compute_range(w, spec), spec)


@functools.cache
def least_error(
    *, norm: float = 2.4, num_shares: int = 40, smallest: float = 0.2
) -> Fit:
    """Shrink each range to the share with the smallest sum of |w - q|^norm.

    Costs one rounding of the weights per share.

    Args:
        norm: 2 is the squared error; 2.4, of GPTQ's published code, holds on to large
            weights more.
        num_shares: how many are tried, evenly from 1 down.
        smallest: the last of them, in (0, 1].

    Returns:
        The fit.

    Raises:
        ValueError: a number is out of range; when called: the format has an outer scale
            for all groups of a matrix (nvfp4).

    >>> from jopt.arrays import formats
    >>> w, spec = jnp.array([2.0, 2.0, 2.0, -2.0, 3.0]), QuantSpec(formats.int2)
    >>> least_error(norm=2)(w, spec).scale
    Array([2.20312], dtype=bfloat16)
    """
    if not norm > 0:
        raise ValueError(f"norm must be above 0, got {norm}; 2 is the squared error")
    require_count("num_shares", num_shares, least=1)
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must be in (0, 1], got {smallest}")

    def fit(w: jax.Array, spec: QuantSpec) -> Scale:
        w = w.astype(jnp.float32)
        start = by_range(w, spec)
        if start.outer_scale is not None:
            raise ValueError(
                "least_error must have scales that can shrink one by one, got "
                f"{spec.format}, with an outer scale for all of a matrix; leave the "
                "fit out"
            )
        low, high = compute_range(w, spec)

        def step(best: Any, share: jax.Array) -> tuple[Any, None]:
            scale = compute_scale(low * share, high * share, spec)
            return _better(best, (_loss(w, scale, spec, norm), scale)), None

        shares = jnp.linspace(1.0, smallest, num_shares, dtype=jnp.float32)
        (_, best), _ = lax.scan(step, (_loss(w, start, spec, norm), start), shares)
        return best

    return fit


def by_squared_error(w: jax.Array, spec: QuantSpec) -> Scale:
    """Shrink each range to the share of least squared error, of few that are tried.

    As `least_error(norm=2.0, num_shares=12, smallest=0.45)`, in steps of 0.05: finer
    ones gain next to nothing, and smaller shares are best below 2 bits alone. Where one
    outer scale holds for all of a matrix (nvfp4) no group's can shrink by itself: there
    it is `by_range`.

    Args:
        w: float array of any shape.
        spec: the format, and which elements make a group.

    Returns:
        The scales.

    >>> from jopt.arrays import formats
    >>> w, spec = jnp.array([2.0, 2.0, 2.0, -2.0, 3.0]), QuantSpec(formats.int2)
    >>> by_squared_error(w, spec).scale
    Array([2.25], dtype=bfloat16)
    """
    start = by_range(w, spec)
    if start.outer_scale is not None:
        return start
    return least_error(norm=2.0, num_shares=12, smallest=0.45)(w, spec)


@functools.cache
def half_quadratic(
    *,
    norm: float = 0.7,
    num_steps: int = 20,
    beta: float = 10.0,
    kappa: float = 1.01,
) -> Fit:
    """Fit scales and zero points by HQQ: small errors for most, outliers let go.

    To lower sum |w - q|^norm with norm < 1, an error e is split off that takes up what
    is large, and the rest is a least squares problem with a closed form. In turns, with
    levels l = codes - zero_point and errors in units of the scale,

        e          = sign(d) max(|d| - |d|^(norm - 1) / beta, 0),   d = (w - q) / scale
        scale      = sum l (w - e scale) / sum l^2
        zero_point = round(mean(codes - (w - e scale) / scale))
        beta       = kappa beta

    The original keeps the scale and moves a zero point that is a float. Here zero
    points are codes, so that products of codes stay integers, and the scale moves too:
    in 2 and 3 bits the error, squared too, then falls below that of the original, and
    symmetric formats gain as well; in 4 bits it is up to 8 % above the original's, and
    in 8 bits it is that of rounding to nearest. Units of the scale make beta mean the
    same for every leaf.

    Args:
        norm: in (0, 1]: the smaller, the less outliers count.
        num_steps: of the turns; each costs one rounding of the weights.
        beta: of the first turn: errors below beta^(1 / (norm - 2)) of a level, 0.17
            by default, are no outliers.
        kappa: what beta is multiplied by after each turn.

    Returns:
        The fit.

    Raises:
        ValueError: a number is out of range; when called: the format prescribes what
            its scales may be (mxfp8, mxfp4, nvfp4).

    >>> from jopt.arrays import formats
    >>> w, spec = jnp.array([2.0, 2.0, 2.0, -2.0, 3.0]), QuantSpec(formats.int2)
    >>> half_quadratic()(w, spec).scale
    Array([2.0625], dtype=bfloat16)
    """
    if not 0 < norm <= 1:
        raise ValueError(f"norm must be in (0, 1], got {norm}; 0.7 is usual")
    require_count("num_steps", num_steps, least=1)
    if not (beta > 0 and kappa > 0):
        raise ValueError(
            f"beta and kappa must be above 0, got beta={beta}, kappa={kappa}"
        )

    def fit(w: jax.Array, spec: QuantSpec) -> Scale:
        if spec.format.scale_type is not None:
            raise ValueError(
                "half_quadratic must be free to choose scales, got "
                f"{spec.format}, whose scales are {spec.format.scale_type}; take a "
                "format without scales of its own"
            )
        w = w.astype(jnp.float32)
        start = by_range(w, spec)

        def step(i: jax.Array, carry: Any) -> Any:
            best, scale = carry
            levels = compute_levels(w, scale, spec)
            weight = beta * jnp.float32(kappa) ** i.astype(jnp.float32)
            new = _turn(w, levels, scale, spec, norm, weight)
            return _better(best, (_loss(w, new, spec, norm), new)), new

        first = (_loss(w, start, spec, norm), start), start
        (_, best), _ = lax.fori_loop(0, num_steps, step, first)
        return best

    return fit


def _turn(
    w: jax.Array,
    levels: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    norm: float,
    beta: jax.Array,
) -> Scale:
    """Split off what is large, and fit scale and zero point to the rest."""
    shape = scale.scale.shape
    step = effective_scale(scale)
    wide = spread_groups(step, w.shape)
    d = w / wide - levels
    size = jnp.abs(d)
    # |d|^(norm - 1) is infinite at 0, and 0 times it is no number.
    threshold = jnp.where(size > 0, size, 1.0) ** (norm - 1.0) / beta
    outlying = jnp.sign(d) * jnp.maximum(size - threshold, 0.0)
    rest = w - outlying * wide
    squares = sum_groups(levels * levels, shape)
    fitted = sum_groups(levels * rest, shape) / jnp.where(squares > 0, squares, 1.0)
    # Full ranges have scales of either sign.
    is_large = jnp.abs(fitted) >= smallest_scale(spec.format)
    is_same_side = (fitted > 0) == (step > 0)
    is_scale = jnp.isfinite(fitted) & is_large & is_same_side & (squares > 0)
    fitted = round_scale(jnp.where(is_scale, fitted, step), spec.scale_dtype)
    new = scale._replace(scale=fitted.astype(scale.scale.dtype))
    if scale.zero_point is None:
        return new
    zero = scale.zero_point.astype(jnp.float32)
    shift = levels - rest / spread_groups(fitted, w.shape)
    shift = reduce_groups(shift, shape, jnp.mean)
    top = highest_level(spec)
    lowest = lowest_code(spec, top)
    zero = jnp.clip(jnp.round(zero + shift), lowest, lowest + top)
    zero = jnp.where(jnp.isfinite(zero), zero, 0.0)
    return new._replace(zero_point=zero.astype(scale.zero_point.dtype))


def _loss(w: jax.Array, scale: Scale, spec: QuantSpec, norm: float) -> jax.Array:
    """Return sum |w - q|^norm of each group, in units of its largest number."""
    shape = scale.scale.shape
    largest = reduce_groups(
        jnp.abs(w), shape, lambda x, axis: jnp.max(x, axis=axis, initial=0)
    )
    unit = spread_groups(jnp.where(largest > 0, largest, 1.0), w.shape)
    values = scale_levels(compute_levels(w, scale, spec), scale, jnp.float32)
    return sum_groups((jnp.abs(w - values) / unit) ** norm, shape)


def _better(best: Any, new: Any) -> Any:
    """Choose, group by group, between pairs of loss and scales."""
    is_better = new[0] < best[0]
    return jax.tree.map(lambda a, b: jnp.where(is_better, a, b), new, best)
