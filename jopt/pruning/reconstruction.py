"""How well pruned layers still do what the dense ones did, on real inputs.

    error = ||X W - X W'||^2 / ||X W||^2 = tr(D^T G D) / tr(W^T G W),
    D = W - W',   G = X^T X

is measured where SparseGPT and Wanda choose what to prune: with the inputs that the
layer met in the calibration batches.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.table
import rich.text
from jax import lax

from jopt.trees import report


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One pruned layer.

    Attributes:
        name: of the site, and `[layer]` where its leaf stacks layers.
        path: of the leaf.
        layer: which of the leaf's layers, None where there is one.
        shape: `(columns, outputs)` of its matrix, with the number of them in front
            where there are several, as of experts or groups.
        sparsity: fraction of zeros in its mask.
        error: relative error of what it computes, squared; 0 is none, 1 is all. None
            where it was not measured.
    """

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    sparsity: float
    error: float | None


@dataclasses.dataclass(frozen=True)
class OneShotReport:
    """What one-shot pruning did to every layer, and what it left alone.

    Iterate over it for the rows, index it by the name of a row, print it for a table.

    Attributes:
        rows: of the pruned layers, in the order of the program.
        left_alone: path, or name of a layer, to why it was not pruned.
    """

    rows: tuple[LayerRow, ...]
    left_alone: Mapping[str, str]

    @property
    def worst(self) -> tuple[LayerRow, ...]:
        """The rows, the largest error first; none of them without errors."""
        measured = [(row.error, row) for row in self.rows if row.error is not None]
        return tuple(row for _, row in sorted(measured, key=lambda pair: -pair[0]))

    def to_dicts(self) -> list[dict[str, Any]]:
        """List the rows as dicts of JSON values.

        Returns:
            A dict per row.
        """
        return [dataclasses.asdict(row) for row in self.rows]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> LayerRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer {name!r}; there are {[row.name for row in self]}")

    def __str__(self) -> str:
        """Draw the table, and list what was left alone below it."""
        table = rich.table.Table(box=rich.box.SIMPLE)
        table.add_column("layer", no_wrap=True)
        for column in ("shape", "sparsity", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            sparsity = f"{100 * row.sparsity:.1f} %"
            error = "" if row.error is None else f"{row.error:.2e}"
            cells = (row.name, str(list(row.shape)), sparsity, error)
            table.add_row(*map(rich.text.Text, cells))
        lines = [report.draw(table)]
        if self.left_alone:
            lines.append(" left alone:")
            lines += [f"   {path}: {why}" for path, why in self.left_alone.items()]
        return "\n".join(lines)

    __repr__ = __str__


_TILE = 512  # of a Gram matrix
_OUTPUTS = 512


def squared_norms(
    weights: jax.Array,
    pruned: jax.Array,
    gram: jax.Array,
    squares: jax.Array,
    *,
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
        in_parts: as for `sum_by_outputs`.

    Returns:
        Both, float32 [2].

    >>> gram, w = jnp.array([[2.0, 7.0], [1.0, 1.0]]), jnp.array([[1.0], [1.0]])
    >>> squared_norms(w, w.at[1].set(0.0), gram, jnp.array([2.0, 1.0]))
    Array([1., 5.], dtype=float32)
    """
    columns, outputs = weights.shape
    tiles = _Chunks(columns, _TILE)

    def of_outputs(start: jax.Array, is_new: jax.Array) -> jax.Array:
        size = (tiles.width, is_new.shape[0])

        def both(row: jax.Array) -> list[jax.Array]:
            """W - W' and W, rows from one on."""
            w, less = (
                lax.dynamic_slice(x, (row, start), size).astype(jnp.float32)
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
                tile = jnp.where(is_below & is_new_column[None, :], tile, 0.0)
                return [
                    total + jnp.matmul(tile, d, precision=lax.Precision.HIGHEST)
                    for total, d in zip(totals, both(column), strict=True)
                ]

            mine = both(row)
            totals = lax.fori_loop(0, i + 1, add, [jnp.zeros_like(d) for d in mine])
            own = lax.dynamic_slice_in_dim(squares, row, tiles.width)[:, None]
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
