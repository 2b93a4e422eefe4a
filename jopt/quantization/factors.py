"""Factors per channel: the ranges that decide them, and leaves scaled by them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.compressed import CompressedArray
from jopt.programs.matching import Link
from jopt.trees import paths


def channel_max(values: jax.Array, link: Link, size: int) -> jax.Array:
    """Return the largest magnitude of every channel.

    Args:
        values: as the leaf of the link; axes that do not tell channels apart may be of
            size 1.
        link: which channel each element has.
        size: the number of channels.

    Returns:
        float32 [size]; 0 for a channel that no element has.
    """
    gone = tuple(a for a, n in enumerate(link.channel.shape) if n == 1)
    largest = jnp.max(jnp.abs(values), axis=gone, keepdims=True).astype(jnp.float32)
    largest = jnp.broadcast_to(largest, link.channel.shape).ravel()
    # Those without a channel go to one more, which is left out.
    place = jnp.where(link.channel < 0, size, link.channel).ravel()
    return jnp.zeros(size + 1, jnp.float32).at[place].max(largest)[:size]


def scale_leaf(leaf: jax.Array, link: Link, factors: jax.Array) -> jax.Array:
    """Multiply a leaf by one factor per channel.

    Args:
        leaf: of the link.
        link: which channel each element has.
        factors: float32 [channels].

    Returns:
        The leaf, in its dtype; elements without a channel as they were.
    """
    by = jnp.where(link.channel < 0, 1.0, factors[jnp.maximum(link.channel, 0)])
    return (leaf.astype(jnp.float32) * by).astype(leaf.dtype)


def scale_leaves(
    leaves: list[Any], links: Sequence[Link], factors: jax.Array
) -> list[Any]:
    """Multiply the leaves of links; see `scale_leaf`."""
    leaves = list(leaves)
    for link in links:
        leaves[link.leaf] = scale_leaf(leaves[link.leaf], link, factors)
    return leaves


def power_of_two(factors: jax.Array) -> jax.Array:
    """Round to the nearest power of two, by which nothing is rounded."""
    return jnp.exp2(jnp.round(jnp.log2(factors)))


def require_floats(params: Any) -> None:
    """Raise if a leaf is compressed.

    Raises:
        ValueError: one is.
    """
    for path, leaf in paths.leaves_with_path(params):
        if isinstance(leaf, CompressedArray):
            raise ValueError(
                f"params must hold plain arrays, got {type(leaf).__name__} at {path!r};"
                " scale the floats, then quantize"
            )
