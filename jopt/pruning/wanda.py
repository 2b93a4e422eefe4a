"""Wanda on one matrix: prune by |weight| times the norm of what meets it.

    score_ij = |W_ij| ||X_i||_2,      W [inputs, outputs],  X [rows, inputs]

ranked within each output, so that every output keeps the same number of inputs; weights
that stay are not changed. Sun et al., A Simple and Effective Pruning Approach for Large
Language Models, arXiv:2306.11695.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays import axis_selection, counts, patterns


def wanda_scores(weights: jax.Array, squares: jax.Array) -> jax.Array:
    """Score by |W| times the norm of each input, in float32.

    Args:
        weights: [inputs, outputs].
        squares: [inputs]: the sum of squares of each input, `jopt.statistics.norms()`.

    Returns:
        [inputs, outputs].

    >>> wanda_scores(jnp.array([[1.0], [-2.0]]), jnp.array([9.0, 1.0]))
    Array([[3.],
           [2.]], dtype=float32)
    """
    norms = jnp.sqrt(squares.astype(jnp.float32))
    return jnp.abs(weights.astype(jnp.float32)) * norms[:, None]


def wanda_matrix(
    weights: jax.Array,
    squares: jax.Array,
    *,
    sparsity: Any = None,
    pattern: patterns.Pattern = patterns.Unstructured(),  # noqa: B008
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix by Wanda.

    Args:
        weights: [inputs, outputs].
        squares: [inputs]: the sum of squares of each input.
        sparsity: fraction of zeros of each output, a number or a traced scalar; None
            for `jopt.NM`.
        pattern: `Unstructured`: each output keeps inputs - round(sparsity * inputs) of
            its weights; `NM`: n of every m along the inputs, whatever its axis; `Block`
            and `Channel`: ranked over the matrix by mean score.

    Returns:
        The weights with exact zeros, and the mask.

    Raises:
        ValueError: `sparsity` is missing, out of range, or given beside `NM`; a shape
            does not fit the pattern.

    >>> weights = jnp.array([[1.0, 5.0], [-2.0, 1.0]])
    >>> wanda_matrix(weights, jnp.array([9.0, 1.0]), sparsity=0.5)[0]
    Array([[1., 5.],
           [0., 0.]], dtype=float32)
    """
    if isinstance(sparsity, jax.Array) or sparsity is None:
        return _prune(weights, squares, sparsity, pattern)
    return _prune_by_number(weights, squares, float(sparsity), pattern)


def prune_given_squares(
    weights: jax.Array, prepared: Any, squares: jax.Array, **goal: Any
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix as `wanda_matrix`, whatever else is known of its inputs."""
    del prepared
    return wanda_matrix(weights, squares, **goal)


@functools.partial(jax.jit, static_argnames="pattern")
def _prune(
    weights: jax.Array, squares: jax.Array, sparsity: Any, pattern: patterns.Pattern
) -> tuple[jax.Array, jax.Array]:
    scores = wanda_scores(weights, squares)
    if isinstance(pattern, patterns.Unstructured) and sparsity is not None:
        kept = num_kept(weights.shape[0], sparsity)
        mask = axis_selection.top_k_along(scores, kept, axis=0)
    else:
        along = along_inputs(pattern)
        mask = patterns.make_mask(scores, sparsity=sparsity, pattern=along)
    return jnp.where(mask, weights, jnp.zeros_like(weights)), mask


# A number is checked, an array is clipped.
_prune_by_number = jax.jit(
    _prune.__wrapped__,  # type: ignore[attr-defined]
    static_argnames=("sparsity", "pattern"),
)


def along_inputs(pattern: patterns.Pattern) -> patterns.Pattern:
    """Turn n of m to the axis of the inputs, the first of a matrix."""
    if isinstance(pattern, patterns.NM):
        return dataclasses.replace(pattern, axis=0)
    return pattern


def num_kept(size: int, sparsity: Any) -> jax.Array | int:
    """Return how many of `size`, below 2^31, a sparsity keeps."""
    pruned = counts.num_pruned(size, sparsity)
    if isinstance(pruned, int):
        return size - pruned
    kept = counts.subtract(counts.as_count(size), pruned)
    return counts.clip_to_int(kept, size).astype(jnp.int32)
