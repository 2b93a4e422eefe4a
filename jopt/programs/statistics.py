"""What can be kept of a site: ranges, norms, histograms, Gram matrices.

Each is a function that returns a `Statistic`; a new one is a dozen lines. All are sums
or extrema in float32, so batches may be sharded and merged in any order. On a mesh
every device has the whole of a statistic, of inputs that stay where they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jopt.arrays.axes import gather_values, named_sharding, varying_axes
from jopt.programs.handlers import Use, to_array
from jopt.programs.matrices import input_matrix
from jopt.programs.operations import Site
from jopt.programs.record import Statistic


def absmax() -> Statistic:
    """Keep max |x| of what meets the parameter.

    Returns:
        The statistic; its value is a float32 scalar, 0 before anything ran.
    """
    return Statistic(
        lambda use: jnp.max(jnp.abs(_input(use)), initial=0.0),
        lambda site: jnp.float32(0),
        jnp.maximum,
    )


def minmax() -> Statistic:
    """Keep the least and the largest element of what meets the parameter.

    Returns:
        The statistic; its value is `{"low", "high"}`, +inf and -inf before any run.
    """
    return Statistic(_range, _no_range, _join_ranges)


def moving_average(decay: float = 0.9) -> Statistic:
    """Keep moving averages of the range of each batch.

        average <- decay * average + (1 - decay) * range of the batch

    with the first batch as the first average, as TensorFlow's and PyTorch's observers.

    Args:
        decay: in [0, 1): the weight of the past.

    Returns:
        The statistic; its value is `{"low", "high"}`.

    Raises:
        ValueError: `decay` is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")

    def update(before: Any, now: Any) -> Any:
        # A site in a branch may not have run before, or not in this batch.
        is_first, is_absent = (r["low"] > r["high"] for r in (before, now))

        def average(before: jax.Array, now: jax.Array) -> jax.Array:
            mixed = decay * before + (1 - decay) * now
            return jnp.where(is_absent, before, jnp.where(is_first, now, mixed))

        return jax.tree.map(average, before, now)

    return Statistic(_range, _no_range, _join_ranges, update)


def norms() -> Statistic:
    """Keep the sum of squares of every input feature, and the number of rows.

    Returns:
        The statistic; its value is `{"squares" [batch, columns], "rows"}` over the
        columns of `input_matrix`. Wanda's norms are `sqrt(squares)`.
    """

    def summarize(use: Use) -> Any:
        x = input_matrix(use)
        squares = gather_values(jnp.sum(x * x, axis=1))
        return {"squares": squares, "rows": jnp.float32(x.shape[1])}

    return summed(summarize)


def gram() -> Statistic:
    """Keep X^T X of what meets the parameter, and the number of rows.

    Returns:
        The statistic; its value is `{"gram" [batch, columns, columns], "rows"}` over
        the columns of `input_matrix`; with it tr(W^T G W) = ||X W||^2.
    """

    def summarize(use: Use) -> Any:
        x = input_matrix(use)
        return {"gram": product(x, x), "rows": jnp.float32(x.shape[1])}

    return summed(summarize)


def gram_below(x: jax.Array, onto: jax.Array | None = None) -> jax.Array:
    """Return X^T X, of large matrices only what is on the diagonal and below.

    What is above is a copy of what is below, and near half of the work; `mirrored` puts
    it there when all is added up. Tile after tile, each added where it belongs: nothing
    of the size of the matrix is held beside it.

    Args:
        x: float32 [batch, rows, columns].
        onto: [batch, columns or more, columns], what to add it to; None for zeros.

    Returns:
        `onto` with X^T X added to its first rows; nothing is added above the tiles of
        its diagonal.
    """
    batch, _, columns = x.shape
    num_tiles = _num_tiles(columns)
    if _on_every_device(x) is not None or num_tiles == 1:
        whole = product(x, x)
        return whole if onto is None else onto.at[:, :columns].add(whole)
    tile = columns // num_tiles
    pairs = [(i * tile, j * tile) for i in range(num_tiles) for j in range(i + 1)]
    starts = jnp.array(pairs, jnp.int32)

    def add(step: Any, found: jax.Array) -> jax.Array:
        i, j = starts[step]
        left, right = (lax.dynamic_slice_in_dim(x, at, tile, 2) for at in (i, j))
        before = lax.dynamic_slice(found, (0, i, j), (batch, tile, tile))
        return lax.dynamic_update_slice(found, before + product(left, right), (0, i, j))

    if onto is None:
        onto = jnp.zeros((batch, columns, columns), jnp.float32)
    missing = tuple(a for a in varying_axes(x) if a not in varying_axes(onto))
    if missing:  # in a `shard_map`
        onto = lax.pcast(onto, missing, to="varying")
    return lax.fori_loop(0, len(pairs), add, onto)


def mirrored(gram: jax.Array) -> jax.Array:
    """Copy what is below the diagonal to where it is above, in its place.

    Args:
        gram: [..., columns, columns], as `gram_below` returned it, or sums of that;
            further rows stay as they are.

    Returns:
        The symmetric matrices; small ones as they were, symmetric but for rounding.
    """
    columns = gram.shape[-1]
    if columns < _LARGE:
        return gram
    num_tiles = _num_tiles(columns)
    width = columns // num_tiles

    def copy(step: Any, gram: jax.Array) -> jax.Array:
        start = step * width
        below = lax.dynamic_slice_in_dim(gram, start, width, gram.ndim - 2)
        here = lax.dynamic_slice_in_dim(gram, start, width, gram.ndim - 1)
        here, rest = here[..., :columns, :], here[..., columns:, :]
        row, column = (
            lax.broadcasted_iota(jnp.int32, here.shape, gram.ndim - 2 + axis)
            for axis in (0, 1)
        )
        is_above = row < start + column
        here = jnp.where(is_above, jnp.swapaxes(below, -1, -2), here)
        here = jnp.concatenate([here, rest], axis=-2)
        return lax.dynamic_update_slice_in_dim(gram, here, start, gram.ndim - 1)

    return lax.fori_loop(0, num_tiles, copy, gram)


def squares_and_whole(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the diagonal, and the matrix `mirrored`.

    Args:
        gram: [batch, columns or more, columns].

    Returns:
        [batch, columns], and `gram` in its place.
    """
    squares = jnp.diagonal(gram, axis1=1, axis2=2)
    # Read before anything is written, or the compiler keeps a copy to read it from.
    squares, gram = lax.optimization_barrier((squares, gram))  # type: ignore[no-untyped-call]
    return squares, mirrored(gram)


def _num_tiles(columns: int) -> int:
    """Say into how many tiles of one size the columns are cut."""
    if columns < _LARGE:
        return 1
    return next(n for n in range(_MOST_TILES, 0, -1) if columns % n == 0)


_MOST_TILES, _LARGE = 8, 1024


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return X^T Y, on every device of a mesh.

    Args:
        x: float32 [batch, rows, columns].
        y: of that shape.

    Returns:
        [batch, columns, columns].
    """
    return jnp.einsum(
        "bmk,bml->bkl",
        x,
        y,
        precision=lax.Precision.HIGHEST,
        out_sharding=_on_every_device(x),
    )


def histogram(low: float, high: float, *, num_bins: int = 2048) -> Statistic:
    """Count the elements of what meets the parameter in bins of equal width.

    Args:
        low: the left end of the first bin.
        high: the right end of the last bin.
        num_bins: their number.

    Returns:
        The statistic; its value is float32 `[num_bins]`. Elements outside count in the
        first and in the last bin; NaN counts nowhere.

    Raises:
        ValueError: the range is empty or there is no bin.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high and num_bins > 0):
        raise ValueError(
            "histogram must have low < high, finite, and at least one bin, got "
            f"low={low}, high={high}, num_bins={num_bins}"
        )

    def summarize(use: Use) -> jax.Array:
        x = _input(use)
        place = jnp.floor((x - low) * (num_bins / (high - low)))
        place = jnp.clip(place, 0, num_bins - 1).astype(jnp.int32)
        counted = 1 - jnp.isnan(x).astype(jnp.float32)
        return zeros().at[place].add(counted, out_sharding=_on_every_device(x))

    def zeros() -> jax.Array:
        return jnp.zeros(num_bins, jnp.float32)

    return Statistic(summarize, lambda site: zeros(), jnp.add)


def summed(summarize: Callable[[Use], Any]) -> Statistic:
    """Add up from zeros, of the shapes that one run would give.

    Args:
        summarize: arrays that are sums over the rows of a site's inputs.

    Returns:
        The statistic.
    """

    def initial(site: Site) -> Any:
        def run(*operands: jax.Array) -> Any:
            def default(*pair: Any) -> jax.Array:
                raise AssertionError("a summary must not run the operation")

            return summarize(Use(site, operands[:2], default, operands[2:]))

        shapes = jax.eval_shape(run, *site.in_shapes)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return Statistic(summarize, initial, lambda a, b: jax.tree.map(jnp.add, a, b))


def _range(use: Use) -> Any:
    x = _input(use)
    return {
        "low": jnp.min(x, initial=jnp.inf),
        "high": jnp.max(x, initial=-jnp.inf),
    }


def _no_range(site: Site) -> Any:
    return {"low": jnp.float32(jnp.inf), "high": jnp.float32(-jnp.inf)}


def _join_ranges(a: Any, b: Any) -> Any:
    return {
        "low": jnp.minimum(a["low"], b["low"]),
        "high": jnp.maximum(a["high"], b["high"]),
    }


def _input(use: Use) -> jax.Array:
    return jnp.asarray(to_array(use.x)).astype(jnp.float32)


def _on_every_device(x: jax.Array) -> jax.sharding.NamedSharding | None:
    """Return the sharding of a statistic of `x`: explicit meshes ask for it by name."""
    sharding = named_sharding(x)
    return None if sharding is None else sharding.update(spec=())
