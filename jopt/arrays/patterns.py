"""Which elements are kept or pruned together: single weights, n of m, blocks, channels.

A pattern pools the scores of what it keeps together, the best are selected, and the
mask is spread back:

    mask = spread(top_k(pool(scores)))

`Unstructured` pools nothing, `Block` and `Channel` take the mean (or the largest) score
of each group, and `NM` ranks inside every group of m neighbours, as sparse tensor cores
ask for: Mishra et al., "Accelerating sparse deep neural networks" (2021),
https://arxiv.org/abs/2104.08378. A pattern treats its array as one layer; a caller maps
over stacked layers.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jopt.arrays import axes, counts, selection

_BITS = 8  # of a group's word: the largest m whose comparisons are written out
_FUSES_OVER_BARRIERS = jax.__version_info__ < (0, 11)  # as XLA for CPU did


@dataclass(frozen=True)
class Unstructured:
    """Every element is kept or pruned by itself."""


@dataclass(frozen=True)
class NM:
    """Exactly n of every m neighbours along an axis are kept.

    The default axis is the one before the last: the input of a kernel `[in, out]`.
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self) -> None:
        """Refuses what is no pattern."""
        integers = _is_integer(self.n) and _is_integer(self.m)
        if not (integers and 1 <= self.n <= self.m):
            raise ValueError(
                f"NM needs integers 1 <= n <= m, got n={self.n} and m={self.m}: "
                "NM(2, 4) keeps two of every four"
            )
        _require_axis("NM", self.axis)


@dataclass(frozen=True)
class Block:
    """Blocks that tile the last axes are kept or pruned as one.

    A block's score is the mean of its scores, or the largest of them, in float32 (where
    XLA for CPU takes subnormal numbers for zeros).
    """

    shape: tuple[int, ...]
    reduce: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        """Refuses what is no pattern."""
        sizes = self.shape if isinstance(self.shape, tuple) else ()
        if not (sizes and all(_is_integer(size) and size > 0 for size in sizes)):
            raise ValueError(
                f"Block needs a tuple of positive sizes, got shape={self.shape}: "
                "Block((4, 4)) tiles the last two axes"
            )
        if self.reduce not in ("mean", "max"):
            raise ValueError(
                f"Block needs reduce='mean' or 'max', got {self.reduce!r}: it makes "
                "one score of a block's scores"
            )


@dataclass(frozen=True)
class Channel:
    """All that shares an index along an axis is kept or pruned as one.

    A channel's score is the mean of its scores in float32.
    """

    axis: int = -1

    def __post_init__(self) -> None:
        """Refuses what is no pattern."""
        _require_axis("Channel", self.axis)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_axis(name: str, axis: object) -> None:
    if not _is_integer(axis):
        raise ValueError(
            f"{name} needs an integer axis, got axis={axis!r}: -1 is the last axis"
        )


Pattern = Unstructured | NM | Block | Channel


def check_pattern(
    pattern: Pattern, shape: tuple[int, ...], *, path: str = "scores"
) -> None:
    """Refuses a shape that a pattern does not fit.

    Args:
      pattern: The pattern.
      shape: The shape of one layer of the leaf.
      path: The leaf's path, named by the error.

    Raises:
      ValueError: If the pattern's axes are missing, or m or the block does not divide
        the shape.
      TypeError: If `pattern` is none.

    >>> check_pattern(NM(2, 4), (8, 3))
    """
    if isinstance(pattern, Unstructured):
        return
    if isinstance(pattern, NM):
        _check_axis(pattern, pattern.axis, shape, path)
        if shape[pattern.axis] % pattern.m:
            raise ValueError(
                f"{pattern} needs an axis that m={pattern.m} divides, got shape "
                f"{shape} for {path!r}: choose another axis, pad it, or leave the leaf "
                "out"
            )
    elif isinstance(pattern, Channel):
        _check_axis(pattern, pattern.axis, shape, path)
    elif isinstance(pattern, Block):
        tiled = shape[max(len(shape) - len(pattern.shape), 0) :]
        fits = len(tiled) == len(pattern.shape)
        if not fits or any(np.array(tiled) % np.array(pattern.shape)):
            raise ValueError(
                f"{pattern} needs last axes that it divides, got shape {shape} for "
                f"{path!r}: choose another block, pad the array, or leave the leaf out"
            )
    else:
        raise TypeError(
            f"pattern must be Unstructured(), NM(n, m), Block(shape) or Channel(axis), "
            f"got {pattern!r}; NM(2, 4) keeps two of every four"
        )


def _check_axis(pattern: Pattern, axis: int, shape: tuple[int, ...], path: str) -> None:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{pattern} needs an axis {axis}, got shape {shape} for {path!r}: name an "
            "axis that it has, or leave the leaf out"
        )


def make_mask(
    scores: ArrayLike,
    *,
    sparsity: ArrayLike | None = None,
    pattern: Pattern = Unstructured(),
) -> jax.Array:
    """Masks the highest scores in a pattern.

    Of N elements (blocks, channels) exactly `N - round(sparsity * N)` are kept, for a
    Python and for a traced sparsity alike; `NM(n, m)` keeps n of every m and takes no
    sparsity. Ties go to the lower index in C order, NaN ranks below every number.

    Args:
      scores: Higher = keep; `[...]`, one layer.
      sparsity: The fraction in [0, 1] to prune, read to six decimals; an array is
        clipped.
      pattern: What is kept or pruned together.

    Returns:
      A boolean mask of the shape of the scores, True = keep.

    Raises:
      ValueError: If the pattern does not fit the shape, or the sparsity is missing, out
        of range, or given beside `NM`.
      TypeError: If the scores or the pattern are of a wrong type.

    >>> make_mask(jnp.array([4.0, 1.0, 3.0, 2.0]), sparsity=0.25)
    Array([ True, False,  True,  True], dtype=bool)
    >>> make_mask(jnp.array([4.0, 1.0, 3.0, 2.0]), pattern=NM(2, 4, axis=-1))
    Array([ True, False,  True, False], dtype=bool)
    """
    scores = jnp.asarray(scores)
    check_pattern(pattern, scores.shape)
    if isinstance(pattern, NM):
        if sparsity is not None:
            raise ValueError(
                f"sparsity must be None with {pattern}, got {sparsity}: the pattern "
                f"fixes it at {1 - pattern.n / pattern.m:g}"
            )
        return _n_of_m(scores, pattern)
    if sparsity is None:
        raise ValueError(
            f"sparsity must be given with {pattern}, got None: pass the fraction of "
            "elements to prune"
        )
    pooled = pool(scores, pattern)
    pruned = counts.as_count(selection.num_pruned(pooled.size, sparsity))
    k = counts.subtract(counts.as_count(pooled.size), pruned)
    return spread(selection.top_k_mask(pooled, k), pattern, scores.shape)


def pool(scores: jax.Array, pattern: Pattern) -> jax.Array:
    """Makes one score of those that a pattern keeps or prunes together.

    Args:
      scores: `[...]`, one layer.
      pattern: Any but `NM`, whose groups are ranked inside.

    Returns:
      The scores themselves for `Unstructured`; float32 `[..., blocks...]` for `Block`;
      float32 `[channels]` for `Channel`.

    >>> pool(jnp.array([[1.0, 3.0], [5.0, 7.0]]), Channel(-1))
    Array([3., 5.], dtype=float32)
    """
    if isinstance(pattern, Channel):
        kept = pattern.axis % scores.ndim
        others = tuple(axis for axis in range(scores.ndim) if axis != kept)
        return jnp.mean(scores.astype(jnp.float32), axis=others)
    if isinstance(pattern, Block):
        reduce = jnp.mean if pattern.reduce == "mean" else jnp.max
        tiles = scores.astype(jnp.float32)
        for axis, size in _blocks(scores.shape, pattern):
            tiles = reduce(axes.split_axis(tiles, axis, size), axis=axis + 1)
        return tiles
    return scores


def spread(mask: jax.Array, pattern: Pattern, shape: tuple[int, ...]) -> jax.Array:
    """Gives every element the decision taken for its block or channel.

    Args:
      mask: What `top_k_mask` makes of the pooled scores.
      pattern: As in `pool`.
      shape: The shape of the scores before pooling.

    Returns:
      The mask of that shape.

    >>> spread(jnp.array([True, False]), Channel(-1), (1, 2))
    Array([[ True, False]], dtype=bool)
    """
    if isinstance(pattern, Channel):
        kept = pattern.axis % len(shape)
        return jnp.broadcast_to(
            jnp.expand_dims(mask, [axis for axis in range(len(shape)) if axis != kept]),
            shape,
        )
    if isinstance(pattern, Block):
        for axis, size in _blocks(shape, pattern):
            mask = axes.repeat(mask, size, axis)
    return mask


def _blocks(shape: tuple[int, ...], pattern: Block) -> list[tuple[int, int]]:
    """Returns the tiled axes, and the size of a block along each."""
    first = len(shape) - len(pattern.shape)
    return [(first + i, size) for i, size in enumerate(pattern.shape)]


def _n_of_m(scores: jax.Array, pattern: NM) -> jax.Array:
    """Keeps an element that fewer than n of its group precede: nothing is sorted."""
    axis = pattern.axis % scores.ndim
    keys = axes.split_axis(selection.ordered_keys(scores), axis, pattern.m)
    keep = _keep_by_word if pattern.m <= _BITS else _keep_by_pairs
    return axes.merge_axis(keep(keys, axis + 1, pattern.n), axis)


def _keep_by_word(keys: jax.Array, axis: int, n: int) -> jax.Array:
    """Packs the decisions of a group into one byte, then spreads its bits.

    Two passes with a byte per group between them are 2 to 5 times faster on CPU than
    one: XLA cannot vectorize the stores of a loop whose innermost axis is the group.
    """
    size = keys.shape[axis]
    columns = [lax.index_in_dim(keys, i, axis, keepdims=False) for i in range(size)]
    # Each pair is compared once: the later precedes until the earlier proves to.
    ranks = [jnp.full_like(columns[0], size - 1 - i, jnp.uint8) for i in range(size)]
    for i in range(size):
        for j in range(i):
            precedes = (columns[j] >= columns[i]).astype(jnp.uint8)
            ranks[i], ranks[j] = ranks[i] + precedes, ranks[j] - precedes
    kept = [rank < n for rank in ranks]
    if _FUSES_OVER_BARRIERS:  # every element would compare its whole group again
        return jnp.stack(kept, axis)
    word = jnp.zeros_like(kept[0], jnp.uint8)
    for i, bit in enumerate(kept):
        word |= bit.astype(jnp.uint8) << i
    word = lax.optimization_barrier(word)  # type: ignore[no-untyped-call]
    word = jnp.expand_dims(word, axis)
    place = np.arange(size, dtype=np.uint8)
    place = place.reshape([size if i == axis else 1 for i in range(keys.ndim)])
    return (word >> place) & 1 != 0


def _keep_by_pairs(keys: jax.Array, axis: int, n: int) -> jax.Array:
    """Compares all m^2 pairs of large groups in one pass, with little to compile."""
    place = np.arange(keys.shape[axis])
    pairs = (1,) * axis + 2 * place.shape + (1,) * (keys.ndim - axis - 1)
    earlier = (place[:, None] > place).reshape(pairs)
    mine, other = jnp.expand_dims(keys, axis + 1), jnp.expand_dims(keys, axis)
    precedes = (other > mine) | ((other == mine) & earlier)
    return jnp.sum(precedes, axis=axis + 1, dtype=jnp.int32) < n
