"""Scores of the params alone: magnitude, layer-wise ones, and their normalisation."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jopt.pruning.scores.score import (
    Score,
    ScoreFunction,
    ScoreInputs,
    as_float32,
    as_score,
    per_layer,
)
from jopt.trees import paths, rules


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
    the lower as the larger. It sorts the layer, which gathers a sharded one.

    Args:
        param: one layer, any shape.
        grad: not used.

    Returns:
        float32 scores in [0, 1], of the shape of the layer; NaN where w is NaN.

    References:
        Lee et al., Layer-adaptive sparsity for the magnitude-based pruning,
        arXiv:2010.07611.

    >>> import jax.numpy as jnp
    >>> lamp(jnp.array([1.0, -2.0, 2.0]))
    Array([0.11111111, 1.        , 0.5       ], dtype=float32)
    """
    energy = jnp.square(as_float32(param)).reshape(-1)
    order = jnp.argsort(-energy, stable=True)  # NaN come last
    descending = energy[order]
    shares = descending / jnp.maximum(jnp.cumsum(descending), _TINY)
    return jnp.zeros_like(energy).at[order].set(shares).reshape(param.shape)


_TINY = np.finfo(np.float32).tiny


def fpgm(axis: int = -1) -> ScoreFunction:
    """Score channels by their distance from all others: the geometric median goes.

    score of channel i = sum over j of ||w_i - w_j||,   given to all its weights

    Made for `pattern=jopt.Channel(axis)`. The distances come from a Gram matrix,
    ||w_i||^2 + ||w_j||^2 - 2 w_i w_j, of channels squared.

    Args:
        axis: of the channels.

    Returns:
        `(param, grad) -> scores` on one layer, float32.

    Raises:
        ValueError: (when called) a layer lacks the axis.

    References:
        He et al., Filter Pruning via Geometric Median for Deep Convolutional Neural
        Networks Acceleration, arXiv:1811.00250.

    >>> import jax.numpy as jnp
    >>> fpgm()(jnp.array([[0.0, 1.0, 3.0]]), None)
    Array([[4., 3., 5.]], dtype=float32)
    """

    def scores(param: jax.Array, grad: Any) -> jax.Array:
        if not -param.ndim <= axis < param.ndim:
            raise ValueError(
                f"fpgm needs an axis {axis} of channels, got shape {param.shape}; name "
                "another axis or leave the leaf out"
            )
        channels = jnp.moveaxis(as_float32(param), axis, 0)
        # Distances do not change with the mean, and cancel less without it.
        rows = channels.reshape(channels.shape[0], -1)
        rows = rows - jnp.mean(rows, axis=0, keepdims=True)
        gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.diagonal(gram)
        squared = squares[:, None] + squares[None, :] - 2 * gram
        distances = jnp.sqrt(jnp.maximum(squared, 0.0))
        total = jnp.sum(distances, axis=1)
        shape = [1] * param.ndim
        shape[axis] = -1
        return jnp.broadcast_to(total.reshape(shape), param.shape)

    return scores


def batch_norm_scale(scale_of: Mapping[str, str], *, axis: int = -1) -> Score:
    """Score a channel by the scale |gamma| of the norm that follows it.

    Made for `pattern=jopt.Channel(axis)` and `allocation.global_ranking`, as in Network
    Slimming; a penalty on the scales is the loss's.

    Args:
        scale_of: path of a kernel -> path of the scale of its norm.
        axis: of the kernel, with the channels of the scale.

    Returns:
        A score for the kernels that are named; select no others.

    Raises:
        ValueError: (when used) a path names no leaf, or shapes do not fit.

    References:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
        arXiv:1708.06519.

    >>> import jax.numpy as jnp, jopt
    >>> params = {"conv": jnp.ones((3, 2)), "norm": jnp.array([0.1, -2.0])}
    >>> slim = jopt.scores.batch_norm_scale({"conv": "norm"})
    >>> masks = jopt.make_masks(
    ...     params, scores=slim, sparsity=0.5, pattern=jopt.Channel()
    ... )
    >>> masks["conv"][0]
    Array([False,  True], dtype=bool)
    """
    if not isinstance(scale_of, Mapping):
        raise TypeError(
            "scale_of must map the path of a kernel to that of its scale, got "
            f"{type(scale_of).__name__}; for example {{'conv/kernel': 'norm/scale'}}"
        )

    def context(params: Any, inner_state: Any) -> Any:
        found, treedef = paths.flatten_with_path(params)
        leaves = dict(found)
        names = [*scale_of, *scale_of.values()]
        rules.check_patterns(map(_quoted, names), list(leaves))
        scales = [leaves.get(scale_of.get(path, "")) for path, _ in found]
        return treedef.unflatten(scales)

    def scores(inputs: ScoreInputs, state: Any) -> jax.Array:
        gamma = inputs.context
        if gamma is None:
            raise ValueError(
                "scale_of must name every kernel that is pruned, got none for a leaf "
                f"of shape {inputs.param.shape}; choose leaves with select="
            )
        return _broadcast_scale(inputs.param, gamma, inputs.stacked_axis, axis)

    return Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=scores,
        context=context,
    )


def _quoted(path: str) -> str:
    return "".join("\\" + c if c in r".^$*+?{}[]\|()" else c for c in path)


def _broadcast_scale(
    param: jax.Array, gamma: jax.Array, stacked_axis: int | None, axis: int
) -> jax.Array:
    def one_layer(param: jax.Array, gamma: jax.Array) -> jax.Array:
        if gamma.shape != (param.shape[axis],):
            raise ValueError(
                f"scale_of must name a scale of one number per channel, got shape "
                f"{gamma.shape} for a kernel of shape {param.shape} and axis {axis}"
            )
        shape = [1] * param.ndim
        shape[axis] = -1
        return jnp.broadcast_to(jnp.abs(gamma).reshape(shape), param.shape)

    if stacked_axis is None:
        return one_layer(param, gamma)
    spread = jax.vmap(one_layer, in_axes=(stacked_axis, 0), out_axes=stacked_axis)
    return spread(param, gamma)


_NORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "l2": lambda scores: jnp.sqrt(jnp.sum(jnp.square(scores))),
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
