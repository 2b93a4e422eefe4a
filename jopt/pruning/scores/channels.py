"""Scores of whole channels, given to all weights of each: for `pattern=Channel(axis)`.

FPGM keeps the channels that are unlike the others; the scale of the batch norm behind a
kernel says how much of a channel gets through.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays import axes
from jopt.pruning import layers
from jopt.pruning.scores.score import (
    Score,
    ScoreFunction,
    ScoreInputs,
    as_float32,
)
from jopt.trees import paths
from jopt.updates.moments import Missing


def fpgm(*, axis: int = -1) -> ScoreFunction:
    """Score channels by their distance from all others: the geometric median goes.

    score of channel i = sum over j of ||w_i - w_j||,   given to all its weights

    The distances come from a Gram matrix of the centred channels, ||w_i||^2 + ||w_j||^2
    - 2 w_i w_j: memory for two arrays of channels squared, and distances below about
    1e-3 of the channels' own spread are rounding. If channels are split over devices,
    products of all pairs gather the layer; if their weights are, only partial sums of
    the Gram matrix travel.

    A channel of zeros scores 0 and counts for no distance, which is not in the paper:
    there a pruned channel would be far from the others, and come back in place of one.

    Args:
        axis: of the channels, in one layer.

    Returns:
        `(param, grad) -> scores` on one layer, float32; NaN for channels that are not
        finite, which count for no distance either.

    Raises:
        ValueError: (when called) a layer lacks the axis.

    References:
        He et al., Filter Pruning via Geometric Median for Deep Convolutional Neural
        Networks Acceleration, arXiv:1811.00250.

    >>> import jax.numpy as jnp
    >>> fpgm()(jnp.array([[1.0, 2.0, 4.0, 0.0]]), None)
    Array([[4., 3., 5., 0.]], dtype=float32)
    """

    def scores(param: jax.Array, grad: Any) -> jax.Array:
        _check_axis("fpgm", axis, param.shape)
        kept_axis = axis % param.ndim
        others = tuple(i for i in range(param.ndim) if i != kept_axis)
        w = as_float32(param)
        size = jnp.max(jnp.abs(w), axis=others, keepdims=True, initial=0.0)
        is_finite = jnp.isfinite(size)
        counts = is_finite & (size > 0)
        w = jnp.where(is_finite, w, 0.0)
        scale = jnp.max(jnp.where(counts, size, 0.0), initial=0.0)
        unit = jnp.where(scale > 0, scale, 1.0)
        # Distances do not change with the mean, and cancel less without it.
        number = jnp.maximum(jnp.sum(counts), 1)
        mean = jnp.sum(w / unit, axis=kept_axis, keepdims=True) / number
        gram = _gram(w / unit - mean, others)
        squares = jnp.diagonal(gram)
        squared = squares[:, None] + squares[None, :] - 2 * gram
        distances = jnp.sqrt(jnp.maximum(squared, 0.0))
        flat = axes.gather_values(counts).reshape(-1)
        total = unit * jnp.sum(jnp.where(flat, distances, 0.0), axis=1)
        total = jnp.where(flat, total, 0.0)
        finite = axes.gather_values(is_finite).reshape(-1)
        return _spread(jnp.where(finite, total, jnp.nan), param, (kept_axis,))

    return scores


def _gram(w: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
    """Multiply all pairs of channels: shape [channels, channels]."""
    sharding = axes.named_sharding(w)
    return jax.lax.dot_general(
        w,
        w,
        ((contracted, contracted), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=None if sharding is None else sharding.update(spec=()),
    )


def batch_norm_scale(scale_of: Mapping[str, str], *, axis: int = -1) -> Score:
    """Score a channel by the scale |gamma| of the norm that follows it.

    Made for `pattern=jopt.Channel(axis)` and `allocation.global_ranking`, as in Network
    Slimming; a penalty on the scales is the loss's.

    Args:
        scale_of: path of a kernel -> path of the scale of its norm.
        axis: of the channels, in one layer of the kernel. A stacked kernel's scale is
            stacked along its first axis.

    Returns:
        A score without state for the kernels that are named; select no others.

    Raises:
        TypeError: `scale_of` is no mapping.
        ValueError: (when used) a path names no leaf, a kernel that is pruned is not
            named, or a scale does not fit.

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
        for path in (*scale_of, *scale_of.values()):
            _check_path(path, list(leaves))
        return treedef.unflatten(
            [
                leaves[scale_of[path]] if path in scale_of else _missing(path)
                for path, _ in found
            ]
        )

    def scores(inputs: ScoreInputs, state: Any) -> jax.Array:
        if isinstance(inputs.context, Missing):
            raise ValueError(inputs.context.reason)
        param, gamma, stacked = inputs.param, inputs.context, inputs.stacked_axis
        shape = layers.layer_shape(param.shape, stacked)
        _check_axis("batch_norm_scale", axis, shape)
        channel = axis % len(shape)
        places: tuple[int, ...] = (channel,)
        if stacked is not None:  # as a scale stacks: along its first axis
            places = (stacked, channel + (channel >= stacked))
        fits = tuple(param.shape[i] for i in places)
        if gamma.shape != fits:
            raise ValueError(
                f"scale_of must name a scale of shape {fits}, one number per channel "
                f"of each layer, got shape {gamma.shape} for a kernel of shape "
                f"{param.shape} and axis {axis}; name another scale or another axis="
            )
        return _spread(jnp.abs(as_float32(gamma)), param, places)

    return Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=scores,
        context=context,
    )


def _check_axis(name: str, axis: int, shape: tuple[int, ...]) -> None:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{name} must have an axis of channels, got axis {axis} for shape {shape}; "
            "name another axis or leave the leaf out by select="
        )


def _spread(values: jax.Array, param: jax.Array, places: tuple[int, ...]) -> jax.Array:
    """Give every weight the value for its indices along some axes, laid out alike."""
    values = axes.gather_values(values)
    if places != tuple(sorted(places)):
        values = values.T
    shape = [n if i in places else 1 for i, n in enumerate(param.shape)]
    values = axes.lay_like(values.reshape(shape), param)
    # Zeros like the weights carry their sharding; compiled, nothing is added.
    return values + jnp.zeros_like(param, values.dtype)


def _check_path(path: str, names: list[str]) -> None:
    if path not in names:
        near = difflib.get_close_matches(path, names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"scale_of must name leaves of params by their paths, got {path!r}, which "
            f"is none of {len(names)}; near names: {', '.join(map(repr, near))}"
        )


def _missing(path: str) -> Missing:
    return Missing(
        f"scale_of must name every kernel that is pruned, got none for {path!r}; add "
        "it, or leave the leaf out by select="
    )
