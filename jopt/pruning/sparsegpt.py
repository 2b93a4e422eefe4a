"""SparseGPT on one matrix: prune, and let the weights that stay make up for it.

With the Gram matrix of the inputs H = X^T X + damping, and W [inputs, outputs], inputs
are taken one after another. What is pruned of input i leaves an error, which the inputs
that follow take up as well as they can:

    e = (w_i - q_i) / R_ii,    W_j -= R_ij e  for j >= i,      R^T R = H^-1, R upper

so W ends near the minimum of ||X W - X W'||^2 over the weights that stay: see `sweeps`.
R is found where the Gram matrix is, with no room for another: see `inverse_factor`.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot, arXiv:2301.00774.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays import patterns, selection
from jopt.arrays.arguments import check_strength, require_count
from jopt.arrays.factors import inverse_factor
from jopt.arrays.sweeps import sweep
from jopt.arrays.units import unit_of
from jopt.pruning.wanda import along_inputs, num_kept


def sparsegpt_matrix(
    weights: jax.Array,
    gram: jax.Array,
    *,
    sparsity: Any = None,
    pattern: patterns.Pattern = patterns.Unstructured(),  # noqa: B008
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix by SparseGPT.

    Args:
        weights: [inputs, outputs].
        gram: [inputs, inputs]: X^T X over the calibration rows, at any scale.
        sparsity: fraction of zeros, a number or a traced scalar; None for `jopt.NM`.
            The smallest w^2 / R_ii^2 of each block go; the count is exact over the
            blocks so far, and so over the matrix.
        pattern: `Unstructured`, or `NM` along the inputs, whatever its axis: the mask
            of m inputs is chosen when they are reached.
        block_size: inputs whose mask is chosen together; raised to a multiple of m.
        damping: added to the diagonal of H, as a fraction of its mean.

    Returns:
        The weights, those that stay updated and exact zeros elsewhere, in their dtype;
        and the mask. All NaN if H is not positive definite: see `inverse_factor`.

    Raises:
        ValueError: shapes do not fit, a number is out of range, or another pattern.

    >>> gram = jnp.array([[2.0, 1.0], [1.0, 1.0]])
    >>> weights = jnp.array([[0.1], [1.0]])
    >>> found, mask = sparsegpt_matrix(weights, gram, sparsity=0.5, damping=0.0)
    >>> found.round(3), mask[:, 0]  # 1 + 0.1 * gram_01 / gram_11
    (Array([[0. ],
           [1.1]], dtype=float32), Array([False,  True], dtype=bool))
    """
    if gram.shape != (weights.shape[0],) * 2:
        raise ValueError(
            f"gram must have shape {(weights.shape[0],) * 2} for weights of shape "
            f"{weights.shape}, got {gram.shape}"
        )
    check_matrix(weights.shape, sparsity, pattern, block_size, damping)
    return prune_prepared(
        weights,
        prepare(gram, damping=damping),
        jnp.diagonal(gram),
        sparsity=sparsity,
        pattern=pattern,
        block_size=block_size,
        damping=damping,
    )


def prepare(gram: jax.Array, *, block_size: int = 128, damping: float) -> jax.Array:
    """Put R into a Gram matrix, which stays below the diagonal: see `inverse_factor`.

    Args:
        gram: [inputs, inputs].
        block_size: of no account here.
        damping: as for `sparsegpt_matrix`.

    Returns:
        [inputs, inputs], float32.
    """
    del block_size
    return inverse_factor(gram, damping)


def prune_prepared(
    weights: jax.Array,
    prepared: jax.Array,
    squares: jax.Array,
    *,
    sparsity: Any,
    pattern: patterns.Pattern,
    block_size: int,
    damping: float,
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix, given what `prepare` returned.

    Args:
        weights: [inputs, outputs].
        prepared: [inputs, inputs].
        squares: [inputs], the diagonal of the Gram matrix. An input that is always 0
            loses its weights first.
        sparsity: as for `sparsegpt_matrix`.
        pattern: as for `sparsegpt_matrix`.
        block_size: as for `sparsegpt_matrix`.
        damping: that `prepare` was given.

    Returns:
        As `sparsegpt_matrix`.
    """
    check_matrix(weights.shape, sparsity, pattern, block_size, damping)
    size, num_outputs = weights.shape
    if isinstance(pattern, patterns.NM):
        unit, kept = pattern.m, None
    else:
        unit = min(block_size, size)
        ends = [min(i + unit, size) for i in range(0, size, unit)]
        upto = [num_kept(end * num_outputs, sparsity) for end in ends]
        kept = jnp.diff(jnp.stack([jnp.int32(0), *map(jnp.int32, upto)]))
    return _prune(weights, prepared, squares == 0, kept, pattern, unit, block_size)


def check_matrix(
    shape: tuple[int, ...],
    sparsity: Any,
    pattern: patterns.Pattern,
    block_size: int,
    damping: float,
    *,
    path: str = "weights",
) -> None:
    """Raise for arguments that are wrong whatever the values."""
    if not isinstance(pattern, patterns.Unstructured | patterns.NM):
        raise ValueError(
            f"pattern must be Unstructured() or NM(n, m) for SparseGPT, got {pattern}; "
            "jopt.wanda takes all patterns"
        )
    patterns.check_pattern(along_inputs(pattern), shape, path=path)
    is_nm = isinstance(pattern, patterns.NM)
    if is_nm and sparsity is not None:
        raise ValueError(f"sparsity must be None with {pattern}, got {sparsity}")
    if not is_nm and sparsity is None:
        raise ValueError(f"sparsity must be given with {pattern}, got None")
    check_options(block_size, damping)


def check_options(block_size: int, damping: float) -> None:
    """Raise for numbers that are wrong for every matrix."""
    require_count("block_size", block_size, least=1)
    check_strength("damping", damping, "0.01 is usual")


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _prune(
    weights: jax.Array,
    factor: jax.Array,
    dead: jax.Array,
    kept: jax.Array | None,
    pattern: patterns.Pattern,
    unit: int,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Choose the mask of each unit when it is reached; the last may pass the end."""
    size, num_outputs = weights.shape

    def plan(rows: jax.Array, diagonal: jax.Array, start: jax.Array) -> jax.Array:
        scores = jnp.square(rows / diagonal[:, None] / unit_of(rows))
        if kept is None:
            return patterns.make_mask(scores, pattern=along_inputs(pattern))
        is_real = start + jnp.arange(unit) < size
        scores = jnp.where(is_real[:, None], scores, jnp.nan)
        return selection.top_k_mask(scores, kept[start // unit])

    def decide(w: jax.Array, mask: jax.Array, i: jax.Array) -> jax.Array:
        keep = lax.dynamic_index_in_dim(mask, i, keepdims=False)
        return jnp.where(keep, w, 0.0)

    start = jnp.where(dead[:, None], 0.0, weights.astype(jnp.float32))
    found, masks = sweep(start, factor, plan, decide, unit=unit, block=block)
    # Whatever of R is not a number, its first is not one either.
    found = jnp.where(jnp.isfinite(factor[0, 0]), found, jnp.nan)
    return found.astype(weights.dtype), masks.reshape(-1, num_outputs)[:size]
