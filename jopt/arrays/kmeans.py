"""K-means of weights: the few values, or short vectors, that many are replaced by.

Lloyd's iteration, with an importance h for every number (1 where there is none),

    code_i = argmin_k sum_j h_ij (x_ij - c_kj)^2
    c_kj  <- c_kj + sum_i h_ij (x_ij - c_kj) / sum_i h_ij       over i with code k,

which never raises sum h (x - c)^2 and ends where no centroid moves. Written as a move,
a mean of equal numbers is that number, bit for bit. Points are worked on in chunks, and
sums per cluster are products with one-hot codes: the same bits on every call, no array
of points times centroids, and sums of sums, which keep float32 accurate.

A cluster that loses its points keeps its centroid. The start decides which of many
minima is found: evenly spaced values, which give large weights centroids of their own
(Han et al., Deep Compression, arXiv:1510.00149), quantiles, or k-means++ (Arthur and
Vassilvitskii, SODA 2007).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays.units import unit_of

# (points [n, d], importance [n, d], num_clusters, key) -> centroids [num_clusters, d];
# importance up to a factor.
StartFunction = Callable[[jax.Array, jax.Array, int, jax.Array | None], jax.Array]
Start = Literal["linear", "density", "k-means++"] | StartFunction

_CHUNK = 1 << 20  # distances that are held at once


@functools.partial(jax.jit, inline=True)
def nearest_centroids(
    points: jax.Array, centroids: jax.Array, *, importance: jax.Array | None = None
) -> jax.Array:
    """Return the code of the nearest centroid of each point; the lower one of a tie.

    code_i = argmin_k sum_j h_ij (x_ij - c_kj)^2

    Args:
        points: float `[n, d]`.
        centroids: float `[k, d]`.
        importance: h, not negative, that broadcasts with points; 1 when None.

    Returns:
        int32 `[n]`.

    >>> nearest_centroids(jnp.array([[0.1], [0.9]]), jnp.array([[0.0], [1.0]]))
    Array([0, 1], dtype=int32)
    """
    x, h = _prepared(points, importance)
    # Squares of differences are to be numbers, whatever the magnitude.
    unit = jnp.maximum(unit_of(x), unit_of(centroids))
    chunks, count = _chunks(x / unit, h, len(centroids))
    centroids = centroids.astype(jnp.float32) / unit
    codes = lax.map(lambda chunk: _assign(chunk[0], chunk[1], centroids), chunks)
    return codes.reshape(-1)[:count]


@functools.partial(jax.jit, static_argnames="iterations", inline=True)
def kmeans(
    points: jax.Array,
    centroids: jax.Array,
    *,
    importance: jax.Array | None = None,
    iterations: int = 100,
) -> jax.Array:
    """Move centroids by Lloyd's iteration until they rest.

    c_k <- sum_i h_i x_i / sum_i h_i   over the points nearest to c_k

    Args:
        points: float `[n, d]`.
        centroids: where they start, float `[k, d]`.
        importance: h, not negative, that broadcasts with points; 1 when None.
        iterations: at most so many.

    Returns:
        float32 centroids `[k, d]`.

    >>> kmeans(jnp.array([[0.0], [1.0], [8.0]]), jnp.array([[0.0], [4.0]])).ravel()
    Array([0.5, 8. ], dtype=float32)
    """
    x, h = _prepared(points, importance)
    unit = jnp.maximum(unit_of(x), unit_of(centroids))
    chunks, _ = _chunks(x / unit, h, len(centroids))

    def moves(sums: Any, chunk: Any) -> tuple[Any, None]:
        x, h = chunk
        codes = _assign(x, h, sums[2])
        is_mine = jax.nn.one_hot(codes, len(centroids), dtype=jnp.float32)
        offsets = h * (x - sums[2][codes])
        products = [
            jnp.einsum("nk,nd->kd", is_mine, part, precision=lax.Precision.HIGHEST)
            for part in (offsets, h)
        ]
        return (sums[0] + products[0], sums[1] + products[1], sums[2]), None

    def step(carry: Any) -> Any:
        count, _, old = carry
        zeros = jnp.zeros_like(old)
        (offset, total, _), _ = lax.scan(moves, (zeros, zeros, old), chunks)
        new = old + jnp.where(total > 0, offset / jnp.where(total > 0, total, 1), 0)
        return count + 1, jnp.any(new != old), new

    def goes_on(carry: Any) -> jax.Array:
        return carry[1] & (carry[0] < iterations)

    start = centroids.astype(jnp.float32) / unit
    return unit * lax.while_loop(goes_on, step, (0, jnp.asarray(True), start))[2]


@functools.partial(jax.jit, static_argnames=("num_clusters", "start"), inline=True)
def start_centroids(
    points: jax.Array,
    num_clusters: int,
    *,
    start: Start,
    importance: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Choose where centroids start.

    Args:
        points: float `[n, d]`.
        num_clusters: how many.
        start: "linear", evenly from the least to the largest number; "density", the
            numbers at evenly spaced ranks; "k-means++", points drawn with a chance
            that grows with the squared distance from those before (needs a key); or a
            function `(points, importance, num_clusters, key) -> centroids`. The first
            two are for d = 1.
        importance: h, as in `kmeans`; points without any are not drawn.
        key: a PRNG key.

    Returns:
        float32 centroids `[num_clusters, d]`.

    Raises:
        ValueError: the start is unknown, needs a key, or is not for vectors.

    >>> start_centroids(jnp.arange(5.0)[:, None], 3, start="linear").ravel()
    Array([0., 2., 4.], dtype=float32)
    """
    x, h = _prepared(points, importance)
    if callable(start):
        return jnp.asarray(start(x, h, num_clusters, key), jnp.float32)
    if start not in ("linear", "density", "k-means++"):
        raise ValueError(
            'start must be "linear", "density", "k-means++" or a function, got '
            f"{start!r}"
        )
    if start == "k-means++":
        if key is None:
            raise ValueError(
                'start="k-means++" draws points and must have a key, got None: pass '
                "key=jax.random.key(0)"
            )
        unit = unit_of(x)
        return unit * _plus_plus(x / unit, h, num_clusters, key)
    if x.shape[1] != 1:
        raise ValueError(
            f"start must be k-means++ or a function for vectors, got {start!r} for "
            f"vectors of {x.shape[1]}: numbers have an order, vectors have none"
        )
    is_drawn = h > 0
    if start == "linear":
        low = jnp.min(x, where=is_drawn, initial=jnp.inf)
        high = jnp.max(x, where=is_drawn, initial=-jnp.inf)
        low, high = jnp.where(low <= high, jnp.stack([low, high]), 0.0)
        return jnp.linspace(low, high, num_clusters)[:, None]
    ordered = jnp.sort(jnp.where(is_drawn, x, jnp.inf).ravel())
    count = jnp.sum(is_drawn)
    share = (jnp.arange(num_clusters) + 0.5) / num_clusters
    place = jnp.clip((share * count).astype(jnp.int32), 0, jnp.maximum(count - 1, 0))
    return jnp.where(count > 0, ordered[place], 0.0)[:, None]


def _plus_plus(x: jax.Array, h: jax.Array, num_clusters: int, key: Any) -> jax.Array:
    """Draw points, each with a chance of h |x - nearest centroid|^2."""

    def draw(key: jax.Array, chance: jax.Array) -> jax.Array:
        # Where every point is a centroid already, any of those that count will do.
        chance = jnp.where(jnp.any(chance > 0), chance, jnp.max(h, axis=1))
        return x[jax.random.categorical(key, jnp.log(chance))]

    def add(distance: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        point = draw(key, distance)
        new = jnp.sum(h * jnp.square(x - point[None]), axis=1)
        return jnp.minimum(distance, new), point

    keys = jax.random.split(key, num_clusters)
    first = draw(keys[0], jnp.max(h, axis=1))
    distance = jnp.sum(h * jnp.square(x - first[None]), axis=1)
    _, others = lax.scan(add, distance, keys[1:])
    return jnp.concatenate([first[None], others])


def _prepared(
    points: jax.Array, importance: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    x = points.astype(jnp.float32)
    h = jnp.ones((1, 1)) if importance is None else importance.astype(jnp.float32)
    return x, jnp.broadcast_to(h / unit_of(h), x.shape)


def _chunks(x: jax.Array, h: jax.Array, num_clusters: int) -> tuple[Any, int]:
    """Cut points in pieces of one size; those that fill the last one do not count."""
    count, size = x.shape
    length = max(min(_CHUNK // num_clusters, count), 1)
    missing = -count % length
    parts = (jnp.pad(part, ((0, missing), (0, 0))) for part in (x, h))
    return tuple(part.reshape(-1, length, size) for part in parts), count


def _assign(x: jax.Array, h: jax.Array, centroids: jax.Array) -> jax.Array:
    """Find the nearest centroids from differences, which nothing cancels in."""
    distance = sum(
        h[:, j, None] * jnp.square(x[:, j, None] - centroids[None, :, j])
        for j in range(x.shape[1])
    )
    return jnp.argmin(jnp.asarray(distance), axis=1).astype(jnp.int32)


def on_grid(centroids: jax.Array, dtype: Any) -> jax.Array:
    """Round centroids to multiples of one power of two, 2^-22 of the largest.

    Numbers of such a grid reach one another exactly by adding float32 differences, so
    params that move from one centroid to another land on it. Other dtypes than float32
    and float64 get centroids that they can hold, and may miss by an ulp.

    Args:
        centroids: float32 `[..., k, d]`; a grid for each of the leading indices.
        dtype: of the params.

    Returns:
        float32 centroids.

    >>> on_grid(jnp.array([[1.0], [1e-9]]), jnp.float32).ravel()
    Array([1., 0.], dtype=float32)
    """
    if jnp.dtype(dtype).itemsize < 4:
        return centroids.astype(dtype).astype(jnp.float32)
    largest = jnp.max(jnp.abs(centroids), axis=(-2, -1), keepdims=True)
    _, exponent = jnp.frexp(largest)
    step = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 22, -126))
    return jnp.round(centroids / step) * step


def num_bits(num_clusters: int) -> int:
    """Return the bits of a code.

    >>> [num_bits(k) for k in (2, 16, 17, 256)]
    [1, 4, 5, 8]
    """
    return max(math.ceil(math.log2(num_clusters)), 1)
