"""AWQ on one matrix: weights that meet large inputs get more of the grid.

An error of a weight costs what it is multiplied by. Before W [inputs, outputs] is
rounded, its inputs are scaled by

    s_i = mean|x_i|^alpha,   normalised to sqrt(max s min s) = 1,   Q = round(s W) / s

so that those with large activations are rounded more finely, relative to their size.
Alpha is the one of a grid over [0, 1) with the smallest loss ||X W - X Q||^2, which is
known exactly from the Gram matrix, tr(D^T G D) with D = W - Q. Ranges of groups may
shrink: to the least squared error of s W for each alpha, and for the best one again, by
up to a half, where that lowers the loss.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration, arXiv:2306.00978.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays.arguments import check_flags, require_count
from jopt.arrays.codes import compute_levels, scale_levels
from jopt.arrays.scale_fits import Fit, by_range, by_squared_error
from jopt.arrays.scales import Scale, compute_range, compute_scale
from jopt.arrays.specs import QuantSpec
from jopt.arrays.units import unit_of
from jopt.quantization.layer_solving import Solved

_QUIETEST = 1e-4  # of the loudest input: what is silent must not lose all its weights
_NUM_SHARES = 11  # of the range: 1, 0.95, ..., 0.5


def awq_matrix(
    weights: jax.Array,
    gram: jax.Array,
    magnitudes: jax.Array,
    spec: QuantSpec,
    *,
    num_alphas: int = 20,
    clip: bool = True,
) -> Solved:
    """Quantize one matrix by AWQ.

    Args:
        weights: [inputs, outputs].
        gram: [inputs, inputs]: X^T X over the calibration rows, at any scale.
        magnitudes: [inputs]: mean |x|, at any scale.
        spec: the format and the groups, which run along the inputs.
        num_alphas: how many of 0, 1/n, 2/n, ... are tried.
        clip: whether ranges may shrink, to lose less. Formats with an outer scale for
            the whole matrix (nvfp4) keep theirs.

    Returns:
        `values`, the scaled weights on the grid, float32; their scales
        [groups, outputs]; and s as `input_scale` [inputs]. `values / input_scale` is
        what they stand for, never worse than rounding to nearest.

    Raises:
        TypeError: `clip` is no bool.
        ValueError: shapes do not fit, or a number is out of range.

    >>> from jopt.arrays import formats
    >>> w, gram = jnp.array([[0.6], [7.0]]), jnp.diag(jnp.array([100.0, 0.01]))
    >>> found = awq_matrix(w, gram, jnp.array([10.0, 0.1]), QuantSpec(formats.int4))
    >>> error = w[:, 0] - found.values[:, 0] / found.input_scale
    >>> bool(jnp.abs(error[0]) < 0.05)  # 0.4 where it is rounded to nearest
    True
    """
    size = weights.shape[0]
    if gram.shape != (size, size) or magnitudes.shape != (size,):
        raise ValueError(
            f"gram and magnitudes must have shapes {(size, size)} and {(size,)} for "
            f"weights of shape {weights.shape}, got {gram.shape} and {magnitudes.shape}"
        )
    check(num_alphas=num_alphas, clip=clip)
    wide = weights.astype(jnp.float32)
    both = jnp.concatenate([gram, magnitudes[None]]).astype(jnp.float32)
    nearest = compute_scale(*compute_range(wide, spec), spec)
    squares = jnp.diagonal(gram)
    return scale_and_round(
        wide, both, squares, nearest, spec, num_alphas=num_alphas, clip=clip
    )


def check(*, num_alphas: int, clip: bool) -> None:
    """Raise for options that are wrong whatever the weights.

    Raises:
        TypeError: `clip` is no bool.
        ValueError: a number is out of range.
    """
    check_flags(clip=clip)
    require_count("num_alphas", num_alphas, least=1)


def scale_and_round(
    weights: jax.Array,
    prepared: jax.Array,
    squares: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    **options: Any,
) -> Solved:
    """Quantize one matrix, given its Gram matrix with the magnitudes below it.

    Args:
        weights: [inputs, outputs], float32.
        prepared: [inputs + 1, inputs].
        squares: of no account.
        scale: of rounding to nearest; whether it has an outer scale counts.
        spec: of the matrix.
        options: of `awq_matrix`.

    Returns:
        As `awq_matrix`.
    """
    del squares
    gram, magnitudes = _with_average(prepared[:-1], prepared[-1])
    count, unit = options["num_alphas"], unit_of(weights)
    may_shrink = options["clip"] and scale.outer_scale is None
    fit = by_squared_error if may_shrink else by_range

    def loss(alpha: jax.Array) -> jax.Array:
        by_input = input_scale(magnitudes, alpha)
        values, _ = _rounded(weights, by_input, spec, fit)
        return jnp.sum(_losses(weights, values, by_input, gram, unit))

    alphas = jnp.arange(count, dtype=jnp.float32) / count
    best = alphas[jnp.argmin(lax.map(loss, alphas))]
    by_input = input_scale(magnitudes, best)
    values, own = _rounded(weights, by_input, spec, fit)
    if not may_shrink:
        return Solved(values, own, by_input)
    values, own = _clipped(weights, by_input, gram, unit, values, own, spec)
    # Fitted ranges know nothing of the inputs: plain rounding may happen to lose less.
    ones = jnp.ones_like(by_input)
    simple = _rounded(weights, ones, spec, by_range)
    lost = [
        jnp.sum(_losses(weights, v, s, gram, unit))
        for v, s in ((values, by_input), (simple[0], ones))
    ]
    found = (values, own, by_input), (*simple, ones)
    chosen = jax.tree.map(lambda a, b: jnp.where(lost[0] <= lost[1], a, b), *found)
    return Solved(*chosen)


def _with_average(
    gram: jax.Array, magnitudes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Let inputs that never came count as the average of the others.

    They cost nothing on this data, so that their weights could be rounded away: those
    of an expert that was not called are needed all the same.
    """
    squares, has_come = jnp.diagonal(gram), magnitudes > 0

    def filled(x: jax.Array) -> jax.Array:
        share = x / jnp.maximum(jnp.sum(has_come), 1)  # first, or the sum may overflow
        return jnp.where(has_come, x, jnp.sum(jnp.where(has_come, share, 0.0)))

    at = jnp.arange(len(squares))
    return gram.at[at, at].set(filled(squares)), filled(magnitudes)


def input_scale(magnitudes: jax.Array, alpha: jax.Array) -> jax.Array:
    """Return s = mean|x|^alpha, normalised.

    Args:
        magnitudes: [inputs], mean |x| at any scale.
        alpha: in [0, 1]; 0 gives ones, exactly.

    Returns:
        [inputs], with sqrt(max s min s) = 1. Inputs below 1e-4 of the loudest count as
        that.
    """
    loudest = jnp.max(magnitudes)
    share = magnitudes / jnp.where(loudest > 0, loudest, 1.0)
    s = jnp.power(jnp.maximum(share, _QUIETEST), alpha)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))


def _rounded(
    weights: jax.Array, by_input: jax.Array, spec: QuantSpec, fit: Fit
) -> tuple[jax.Array, Scale]:
    scaled = weights * by_input[:, None]
    own = fit(scaled, spec)
    return scale_levels(compute_levels(scaled, own, spec), own, jnp.float32), own


def _losses(
    weights: jax.Array,
    values: jax.Array,
    by_input: jax.Array,
    gram: jax.Array,
    unit: jax.Array,
) -> jax.Array:
    """Return what each output loses, [outputs]; or each of each group, with groups.

    In a unit of the weights, whose squares are numbers there.
    """
    lost = (weights - values / by_input[:, None]) / unit
    if gram.ndim == 3:
        lost = lost.reshape(*gram.shape[:2], -1)
    seen = jnp.matmul(gram, lost, precision=lax.Precision.HIGHEST)
    return jnp.sum(lost * seen, axis=-2)


def _clipped(
    weights: jax.Array,
    by_input: jax.Array,
    gram: jax.Array,
    unit: jax.Array,
    values: jax.Array,
    own: Scale,
    spec: QuantSpec,
) -> tuple[jax.Array, Scale]:
    """Shrink ranges group by group; outputs that lose by it in all keep theirs."""
    scaled = weights * by_input[:, None]
    low, high = compute_range(scaled, spec)  # that `own` may fall short of
    width = spec.group_size or weights.shape[0]
    count = weights.shape[0] // width
    every = jnp.arange(count)
    blocks = gram.reshape(count, width, count, width)[every, :, every, :]

    def at(scale: Scale) -> jax.Array:
        return scale_levels(compute_levels(scaled, scale, spec), scale, jnp.float32)

    def step(best: Any, share: jax.Array) -> tuple[Any, None]:
        less = compute_scale(low * share, high * share, spec)
        loss = _losses(weights, at(less), by_input, blocks, unit)
        is_better = loss < best[0]
        return jax.tree.map(
            lambda a, b: jnp.where(is_better, a, b), (loss, less), best
        ), None

    first = _losses(weights, values, by_input, blocks, unit), own
    shares = 1.0 - jnp.arange(_NUM_SHARES, dtype=jnp.float32) / 20
    (_, less), _ = lax.scan(step, first, shares)
    new = at(less), less
    losses = [_losses(weights, v, by_input, gram, unit) for v in (new[0], values)]
    is_better = losses[0] < losses[1]

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(is_better, new, old)

    chosen: tuple[jax.Array, Scale] = jax.tree.map(choose, new, (values, own))
    return chosen
