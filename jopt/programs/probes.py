"""What a site multiplies by, told by a few numbers: seen = w v, v of our own.

A pass over the batches keeps them beside the moments, so whoever takes a part of a leaf
for w can tell whether that is what the inputs met.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jopt.arrays.axes import named_sharding
from jopt.arrays.units import unit_of
from jopt.programs.handlers import Use, to_array
from jopt.programs.weights import parts, shared_batch, weight_matrix


def probe(num_outputs: int) -> jax.Array:
    """Make numbers for `seen = w v` that no two outputs share."""
    place = jnp.arange(num_outputs, dtype=jnp.float32)
    return jnp.cos(1.0 + place * 2.3) + 0.1 * jnp.sin(0.7 * place)


def seen_at(use: Use) -> tuple[jax.Array, ...]:
    """Return w v for each part of what a site multiplies by.

    Args:
        use: of the site.

    Returns:
        `[batch, columns]` each.
    """
    site = use.site
    operand = jnp.asarray(to_array(use.weight))
    seen = []
    for part in parts(site):
        w = weight_matrix(site, part.of(operand)).astype(jnp.float32)
        each = everywhere(_probed, w)
        seen.append(shared_batch(site, each, part.view))
    return tuple(seen)


def _probed(w: jax.Array) -> jax.Array:
    return jnp.einsum("bkn,n->bk", w, probe(w.shape[-1]), precision="highest")


def everywhere(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Compute a value that every device of an explicit mesh is to have."""
    shardings = [s for s in map(named_sharding, arrays) if s is not None]
    if not shardings:
        return function(*arrays)
    whole = shardings[0].update(spec=())
    return jnp.asarray(jax.sharding.auto_axes(function, out_sharding=whole)(*arrays))


def is_met(seen: jax.Array, matrices: jax.Array) -> jax.Array:
    """Tell whether matrices are what the inputs met, up to one factor.

    Args:
        seen: `[batch, columns]`, sums of `w v`.
        matrices: `[batch, columns, outputs]`, what w is taken for.

    Returns:
        Whether they are.
    """
    expected = jnp.einsum(
        "bkn,n->bk",
        matrices.astype(jnp.float32),
        probe(matrices.shape[-1]),
        precision="highest",
    )
    # Up to a factor: squares of numbers of any magnitude are to be numbers too.
    expected, seen = expected / unit_of(expected), seen / unit_of(seen)
    # Batch entries that nothing reached are not seen, and not pruned either.
    ran = jnp.any(seen != 0, axis=-1, keepdims=True)
    expected = jnp.where(ran, expected, 0.0)
    norm = jnp.sum(expected * expected)
    factor = jnp.sum(seen * expected) / jnp.where(norm > 0, norm, 1.0)
    rest = seen - factor * expected
    return jnp.sum(rest * rest) <= 0.01 * jnp.sum(seen * seen)
