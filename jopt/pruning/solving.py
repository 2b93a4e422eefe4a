"""Prune matrices of one shape, and say what that costs: one program per shape."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays.patterns import Pattern
from jopt.programs.layouts import Layout
from jopt.pruning.passes import Moments, probe
from jopt.pruning.targets import Target


class Method(NamedTuple):
    """An algorithm on one matrix, by value, so that programs are shared.

    Attributes:
        name: as users call it.
        matrix: `(weights, moments, *, sparsity, pattern, ...) -> (weights, mask)`.
        moments: what it needs of the inputs.
        options: further arguments.
    """

    name: str
    matrix: Callable[..., tuple[jax.Array, jax.Array]]
    moments: Moments
    options: tuple[tuple[str, Any], ...] = ()


def check(method: Method, targets: Sequence[Target]) -> None:
    """Raise what a method has to say of its arguments, without computing anything.

    Args:
        method: with its options.
        targets: with their goals.
    """
    for columns, outputs, goal in {(*t.layout.sizes[2:], t.goal) for t in targets}:
        is_gram = method.moments == "gram"
        moments = (columns, columns) if is_gram else (columns,)
        solve_one = functools.partial(
            method.matrix,
            sparsity=goal.sparsity,
            pattern=goal.pattern,
            **dict(method.options),
        )
        shapes = [(columns, outputs), moments]
        jax.eval_shape(lambda: solve_one(*map(jnp.zeros, shapes)))  # noqa: B023


class Solved(NamedTuple):
    """What became of some matrices.

    Attributes:
        weights: `[n, columns, outputs]`, in the dtype of the leaf; None once used.
        mask: of the same shape; all True where no input but zeros came.
        reached: `[n]`, whether other inputs came.
        errors: `[n, 2]`, squared norms of what was lost of the results, and of all of
            them; NaN where no Gram matrix was kept.
    """

    weights: Any
    mask: jax.Array
    reached: jax.Array
    errors: jax.Array


@functools.partial(jax.jit, static_argnames=("method", "sparsity", "pattern"))
def solve(
    weights: jax.Array,
    moments: jax.Array,
    sparsities: jax.Array | None,
    *,
    method: Method,
    sparsity: float | None,
    pattern: Pattern,
) -> Solved:
    """Prune matrices of one shape, one after the other.

    Args:
        weights: `[n, columns, outputs]`.
        moments: Gram matrices `[n, columns, columns]`, or squares `[n, columns]`.
        sparsities: `[n]`, or None for `sparsity` everywhere.
        method: what to do.
        sparsity: of all of them.
        pattern: of the mask.

    Returns:
        The pruned matrices.
    """

    def one(each: tuple[jax.Array, jax.Array, jax.Array | None]) -> Solved:
        w, m, own = each
        squares = jnp.diagonal(m) if m.ndim == 2 else m
        wide = w.astype(jnp.float32)
        pruned, mask = method.matrix(
            wide,
            m if method.moments == "gram" else squares,
            sparsity=sparsity if own is None else own,
            pattern=pattern,
            **dict(method.options),
        )
        reached = jnp.any(squares > 0)
        mask = mask | ~reached
        # What did not change keeps every bit, in float64 too.
        is_same = ~reached | (pruned == wide)
        kept = jnp.where(is_same, w, pruned.astype(w.dtype))
        kept = jnp.where(mask, kept, jnp.zeros_like(kept))
        errors = jnp.full(2, jnp.nan)
        if m.ndim == 2:
            both = (wide - kept.astype(jnp.float32), wide)
            errors = jnp.stack([_squared_norm(each, m) for each in both])
        return Solved(kept, mask, reached, errors)

    return jax.lax.map(one, (weights, moments, sparsities))


def _squared_norm(w: jax.Array, gram: jax.Array) -> jax.Array:
    """Return tr(W^T G W) = ||X W||^2."""
    return jnp.sum(w * jnp.matmul(gram, w, precision="highest"))


@functools.partial(jax.jit, static_argnames="layout")
def read(leaf: jax.Array, layer: Any, *, layout: Layout) -> jax.Array:
    """Read all matrices of a leaf, or those of one layer.

    Args:
        leaf: weights.
        layer: None for all.
        layout: of the matrices.

    Returns:
        `[layers, batch, columns, outputs]`, without the first axis for one layer.
    """
    matrices = layout.to_matrices(leaf)
    return matrices if layer is None else matrices[layer]


@functools.partial(jax.jit, static_argnames="layout")
def write(
    matrices: jax.Array, leaf: jax.Array, layer: Any, *, layout: Layout
) -> jax.Array:
    """Put back what `read` returned.

    Args:
        matrices: all, or those of one layer.
        leaf: where to.
        layer: None for all.
        layout: of the matrices.

    Returns:
        The leaf.
    """
    if layer is not None:
        matrices = layout.to_matrices(leaf).at[layer].set(matrices)
    return layout.from_matrices(matrices, leaf)


@jax.jit
def is_met(seen: jax.Array, matrices: jax.Array) -> jax.Array:
    """Tell whether matrices are what the inputs met, up to a factor for each layer.

    Args:
        seen: `[layers, batch, columns]`, sums of `w v`.
        matrices: `[layers, batch, columns, outputs]`, what w is taken for.

    Returns:
        `[layers]`.
    """
    expected = jnp.einsum(
        "lbkn,n->lbk",
        matrices.astype(jnp.float32),
        probe(matrices.shape[-1]),
        precision="highest",
    )
    # Batch entries that nothing reached are not seen, and not pruned either.
    ran = jnp.any(seen != 0, axis=-1, keepdims=True)
    expected = jnp.where(ran, expected, 0.0)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=(1, 2))

    norm = dot(expected, expected)
    factor = dot(seen, expected) / jnp.where(norm > 0, norm, 1.0)
    rest = seen - factor[:, None, None] * expected
    return dot(rest, rest) <= 0.01 * dot(seen, seen)


def on_every_device(x: jax.Array) -> jax.Array:
    """Give every device the whole of an array, so that each computes the same."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return x
    whole = PartitionSpec()  # type: ignore[no-untyped-call]
    return jax.device_put(x, NamedSharding(sharding.mesh, whole))


def placed_as(x: jax.Array, like: Any) -> jax.Array:
    """Put an array where another one lies."""
    if getattr(like, "committed", False):
        return jax.device_put(x, like.sharding)
    return x
