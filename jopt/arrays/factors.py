"""The Cholesky factor of an inverse, found in the place of the matrix, tile by tile.

H^-1 = R^T R with R upper triangular: R = U^-1 where H = U U^T, U upper. In tiles of at
most 512, from the last to the first,

    U_ii U_ii^T = H_ii - sum_{k > i} U_ik U_ik^T
    U_ji = (H_ji - sum_{k > i} U_jk U_ik^T) U_ii^-T                        for j < i

and, rows from the last to the first, columns from the last to the first,

    U_ii R_ij = [i = j] - sum_{i < k <= j} U_ik R_kj.

Neither reads below the diagonal, nor writes there: what is symmetric stays there, and
the whole takes the room of some tiles. All sums are products of tiles, n^3 / 6
multiplications for each of the two.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays.units import unit_of

_TILE = 512
_EXACT = lax.Precision.HIGHEST


@jax.jit
def inverse_factor(gram: jax.Array, damping: float) -> jax.Array:
    """Return R, upper triangular with R^T R = H^-1, and the Gram matrix below it.

    H is the Gram matrix with `damping` times the mean of its diagonal added to that. An
    input that never was anything but 0 has no part in any other, and gets a diagonal
    of 1. Where H is not positive definite there is NaN, R_00 for certain: raise
    `damping`, or bring more calibration rows.

    Args:
        gram: [inputs, inputs], symmetric.
        damping: at least 0.

    Returns:
        [inputs, inputs], float32.

    >>> inverse_factor(jnp.array([[4.0, 0.0], [0.0, 1.0]]), 0.0)
    Array([[0.5, 0. ],
           [0. , 1. ]], dtype=float32)
    """
    size = gram.shape[0]
    num_tiles = -(-size // _TILE)
    tile = -(-size // num_tiles)
    diagonal = jnp.diagonal(gram).astype(jnp.float32)
    unit = unit_of(diagonal)  # in which the sum is a number, and no digit changes
    mean = jnp.mean(diagonal / unit) * unit
    diagonal = jnp.where(diagonal == 0, 1.0, diagonal + damping * mean)
    at = jnp.arange(size)
    h = gram.astype(jnp.float32).at[at, at].set(diagonal)
    past = num_tiles * tile - size
    if past:  # with inputs that have no part in any other
        h = jnp.pad(h, (0, past))
        at = size + jnp.arange(past)
        h = h.at[at, at].set(1.0)
    return _invert(_factor(h, tile, num_tiles), tile, num_tiles)[:size, :size]


def _factor(h: jax.Array, tile: int, num_tiles: int) -> jax.Array:
    """Put U where H is, with U U^T = H."""

    def rest_of(h: jax.Array, j: Any, i: Any) -> jax.Array:
        def subtract(k: Any, rest: jax.Array) -> jax.Array:
            return rest - _dot(_tile(h, j, k, tile), _tile(h, i, k, tile).T)

        return lax.fori_loop(i + 1, num_tiles, subtract, _tile(h, j, i, tile))

    def column(step: Any, h: jax.Array) -> jax.Array:
        i = num_tiles - 1 - step
        rest = rest_of(h, i, i)
        # From the last to the first: lower is upper when all is reversed.
        lower = lax.linalg.cholesky(rest[::-1, ::-1].T, symmetrize_input=False)
        upper = lower[::-1, ::-1]

        def above(j: Any, h: jax.Array) -> jax.Array:
            found = lax.linalg.triangular_solve(
                upper, rest_of(h, j, i), transpose_a=True
            )
            return _put(h, found, j, i)

        return lax.fori_loop(0, i, above, _put_upper(h, upper, i))

    return lax.fori_loop(0, num_tiles, column, h)


def _invert(u: jax.Array, tile: int, num_tiles: int) -> jax.Array:
    """Put R where U is, with U R = I."""

    def row(step: Any, r: jax.Array) -> jax.Array:
        i = num_tiles - 1 - step
        diagonal = jnp.triu(_tile(r, i, i, tile))

        def solve(rest: jax.Array) -> jax.Array:
            return lax.linalg.triangular_solve(diagonal, rest, left_side=True)

        def right(step: Any, r: jax.Array) -> jax.Array:
            j = num_tiles - 1 - step

            def subtract(k: Any, rest: jax.Array) -> jax.Array:
                other = _tile(r, k, j, tile)
                other = jnp.where(k == j, jnp.triu(other), other)
                return rest - _dot(_tile(r, i, k, tile), other)

            nothing = jnp.zeros((tile, tile), jnp.float32)
            rest = lax.fori_loop(i + 1, j + 1, subtract, nothing)
            return _put(r, solve(rest), i, j)

        r = lax.fori_loop(0, num_tiles - 1 - i, right, r)
        return _put_upper(r, solve(jnp.eye(tile, dtype=jnp.float32)), i)

    return lax.fori_loop(0, num_tiles, row, u)


def _tile(x: jax.Array, i: Any, j: Any, tile: int) -> jax.Array:
    return lax.dynamic_slice(x, (i * tile, j * tile), (tile, tile))


def _put(x: jax.Array, value: jax.Array, i: Any, j: Any) -> jax.Array:
    tile = value.shape[0]
    return lax.dynamic_update_slice(x, value, (i * tile, j * tile))


def _put_upper(x: jax.Array, value: jax.Array, i: Any) -> jax.Array:
    """Put a triangle on the diagonal; what is below it stays."""
    at = jnp.arange(value.shape[0])
    is_upper = at[:, None] <= at[None, :]
    return _put(x, jnp.where(is_upper, value, _tile(x, i, i, value.shape[0])), i, i)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_EXACT)
