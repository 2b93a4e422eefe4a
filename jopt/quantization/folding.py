"""A BatchNorm is affine once it is trained: its factors belong into the weights before.

    norm(conv(x, w) + b) = conv(x, w g) + (b - mean) g + beta,
    g = gamma / sqrt(var + epsilon)

(Jacob et al., arXiv:1712.05877, section 3.2). Quantized after folding, weights have the
range with which they act.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trees import paths


def fold_batch_norm(
    params: Any,
    batch_stats: Any,
    pairs: Mapping[str, str],
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> tuple[Any, Any]:
    """Fold BatchNorms into the layers before them.

    w' = w g,   b' = (b - mean) g + beta,   g = gamma / sqrt(var + epsilon)

    The same function runs what is returned: each norm is left with mean 0, variance
    1 - epsilon, scale 1, and the shift b' as its bias, or bias 0 where the layer has a
    bias of its own to hold it.

    Args:
        params: with leaves `layer/kernel`, perhaps `layer/bias`, and of the norm
            `norm/scale` and `norm/bias` (either may be missing, if the other is there
            or the layer has a bias).
        batch_stats: with leaves `norm/mean` and `norm/var`: Linen's collection, or the
            `rest` of `jopt.functional(module, mutable=True)`.
        pairs: path of a layer to the path of the norm that takes its output as it is.
        epsilon: of the norm.
        axis: the output axis of kernels.

    Returns:
        Params and batch statistics of the same structure.

    Raises:
        ValueError: a path names nothing, or nowhere can a shift be held.

    >>> params = {"conv": {"kernel": jnp.ones((1, 1, 1, 2))},
    ...           "norm": {"scale": jnp.array([2.0, 4.0]), "bias": jnp.zeros(2)}}
    >>> stats = {"norm": {"mean": jnp.ones(2), "var": jnp.full(2, 4.0)}}
    >>> folded, _ = fold_batch_norm(params, stats, {"conv": "norm"}, epsilon=0.0)
    >>> folded["conv"]["kernel"].ravel(), folded["norm"]["bias"]
    (Array([1., 2.], dtype=float32), Array([-1., -2.], dtype=float32))
    """
    leaves, treedef = paths.flatten_with_path(params)
    stats, stats_treedef = paths.flatten_with_path(batch_stats)
    values, moments = dict(leaves), dict(stats)
    for layer, norm in pairs.items():
        kernel = _require(values, f"{layer}/kernel")
        mean = _require(moments, f"{norm}/mean")
        var = _require(moments, f"{norm}/var")
        gain = values.get(f"{norm}/scale", jnp.ones_like(mean))
        gain = gain / jnp.sqrt(var + epsilon)
        shift = values.get(f"{norm}/bias", jnp.zeros_like(mean))
        shift = shift + (values.get(f"{layer}/bias", 0.0) - mean) * gain
        shape = [1] * kernel.ndim
        shape[axis] = gain.size
        values[f"{layer}/kernel"] = _as(kernel * gain.reshape(shape), kernel)
        moments[f"{norm}/mean"] = jnp.zeros_like(mean)
        moments[f"{norm}/var"] = jnp.full_like(var, 1.0 - epsilon)
        holders = [p for p in (f"{layer}/bias", f"{norm}/bias") if p in values]
        if not holders:
            raise ValueError(
                "pairs must name a layer or a norm with a bias, which holds the shift, "
                f"got {layer!r} and {norm!r} without one; add a bias to one of them"
            )
        for path, value in zip(holders, (shift, jnp.zeros_like(shift)), strict=False):
            values[path] = _as(value, values[path])
        if f"{norm}/scale" in values:
            values[f"{norm}/scale"] = jnp.ones_like(values[f"{norm}/scale"])
    return (
        treedef.unflatten([values[path] for path, _ in leaves]),
        stats_treedef.unflatten([moments[path] for path, _ in stats]),
    )


def _require(leaves: Mapping[str, Any], path: str) -> jax.Array:
    if path not in leaves:
        raise ValueError(
            f"pairs must name layers and norms of these trees, got none at {path!r}; "
            f"the leaves are {sorted(leaves)[:8]}"
        )
    return jnp.asarray(leaves[path])


def _as(value: jax.Array, like: Any) -> jax.Array:
    return value.astype(like.dtype)
