"""Arrays of shared values: codes of a few bits and a codebook of floats.

    w[..., i d : (i + 1) d] = codebook[code[..., i]]

for vectors of d weights that are neighbours along the last axis; d = 1 is weight
clustering (Han et al., Deep Compression, arXiv:1510.00149), larger d product
quantization (Gong et al., arXiv:1412.6115). Codebooks are found by k-means, see
`jopt.arrays.kmeans`. A codebook is an array of floats, and the gradient of a lookup is
a sum over the places that looked: what trains the codebook is the sum of the gradients
of the weights that share a value.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jopt.arrays import kmeans
from jopt.arrays.axes import gather_values, lay_like
from jopt.arrays.compressed import CompressedArray
from jopt.arrays.packing import pack_codes, unpack_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ClusteredArray(CompressedArray):
    """An array stored as codes and a codebook, or one for each block of rows.

    Invariants:
        * The codebook's leading axes, all but three, are the array's first ones: each
          of these layers has codebooks of its own, and a scan may slice them off.
        * A row is an index of all other axes but the last; a codebook serves as many
          rows as every other.
        * With `keeps_zero` code 0 is an exact zero that is not in the codebook, so no
          gradient moves it.

    Attributes:
        codes: `[..., size / d]`: uint8, packed along the last axis where a code has
            fewer than 8 bits; uint16 beyond 256 clusters.
        codebook: floats `[layers ..., blocks of rows, clusters, d]`.
        dtype: that `to_array` returns.
        num_codes: codes along the last axis.
        keeps_zero: whether zero is a cluster of its own.
    """

    codes: jax.Array
    codebook: jax.Array
    dtype: np.dtype = dataclasses.field(kw_only=True, metadata={"static": True})
    num_codes: int = dataclasses.field(kw_only=True, metadata={"static": True})
    keeps_zero: bool = dataclasses.field(
        default=False, kw_only=True, metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the codes stand for."""
        return (*self.codes.shape[:-1], self.num_codes * self.vector_size)

    @property
    def vector_size(self) -> int:
        """How many weights one code stands for."""
        return int(self.codebook.shape[-1])

    @property
    def num_clusters(self) -> int:
        """How many values a codebook has, an exact zero included."""
        return int(self.codebook.shape[-2]) + self.keeps_zero

    def to_array(self) -> jax.Array:
        """Look every code up."""
        return _look_up(self)

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):
            return "ClusteredArray(...)"
        return (
            f"ClusteredArray({self.dtype}{list(self.shape)}, {self.num_clusters} "
            f"clusters of {self.vector_size}, {self.bits_per_weight:.4g} bits per "
            "weight)"
        )


@functools.partial(
    jax.jit,
    static_argnames=("num_clusters", "vector_size", "num_blocks", "num_layer_axes")
    + ("keeps_zero", "start", "iterations"),
    inline=True,
)
def find_codebook(
    w: jax.Array,
    num_clusters: int,
    *,
    vector_size: int = 1,
    num_blocks: int = 1,
    num_layer_axes: int = 0,
    importance: jax.Array | None = None,
    keeps_zero: bool = False,
    start: kmeans.Start = "density",
    key: jax.Array | None = None,
    iterations: int = 100,
) -> jax.Array:
    """Find the values that the weights of an array are to share, by k-means.

    Args:
        w: float array `[..., size]`, of at least one axis.
        num_clusters: values of a codebook, an exact zero included.
        vector_size: d, which divides the last axis.
        num_blocks: into how many blocks rows are divided, each with its codebook.
        num_layer_axes: how many of the first axes have codebooks for each index.
        importance: h, broadcasts with `w`, see `jopt.arrays.kmeans`; 1 when None.
        keeps_zero: whether exact zeros are a cluster, and no part of others.
        start: where centroids start.
        key: a PRNG key, for starts that draw.
        iterations: at most so many.

    Returns:
        float32 `[layers ..., num_blocks, num_clusters - keeps_zero, vector_size]`; NaN
        for what holds numbers that are not finite.

    >>> find_codebook(jnp.array([0.0, 0.1, 1.0, 1.1]), 2).ravel()
    Array([0.05, 1.05], dtype=float32)
    """
    h = _importance(w, importance, keeps_zero)
    layers = (num_layer_axes, num_blocks, vector_size)
    points, weights = _points(w, *layers), _points(h, *layers)
    leading = points.shape[:-2]
    count = int(np.prod(leading))
    keys = None if key is None else jax.random.split(key, count)

    def find(one: Any) -> jax.Array:
        x, h, key = one
        first = kmeans.start_centroids(
            x, num_clusters - keeps_zero, start=start, importance=h, key=key
        )
        return kmeans.kmeans(x, first, importance=h, iterations=iterations)

    flat = (x.reshape(count, *x.shape[-2:]) for x in (points, weights))
    found = lax.map(find, (*flat, keys))
    found = found.reshape(*leading, *found.shape[-2:])
    is_finite = jnp.isfinite(points).all(axis=(-2, -1), keepdims=True)
    return jnp.where(is_finite, found, jnp.nan)


@functools.partial(jax.jit, static_argnames=("keeps_zero", "iterations"), inline=True)
def move_codebook(
    w: jax.Array,
    codebook: jax.Array,
    *,
    importance: jax.Array | None = None,
    keeps_zero: bool = False,
    iterations: int = 1,
) -> jax.Array:
    """Move a codebook towards the weights that are nearest to its values.

    Args:
        w: float array `[..., size]`.
        codebook: as `find_codebook` returned it.
        importance: as there.
        keeps_zero: as there.
        iterations: of Lloyd's.

    Returns:
        The codebook.
    """
    h = _importance(w, importance, keeps_zero)
    parts = (_points(x, *_layers(codebook)) for x in (w, h))
    return _over_codebooks(
        lambda one: kmeans.kmeans(
            one[0], one[2], importance=one[1], iterations=iterations
        ),
        (*parts, codebook),
    )


@functools.partial(jax.jit, static_argnames="keeps_zero", inline=True)
def assign_codes(
    w: jax.Array,
    codebook: jax.Array,
    *,
    importance: jax.Array | None = None,
    keeps_zero: bool = False,
) -> ClusteredArray:
    """Store an array as codes of the nearest values of given codebooks.

    Args:
        w: float array `[..., size]`.
        codebook: `[layers ..., blocks of rows, clusters, d]`, as `find_codebook` made
            it; kept in the dtype of `w`.
        importance: as there; it matters for vectors alone.
        keeps_zero: whether exact zeros, and only they, get code 0.

    Returns:
        A `ClusteredArray` of the shape and dtype of `w`.

    >>> w = jnp.array([0.0, 0.1, 1.0, 1.1])
    >>> q = assign_codes(w, jnp.array([[[0.0], [1.0]]]))
    >>> q, q.to_array()
    (ClusteredArray(float32[4], 2 clusters of 1, 18 bits per weight), \
Array([0., 0., 1., 1.], dtype=float32))
    """
    codebook = codebook.astype(w.dtype)
    h = _importance(w, importance, keeps_zero=False)
    parts = (_points(x, *_layers(codebook)) for x in (w, h))
    codes = _over_codebooks(
        lambda one: kmeans.nearest_centroids(one[0], one[2], importance=one[1]),
        (*parts, codebook),
    )
    num_codes = w.shape[-1] // codebook.shape[-1]
    codes = codes.reshape(*w.shape[:-1], num_codes)
    codes = lay_like(codes, w) if codes.shape == w.shape else codes
    if keeps_zero:
        codes = jnp.where(w == 0, 0, codes + 1)
    bits = kmeans.num_bits(codebook.shape[-2] + keeps_zero)
    codes = codes.astype(jnp.uint8 if bits <= 8 else jnp.uint16)
    if bits < 8:
        codes = pack_codes(codes, bits)
    return ClusteredArray(
        codes, codebook, dtype=w.dtype, num_codes=num_codes, keeps_zero=keeps_zero
    )


def _importance(
    w: jax.Array, importance: jax.Array | None, keeps_zero: bool
) -> jax.Array:
    """Return one number per weight, 0 for zeros that stand apart."""
    h = jnp.ones((), jnp.float32) if importance is None else importance
    h = jnp.broadcast_to(h, w.shape)
    return jnp.where(w == 0, 0, h) if keeps_zero else h


def _layers(codebook: jax.Array) -> tuple[int, int, int]:
    return codebook.ndim - 3, codebook.shape[-3], codebook.shape[-1]


def _points(
    w: jax.Array, num_layer_axes: int, num_blocks: int, vector_size: int
) -> jax.Array:
    """Return `[layers ..., blocks, points, d]`, whole on every device of a mesh."""
    w = gather_values(w)
    return w.reshape(*w.shape[:num_layer_axes], num_blocks, -1, vector_size)


def _over_codebooks(function: Any, arrays: Any) -> jax.Array:
    """Map a function over layers and blocks, one after the other."""
    leading = arrays[-1].shape[:-2]
    flat = tuple(x.reshape(-1, *x.shape[-2:]) for x in arrays)
    found: jax.Array = lax.map(function, flat)
    return found.reshape(*leading, *found.shape[1:])


@functools.partial(jax.jit, inline=True)
def _look_up(q: ClusteredArray) -> jax.Array:
    codes, table = q.codes, q.codebook
    bits = kmeans.num_bits(q.num_clusters)
    if bits < 8:
        codes = unpack_codes(codes, bits, q.num_codes, signed=False)
    if q.keeps_zero:
        table = jnp.concatenate([jnp.zeros_like(table[..., :1, :]), table], axis=-2)
    places = gather_values(codes).astype(jnp.int32)
    places = places.reshape(*table.shape[:-2], -1, 1)
    values = jnp.take_along_axis(table, places, axis=-2, mode="clip")
    values = values.reshape(q.shape).astype(q.dtype)
    return lay_like(values, codes) if codes.shape == values.shape else values
