"""What a change of a matrix does to its products, from the Gram matrix of its inputs.

    ||X W - X W'||^2 = tr(D^T G D),    D = W - W',   G = X^T X

computed some outputs and a tile of G at a time, because all are as large as W.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_TILE = 512  # of a Gram matrix
_OUTPUTS = 256


def squared_norms(
    weights: jax.Array,
    pruned: jax.Array,
    gram: jax.Array,
    squares: jax.Array,
    *,
    units: tuple[jax.Array, jax.Array] | None = None,
    in_parts: bool = True,
) -> jax.Array:
    """Return ||X (W - W')||^2 and ||X W||^2, as tr(D^T G D).

    Half of G is enough, sum_i G_ii d_i.d_i + 2 sum_{i > j} G_ij d_i.d_j. D and the
    products are made some outputs and a tile at a time.

    Args:
        weights: W [columns, outputs].
        pruned: W', of that shape.
        gram: [columns, columns], read below the diagonal.
        squares: [columns], its diagonal.
        units: powers of two in which weights and Gram matrix are taken; 1 when None.
            The results are in units of the second and twice the first.
        in_parts: as for `sum_by_outputs`.

    Returns:
        Both, float32 [2].

    >>> gram, w = jnp.array([[2.0, 7.0], [1.0, 1.0]]), jnp.array([[1.0], [1.0]])
    >>> squared_norms(w, w.at[1].set(0.0), gram, jnp.array([2.0, 1.0]))
    Array([1., 5.], dtype=float32)
    """
    columns, outputs = weights.shape
    tiles = _Chunks(columns, _TILE)
    unit, gram_unit = (jnp.float32(1), jnp.float32(1)) if units is None else units

    def of_outputs(start: jax.Array, is_new: jax.Array) -> jax.Array:
        size = (tiles.width, is_new.shape[0])

        def both(row: jax.Array) -> list[jax.Array]:
            """W - W' and W, rows from one on."""
            w, less = (
                lax.dynamic_slice(x, (row, start), size).astype(jnp.float32) / unit
                for x in (weights, pruned)
            )
            return [jnp.where(is_new[None, :], d, 0.0) for d in (w - less, w)]

        def of_rows(i: jax.Array, found: jax.Array) -> jax.Array:
            row, is_new_row = tiles.at(i)
            rows = row + jnp.arange(tiles.width)

            def add(k: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
                column, is_new_column = tiles.at(k)
                tile = lax.dynamic_slice(gram, (row, column), (tiles.width,) * 2)
                is_below = rows[:, None] > column + jnp.arange(tiles.width)[None, :]
                is_read = is_below & is_new_column[None, :]
                tile = jnp.where(is_read, tile / gram_unit, 0.0)
                return [
                    total + jnp.matmul(tile, d, precision=lax.Precision.HIGHEST)
                    for total, d in zip(totals, both(column), strict=True)
                ]

            mine = both(row)
            totals = lax.fori_loop(0, i + 1, add, [jnp.zeros_like(d) for d in mine])
            own = lax.dynamic_slice_in_dim(squares, row, tiles.width)[:, None]
            own = own / gram_unit
            terms = [
                jnp.where(is_new_row[:, None], d * (own * d + 2 * total), 0.0).sum()
                for d, total in zip(mine, totals, strict=True)
            ]
            return found + jnp.stack(terms)

        return lax.fori_loop(0, tiles.number, of_rows, jnp.zeros(2, jnp.float32))

    return sum_by_outputs(of_outputs, outputs, in_parts=in_parts)


def sum_by_outputs(
    some: Callable[[jax.Array, jax.Array], jax.Array],
    num_outputs: int,
    *,
    in_parts: bool = True,
) -> jax.Array:
    """Add up what a function says of some outputs after others, so that little is held.

    Args:
        some: `(first output, [width] which of those from there on are to count)` to an
            array.
        num_outputs: of all.
        in_parts: False for all at once, where each device has but some of them.

    Returns:
        The sum.
    """
    chunks = _Chunks(num_outputs, _OUTPUTS if in_parts else num_outputs)
    if chunks.number == 1:
        return some(jnp.int32(0), jnp.ones(num_outputs, jnp.bool_))
    shape = jax.eval_shape(lambda: some(*chunks.at(jnp.int32(0))))
    nothing = jnp.zeros(shape.shape, shape.dtype)
    return lax.fori_loop(
        0, chunks.number, lambda i, found: found + some(*chunks.at(i)), nothing
    )


class _Chunks:
    """Parts of one width; the last overlaps the one before."""

    def __init__(self, size: int, width: int) -> None:
        self.size = size
        self.width = min(width, size)
        self.number = -(-size // self.width)

    def at(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return where a part starts, and which of its places no other had before."""
        i = jnp.asarray(i, jnp.int32)  # of one type with other starts, in x64 too
        start = jnp.minimum(i * self.width, self.size - self.width)
        places = start + jnp.arange(self.width, dtype=jnp.int32)
        return start, places >= i * self.width
