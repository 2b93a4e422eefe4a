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

from jopt.arrays.compressed import CompressedArray
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
        TypeError: a kernel is compressed.
        ValueError: a path names nothing, or there is none; a norm is named twice; its
            width is not that of the kernel; or nowhere can a shift be held.

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
    _require_pairs(pairs)
    for layer, norm in pairs.items():
        kernel = _require(values, f"{layer}/kernel")
        mean = _require(moments, f"{norm}/mean")
        var = _require(moments, f"{norm}/var")
        _require_widths(layer, norm, kernel, axis, values, moments)
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
    leaf = leaves[path]
    if isinstance(leaf, CompressedArray):
        raise TypeError(
            f"params must be float arrays to fold norms into, got {leaf!r} at {path!r};"
            " fold first, then quantize"
        )
    return jnp.asarray(leaf)


def _require_pairs(pairs: Mapping[str, str]) -> None:
    if not isinstance(pairs, Mapping) or not pairs:
        raise ValueError(
            f"pairs must map at least one layer to its norm, got {pairs!r}; for "
            "example {'conv': 'norm'}"
        )
    for norm in pairs.values():
        layers = [layer for layer, other in pairs.items() if other == norm]
        if len(layers) > 1:
            raise ValueError(
                f"pairs must name each norm once, got {norm!r} for {layers}; what is "
                "shared by layers cannot be folded into one of them"
            )


def _require_widths(
    layer: str,
    norm: str,
    kernel: jax.Array,
    axis: int,
    values: Mapping[str, Any],
    moments: Mapping[str, Any],
) -> None:
    """Raise if an output of the layer has no factor of its own."""
    if not -kernel.ndim <= axis < kernel.ndim:
        raise ValueError(
            f"axis must be one of '{layer}/kernel' of shape {kernel.shape}, got {axis}"
        )
    wanted = (kernel.shape[axis],)
    named = {f"{norm}/{name}": moments for name in ("mean", "var")}
    named |= {f"{norm}/{name}": values for name in ("scale", "bias")}
    named[f"{layer}/bias"] = values
    for path, tree in named.items():
        if path in tree and jnp.shape(tree[path]) != wanted:
            raise ValueError(
                f"axis must be the outputs that {norm!r} norms, got axis {axis} of "
                f"'{layer}/kernel' with {wanted[0]} and {path!r} of shape "
                f"{jnp.shape(tree[path])}; give the output axis of the kernel"
            )


def _as(value: jax.Array, like: Any) -> jax.Array:
    return value.astype(like.dtype)
