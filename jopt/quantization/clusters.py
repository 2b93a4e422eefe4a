"""Weight clustering: few values, or few vectors, that the weights of a leaf share.

    w ~ codebook[code],      code = argmin_k h (w - codebook_k)^2

after training by `cluster`, from k-means, or in training by `cluster_weights`, which
keeps params on their nearest centroids while latents move. Trained on after `cluster`,
codebooks are the params: `get_codebooks` takes them out, `set_codebooks` puts them
back, and the gradient of a centroid is the sum over the weights that share it (Han et
al., Deep Compression, arXiv:1510.00149).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import clustered, kmeans
from jopt.arrays.arguments import check_flags, check_key, require_count
from jopt.arrays.clustered import ClusteredArray
from jopt.trees import paths, rules
from jopt.updates.states import is_masked_node


class Sizes(NamedTuple):
    """How many values, of how many weights each, for how many rows."""

    num_clusters: int
    vector_size: int
    rows_per_codebook: int | None
    keeps_zero: bool
    start: kmeans.Start | None

    def check(self) -> None:
        """Raise for numbers that fit no leaf."""
        if not isinstance(self.num_clusters, int) or not (
            2 <= self.num_clusters <= 1 << 16
        ):
            raise ValueError(
                "num_clusters must be an integer from 2 to 65536, got "
                f"{self.num_clusters}: 16 is usual, and 256 for vectors"
            )
        for name in ("vector_size", "rows_per_codebook"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"{name} must be an integer of at least 1, got {value}"
                )
        if self.keeps_zero and self.vector_size != 1:
            raise ValueError(
                "preserve_zeros must be False for vectors, which have zeros beside "
                f"other numbers, got True with vector_size={self.vector_size}: use "
                "vector_size=1"
            )


def cluster(
    tree: Any,
    num_clusters: int = 16,
    *,
    vector_size: int = 1,
    rows_per_codebook: int | None = None,
    preserve_zeros: bool = False,
    importance: Any = None,
    start: kmeans.Start | None = None,
    key: jax.Array | None = None,
    iterations: int = 100,
    codebooks: Any = None,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
) -> Any:
    """Replace the weights of an array, or of selected leaves, by shared values.

    minimise sum_i h_i |w_i - codebook[code_i]|^2   by k-means

    Args:
        tree: a float array, which is always clustered, or any tree.
        num_clusters: values per codebook, an exact zero included: 2 to 65536. A code
            takes ceil(log2(num_clusters)) bits.
        vector_size: how many neighbours along the last axis share a code.
        rows_per_codebook: so many rows (an index of all other axes but a stacked one)
            have a codebook of their own; one codebook per leaf, or layer, when None.
        preserve_zeros: whether exact zeros stay, as a cluster that no gradient moves,
            and no other weight becomes one; for `vector_size=1`.
        importance: h of every weight, not negative: a tree like `tree` (a prefix, or an
            array for an array) of arrays that broadcast with the leaves, such as
            squared gradients or squared norms of inputs; 1 when None.
        start: "density", "linear", "k-means++" or a function, see
            the module `jopt.arrays.kmeans`; None for "density", and for vectors
            "k-means++".
        key: a PRNG key, for starts that draw; each leaf draws by its path.
        iterations: of k-means, at most.
        codebooks: what `get_centroids` returned, used as they are: their leaves are
            clustered, and their sizes count, not those above.
        select: which leaves of a tree; None for float leaves with at least two axes,
            stacked ones not counted.
        stacked_axes: which axis stacks layers, 0 or None: an int or rules; each layer
            has codebooks of its own.

    Returns:
        A `ClusteredArray`, or the tree with some as leaves. A codebook that weights
        with NaN or infinity would be part of is NaN.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: sizes do not fit, a leaf is empty, importance is negative or not
            finite (seen unless it is traced), a start has no key, or a rule matches
            nothing.

    References:
        Han et al., Deep Compression, arXiv:1510.00149; Gong et al., arXiv:1412.6115
        (vectors); Choi et al., arXiv:1612.01543 (importance).

    >>> import jax.numpy as jnp, jopt
    >>> w = jnp.array([[0.0, 0.9, 1.1], [-1.0, 0.0, 1.0]])
    >>> q = jopt.cluster(w, 3, preserve_zeros=True)
    >>> q.to_array()
    Array([[ 0.,  1.,  1.],
           [-1.,  0.,  1.]], dtype=float32)
    """
    sizes = Sizes(num_clusters, vector_size, rows_per_codebook, preserve_zeros, start)
    sizes.check()
    check_flags(preserve_zeros=preserve_zeros)
    require_count("iterations", iterations)
    check_key(key)
    is_array = hasattr(tree, "dtype") and hasattr(tree, "shape")
    leaves, treedef = paths.flatten_with_path(tree)
    stacks = rules.stacked_axis_of(stacked_axes, tree)
    if codebooks is not None:
        books = treedef.flatten_up_to(codebooks)
        chosen = [not is_masked_node(book) for book in books]
    else:
        books = [None] * len(leaves)
        chosen = (
            [True]
            if is_array
            else rules.select_leaves(select, tree, stacked_axes=stacked_axes)
        )
    found = []
    for (path, leaf), is_chosen, stack, h, book in zip(
        leaves, chosen, stacks, _spread(importance, tree, treedef), books, strict=True
    ):
        if not is_chosen:
            found.append(leaf)
            continue
        w, path = jnp.asarray(leaf), path or "w"
        h = None if h is None else _checked_importance(h, path)
        if book is None:
            book = find(
                w,
                sizes,
                importance=h,
                key=key,
                stack=stack,
                iterations=iterations,
                path=path,
            )
        else:
            book = _check_codebook(w, book, path)
        found.append(
            clustered.assign_codes(w, book, importance=h, keeps_zero=preserve_zeros)
        )
    return treedef.unflatten(found)


def _checked_importance(h: Any, path: str) -> jax.Array:
    """Return the importance of a leaf, or raise if it weighs none; traced ones pass."""
    if isinstance(h, jax.core.Tracer):
        return h
    with jax.ensure_compile_time_eval():  # known, though what is around may be traced
        h = jnp.asarray(h)
        is_weight = bool(jnp.all((h >= 0) & jnp.isfinite(h)))
    if not is_weight:
        raise ValueError(
            "importance must be at least 0 and finite, got numbers that are not for "
            f"{path!r}; squared gradients are usual"
        )
    return h


def _spread(importance: Any, tree: Any, treedef: Any) -> list[Any]:
    """Return the importance of each leaf: an array, or None."""
    if importance is None:
        return [None] * treedef.num_leaves
    spread = jax.tree.map(
        lambda h, part: jax.tree.map(lambda _: h, part, is_leaf=paths.is_whole_leaf),
        importance,
        tree,
    )
    leaves: list[Any] = treedef.flatten_up_to(spread)
    return leaves


def find(
    w: jax.Array,
    sizes: Sizes,
    *,
    importance: jax.Array | None,
    key: jax.Array | None,
    stack: int | None,
    iterations: int = 100,
    path: str,
) -> jax.Array:
    """Find the codebooks of one leaf by k-means, or raise where sizes do not fit it."""
    num_blocks = check_sizes(w, sizes, stack, path)
    default: kmeans.Start = "density" if sizes.vector_size == 1 else "k-means++"
    return clustered.find_codebook(
        w,
        sizes.num_clusters,
        vector_size=sizes.vector_size,
        num_blocks=num_blocks,
        num_layer_axes=int(stack is not None),
        importance=importance,
        keeps_zero=sizes.keeps_zero,
        start=default if sizes.start is None else sizes.start,
        key=None if key is None else paths.fold_path(key, path),
        iterations=iterations,
    )


def check_sizes(w: Any, sizes: Sizes, stack: int | None, path: str) -> int:
    """Return how many blocks the rows of a leaf are divided into, or raise."""
    if not jnp.issubdtype(w.dtype, jnp.floating) or w.ndim < 1:
        raise TypeError(
            f"w must be a float array with an axis, got {w.dtype}{list(w.shape)} for "
            f"{path!r}: leave it out of the selection"
        )
    if not w.size:
        raise ValueError(
            f"w must have weights to cluster, got shape {w.shape} for {path!r}: leave "
            "it out by select="
        )
    if stack not in (None, 0):
        raise ValueError(
            f"stacked_axes must be 0 for codebooks, got {stack} for {path!r} of shape "
            f"{w.shape}: move the layers to the front"
        )
    if w.shape[-1] % sizes.vector_size:
        raise ValueError(
            f"vector_size must divide the last axis of {path!r}, got "
            f"{sizes.vector_size} for shape {w.shape}: choose a divisor, or leave the "
            "leaf out by select="
        )
    rows = int(np.prod(w.shape[int(stack is not None) : -1]))
    per_book = sizes.rows_per_codebook or rows
    if per_book and rows % per_book:
        raise ValueError(
            f"rows_per_codebook must divide the rows of {path!r}, got {per_book} for "
            f"{rows} of shape {w.shape}: choose a divisor"
        )
    return rows // per_book if per_book else 1


def _check_codebook(w: jax.Array, book: Any, path: str) -> jax.Array:
    book = jnp.asarray(book)
    num_layer_axes = book.ndim - 3
    fits = num_layer_axes >= 0 and book.shape[:-3] == w.shape[: max(num_layer_axes, 0)]
    if fits:
        rows = int(np.prod(w.shape[num_layer_axes:-1]))
        fits = not (w.shape[-1] % book.shape[-1] or rows % book.shape[-3])
    if not fits:
        raise ValueError(
            f"codebooks must be [layers ..., blocks, clusters, d] for {path!r} of "
            f"shape {w.shape}, got {book.shape}: pass what get_centroids returned"
        )
    return book


def get_codebooks(tree: Any) -> Any:
    """Take the codebooks out of a tree: with the other leaves they are what trains.

    Args:
        tree: a tree with `ClusteredArray` leaves, as `cluster` returns it.

    Returns:
        The tree with an array `[layers ..., blocks, clusters, d]` in place of each
        `ClusteredArray`, and the other leaves as they are: params of any optimizer.

    >>> import jax, jax.numpy as jnp, jopt
    >>> packed = jopt.cluster({"w": jnp.array([[1.0, 2.0, 2.0]])}, 2)
    >>> books = jopt.get_codebooks(packed)
    >>> loss = lambda b: jopt.dequantize(jopt.set_codebooks(packed, b))["w"].sum()
    >>> jax.grad(loss)(books)["w"].ravel()
    Array([1., 2.], dtype=float32)
    """
    return jax.tree.map(
        lambda x: x.codebook if isinstance(x, ClusteredArray) else x,
        tree,
        is_leaf=paths.is_whole_leaf,
    )


def set_codebooks(packed: Any, codebooks: Any) -> Any:
    """Put codebooks, and the other leaves, back into a clustered tree.

    Args:
        packed: a tree with `ClusteredArray` leaves, which says the codes.
        codebooks: a tree like `get_codebooks(packed)`.

    Returns:
        A tree like `packed`.

    Raises:
        ValueError: a codebook has another shape.
    """

    def put(path: str, x: Any, new: Any) -> Any:
        if not isinstance(x, ClusteredArray):
            return new
        if jnp.shape(new) != x.codebook.shape:
            raise ValueError(
                f"codebooks must have the shape {x.codebook.shape} at {path!r}, got "
                f"{jnp.shape(new)}: pass a tree like get_codebooks(packed)"
            )
        return ClusteredArray(
            x.codes,
            new,
            dtype=x.dtype,
            num_codes=x.num_codes,
            keeps_zero=x.keeps_zero,
        )

    return paths.map_with_path(put, packed, codebooks)
