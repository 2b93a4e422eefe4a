"""Scores of single weights by the params alone, and what makes layers comparable.

Magnitudes of different layers do not compare: under one threshold for all, a layer of
small weights is pruned away. LAMP makes shares of them, `normalized` divides the scores
of any criterion by a norm over the layer.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import axes
from jopt.pruning.scores.score import (
    Score,
    ScoreFunction,
    as_float32,
    as_score,
    per_layer,
)


def magnitude(param: jax.Array, grad: Any = None) -> jax.Array:
    """Score by |w|.

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks,
        arXiv:1506.02626.

    >>> import jax.numpy as jnp
    >>> magnitude(jnp.array([-2.0, 1.0]))
    Array([2., 1.], dtype=float32)
    """
    return jnp.abs(param)


def random() -> Score:
    """Score by independent uniform numbers, new ones at each mask update.

    `jopt.prune` needs a `key=`, which it folds with the leaf's path and the count:
    another layer in the model does not reshuffle this one.

    >>> random().random
    True
    """
    return Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=lambda inputs, state: jax.random.uniform(inputs.key, inputs.param.shape),
        random=True,
    )


def lamp(param: jax.Array, grad: Any = None) -> jax.Array:
    """Score by the share of a weight in the energy of those that outlive it.

    score_u = w_u^2 / sum of w_v^2 over all v of the layer with |w_v| >= |w_u|

    With `jopt.allocation.global_ranking` layers then compete on equal terms: the
    largest weight of each scores 1. Equal weights count in the order of their index,
    the lower as the larger. Within a layer the order is that of magnitude, down to
    about 1e-18 of the largest, where scores are 0 in float32.

    It sorts the layer: one that is split over devices is gathered on each for it.

    Args:
        param: one layer, any shape.
        grad: not used.

    Returns:
        float32 scores in [0, 1], of the shape of the layer; NaN where w is not finite,
        which counts for nothing.

    References:
        Lee et al., Layer-adaptive sparsity for the magnitude-based pruning,
        arXiv:2010.07611.

    >>> import jax.numpy as jnp
    >>> lamp(jnp.array([1.0, -2.0, 2.0]))
    Array([0.11111111, 1.        , 0.5       ], dtype=float32)
    """
    if param.size == 0:
        return jnp.zeros(param.shape, jnp.float32)
    is_finite = jnp.isfinite(param)
    size = jnp.where(is_finite, jnp.abs(param.astype(jnp.float32)), 0.0)
    # Relative to the largest, or squares of small weights would underflow.
    size = size / jnp.maximum(jnp.max(size), _TINY)
    flat = axes.gather_values(size).reshape(-1)
    order = jnp.argsort(-flat, stable=True)
    energy = jnp.square(flat[order])
    # A parallel sum may step back by an ulp; scores must not.
    outlived_by = jax.lax.cummax(jnp.cumsum(energy))
    shares = energy / jnp.maximum(outlived_by, _TINY)
    scores = jnp.zeros_like(flat).at[order].set(shares, unique_indices=True)
    scores = axes.lay_like(scores.reshape(param.shape), param)
    return jnp.where(is_finite, scores, jnp.nan)


_TINY = np.finfo(np.float32).tiny


def _l2(sizes: jax.Array) -> jax.Array:
    # Relative to the largest, or squares of small scores would underflow.
    largest = jnp.max(sizes)
    unit = jnp.where(largest > 0, largest, 1.0)
    return largest * jnp.sqrt(jnp.sum(jnp.square(sizes / unit)))


_NORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "l2": _l2,
    "mean": jnp.mean,
    "sum": jnp.sum,
    "max": jnp.max,
}


def normalized(
    scores: ScoreFunction | Score,
    *,
    by: Literal["l2", "mean", "sum", "max"] = "l2",
) -> Score:
    """Divide the scores of each layer by their norm, so that layers can compete.

    scores / norm(scores of the layer)

    For `jopt.allocation.global_ranking`: layers of small weights are not pruned away
    for that alone. Scores that are not finite are left out of the norm.

    Args:
        scores: the criterion, a function or a `Score`.
        by: which norm: the root of the sum of squares, the mean, the sum or the largest
            of absolute scores.

    Returns:
        The criterion; where all scores are 0 they stay 0.

    Raises:
        ValueError: `by` is no norm.

    References:
        Lee et al., JaxPruner, arXiv:2304.14082 (global pruning by normalised scores);
        Molchanov et al., arXiv:1611.06440, section 2.2 (l2 per layer).

    >>> import jax.numpy as jnp, jopt
    >>> params = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([[0.6, 0.8]])}
    >>> masks = jopt.make_masks(
    ...     params,
    ...     scores=jopt.scores.normalized(jopt.scores.magnitude),
    ...     sparsity=0.5,
    ...     allocation=jopt.allocation.global_ranking,
    ... )
    >>> masks["a"], masks["b"]
    (Array([[False,  True]], dtype=bool), Array([[False,  True]], dtype=bool))
    """
    if by not in _NORMS:
        raise ValueError(f"by must be one of {list(_NORMS)}, got {by!r}")
    score = as_score(scores)

    def divide(raw: jax.Array) -> jax.Array:
        raw = as_float32(raw)
        norm = _NORMS[by](jnp.where(jnp.isfinite(raw), jnp.abs(raw), 0.0))
        return raw / jnp.where(norm > 0, norm, 1.0)

    return score._replace(
        scores=lambda inputs, state: per_layer(
            divide, inputs.stacked_axis, score.scores(inputs, state)
        )
    )
