"""Factors per channel: the ranges that decide them, and leaves scaled by them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.compressed import CompressedArray
from jopt.programs.matching import Link
from jopt.programs.spread import placed_as
from jopt.trees import paths

Operation = Callable[[jax.Array, jax.Array], jax.Array]


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


def multiply(values: jax.Array, factors: jax.Array) -> jax.Array:
    """Multiply by float32 factors, float64 in float64 and all else in float32.

    Args:
        values: of any float dtype.
        factors: float32, of a shape that broadcasts to that of the values.

    Returns:
        The products, in the dtype of the values.
    """
    return _in_wide(jnp.multiply, values, factors)


def divide(values: jax.Array, factors: jax.Array) -> jax.Array:
    """Divide by the numbers that `multiply` multiplies by, not by rounded inverses.

    Args:
        values: of any float dtype.
        factors: float32, of a shape that broadcasts to that of the values.

    Returns:
        The quotients, in the dtype of the values.
    """
    return _in_wide(jnp.divide, values, factors)


def _in_wide(run: Operation, values: jax.Array, factors: jax.Array) -> jax.Array:
    wide = jnp.promote_types(values.dtype, jnp.float32)
    return run(values.astype(wide), factors.astype(wide)).astype(values.dtype)


def change_leaves(
    run: Operation, leaves: Sequence[Any], links: Sequence[Link], factors: jax.Array
) -> list[Any]:
    """Multiply or divide the leaves of links by one factor per channel.

    Args:
        run: `multiply` or `divide`.
        leaves: of the params.
        links: which channel each element of a leaf has.
        factors: float32 [channels].

    Returns:
        The leaves, in their dtypes; elements without a channel as they were.
    """
    leaves = list(leaves)
    for link in links:
        by = jnp.where(link.channel < 0, 1.0, factors[jnp.maximum(link.channel, 0)])
        leaves[link.leaf] = run(leaves[link.leaf], by)
    return leaves


def put_back(
    leaves: Sequence[Any], before: Sequence[Any], now: Sequence[Any]
) -> list[Any]:
    """Put what changed where the leaves lay.

    Args:
        leaves: as they were given.
        before: the same, as they were taken.
        now: with changes.

    Returns:
        The leaves; what did not change is what was given.
    """
    return [
        leaf if new is old else placed_as(new, leaf)
        for leaf, old, new in zip(leaves, before, now, strict=True)
    ]


def power_of_two(factors: jax.Array) -> jax.Array:
    """Round to the nearest power of two, by which nothing is rounded."""
    # `exp2` is off by a last bit for most integers on a CPU.
    exponents = jnp.round(jnp.log2(factors)).astype(jnp.int32)
    return jnp.ldexp(jnp.ones_like(factors), exponents)


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
