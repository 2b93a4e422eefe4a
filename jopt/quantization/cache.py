"""A key-value cache of few bits: attention's memory, quantized as it grows.

    k ~ k' = (codes - zero_point) * scale,      |k - k'| <= e = h * scale

with h = 1/2 for integers, half the widest gap between levels for other formats, more
for full ranges (`QuantSpec.max_error`). Two ways to share scales keep what is stored as
it is while tokens are appended:

    per token     a token brings the scales of its heads (`axis=None`, or an axis that
                  names tokens); it is rounded once, when it comes.
    per channel   `axis=(-2, -1), group_size=g`: g tokens of a channel share a scale
                  (keys have outlier channels: KIVI, Liu et al., arXiv:2402.02750). The
                  last tokens, fewer than g, wait as floats and are rounded together
                  when their group is full: an entry changes once, and never again.

So an attention score errs by at most delta = sum_d |q_d| e_d <= |q|_1 max_d e_d (times
what scores are scaled by), the weights p of a softmax over scores that err by at most
delta by |p' - p|_1 <= 2 tanh(delta / 2), and the result o_d = sum_t p_t v_td by

    |o'_d - o_d| <= max_t e_td + tanh(delta / 2) (max_t v_td - min_t v_td),

all to the rounding of float32. `KeyValueCache.error_bounds` returns the e.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jopt.arrays.arguments import check_flags
from jopt.arrays.quantized import QuantizedArray, dequantize
from jopt.arrays.scales import Scale, effective_scale, spread_groups
from jopt.arrays.specs import QuantSpec
from jopt.quantization.cache_storage import TOKENS, Stored, append, empty, tiled


class CacheView(NamedTuple):
    """What attention reads: floats, and which of them a query may see."""

    keys: jax.Array  # [..., capacity, heads, features]; zeros where nothing is stored
    values: jax.Array  # as keys
    mask: jax.Array  # [..., 1, queries, capacity] bool: True = attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KeyValueCache:
    """Keys and values of the tokens so far, as `init_cache` makes them.

    Invariants:
        * Appending changes the slots of the new tokens alone; per channel, a token's
          slot once more, when its group is full.
        * All children share the leading axes: `lax.scan` may slice a cache of stacked
          layers, `vmap` may add an axis, and rows have lengths of their own.
        * Without a window the token at position t is in slot t, with one in slot t
          modulo the capacity.

    Attributes:
        keys: codes and scales, or floats, `[..., capacity, heads, features]`.
        values: as `keys`.
        length: int32 `[...]`: tokens that each row was given.
        key_residual: floats `[..., group_size, heads, features]`, keys of the group
            that is not full; per channel only.
        value_residual: as `key_residual`.
        window: whether new tokens take the place of the oldest.
    """

    keys: Stored
    values: Stored
    length: jax.Array
    key_residual: jax.Array | None = None
    value_residual: jax.Array | None = None
    window: bool = dataclasses.field(
        default=False, kw_only=True, metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of keys and of values, `(..., capacity, heads, features)`."""
        return tuple(self.keys.shape)

    @property
    def capacity(self) -> int:
        """How many tokens a row has room for."""
        return self.shape[TOKENS]

    @property
    def nbytes(self) -> int:
        """The bytes of all children: codes, scales, residuals and lengths."""
        return sum(int(c.size) * c.dtype.itemsize for c in jax.tree.leaves(self))

    def append(
        self,
        keys: ArrayLike,
        values: ArrayLike,
        *,
        num_tokens: ArrayLike | None = None,
    ) -> "KeyValueCache":
        """Store further tokens behind those that are there.

        Args:
            keys: floats `[..., n, heads, features]`, leading axes those of the cache.
            values: as `keys`.
            num_tokens: int `[...]`, or one for all rows, from 0 to n: how many of the n
                tokens of a row are to be stored, the first ones (prompts padded on the
                right, rows that are done); all when None. Under `jit`, where they are
                not known, numbers below 0 count as 0 and those above n as n.

        Returns:
            The cache with the tokens. Where the length is known, one that does not fit
            raises. Under `jit` it cannot: a row that was given more tokens than it has
            room for reads NaN throughout (never with `window`).

        Raises:
            TypeError: `num_tokens` are no integers.
            ValueError: the shapes do not fit, or numbers are known to be out of range
                or to exceed the capacity.
        """
        keys, values = jnp.asarray(keys), jnp.asarray(values)
        num_new = _check_tokens(self, keys, values)
        count = jnp.full(self.length.shape, num_new, jnp.int32)
        if num_tokens is not None:
            given = _checked_counts(num_tokens, self.length.shape, num_new)
            count = jnp.clip(given, 0, count)
        length = self.length + count
        _check_room(self, length)
        stored_keys, key_residual = append(
            self.keys, self.key_residual, keys, self.length, count, self.window
        )
        stored_values, value_residual = append(
            self.values, self.value_residual, values, self.length, count, self.window
        )
        return KeyValueCache(
            stored_keys,
            stored_values,
            length,
            key_residual,
            value_residual,
            window=self.window,
        )

    def read(self, query_positions: ArrayLike | None = None) -> CacheView:
        """Compute the floats that are stored, and the mask of causal attention.

        Args:
            query_positions: int `[..., queries]`: where the queries stand, from 0; None
                for one query behind all tokens, which sees them all. Of the n tokens
                just appended: `before.length[..., None] + jnp.arange(n)`.

        Returns:
            (keys, values, mask), of which `jax.nn.dot_product_attention` takes the
            mask as it is where there is one leading axis.
        """
        positions = self.positions()
        visible = (positions >= 0)[..., None, :]
        if query_positions is not None:
            queries = jnp.asarray(query_positions)[..., :, None]
            visible = visible & (positions[..., None, :] <= queries)
        keys = self._floats(self.keys, self.key_residual, positions)
        values = self._floats(self.values, self.value_residual, positions)
        return CacheView(keys, values, visible[..., None, :, :])

    def positions(self) -> jax.Array:
        """Return the position of the token in each slot.

        Returns:
            int32 `[..., capacity]`, -1 where a slot is empty.
        """
        length, slots = self.length[..., None], jnp.arange(self.capacity)
        slots = slots.reshape((1,) * self.length.ndim + slots.shape)
        if not self.window:
            return jnp.where(slots < length, slots, -1)
        newest = length - 1
        return jnp.maximum(newest - (newest - slots) % self.capacity, -1)

    def error_bounds(self) -> tuple[jax.Array, jax.Array]:
        """Return how far keys and values can be from what was appended.

        |k - k'| <= h * scale

        Returns:
            Two float32 arrays that broadcast with `shape`: h times the scale of every
            entry, to float32 rounding; 0 for floats. Where the cache reads another
            dtype than float32, half an ulp of the entry comes on top.
        """
        positions = self.positions()
        return (
            self._bound(self.keys, self.key_residual, positions),
            self._bound(self.values, self.value_residual, positions),
        )

    def _floats(
        self, stored: Stored, residual: jax.Array | None, positions: jax.Array
    ) -> jax.Array:
        x = dequantize(stored)
        if residual is not None:
            tail = tiled(residual, self.capacity)
            x = jnp.where(self._is_waiting(residual, positions), tail, x)
        if self.window:
            return x
        has_overflown = (self.length > self.capacity)[..., None, None, None]
        return jnp.where(has_overflown, jnp.nan, x)

    def _bound(
        self, stored: Stored, residual: jax.Array | None, positions: jax.Array
    ) -> jax.Array:
        if not isinstance(stored, QuantizedArray):
            return jnp.zeros((1,) * stored.ndim)
        step = effective_scale(Scale(stored.scale, None, stored.outer_scale))
        step = jnp.abs(spread_groups(step, stored.shape))
        bound = stored.spec.max_error * step
        if residual is None:
            return bound
        return jnp.where(self._is_waiting(residual, positions), 0.0, bound)

    def _is_waiting(self, residual: jax.Array, positions: jax.Array) -> jax.Array:
        """Tell which slots belong to the group that is not full."""
        size = residual.shape[TOKENS]
        begin = self.length - self.length % size
        return (positions >= begin[..., None])[..., None, None]

    def __repr__(self) -> str:
        if not hasattr(self.keys, "shape"):
            return "KeyValueCache(...)"
        kinds = [
            repr(x.spec) if isinstance(x, QuantizedArray) else str(x.dtype)
            for x in (self.keys, self.values)
        ]
        what = (
            kinds[0] if kinds[0] == kinds[1] else f"keys {kinds[0]}, values {kinds[1]}"
        )
        return f"KeyValueCache({list(self.shape)}, {what}, {self.nbytes:,} bytes)"


def init_cache(
    shape: tuple[int, ...],
    spec: QuantSpec | None,
    *,
    value_spec: QuantSpec | None = None,
    dtype: DTypeLike = jnp.float32,
    window: bool = False,
) -> KeyValueCache:
    """Make an empty key-value cache.

    k ~ (codes - zero_point) * scale

    Args:
        shape: `(..., capacity, heads, features)` of keys and of values, usually
            `(batch, capacity, heads, features)`, with the layers before it where a
            scan goes over them.
        spec: how they are quantized; None for floats. `axis=None` is a scale per token
            and head, with `group_size` per so many features of them; `axis=-3` one
            per token; `axis=(-2, -1)` with `group_size` one per channel and so many
            tokens, see the module. Leading axes always keep scales of their own.
        value_spec: how values are quantized, where that is another way (KIVI: keys per
            channel, values per token).
        dtype: that the cache reads, and that floats are stored in.
        window: whether tokens beyond the capacity take the place of the oldest. Of
            several appended at once the first then see fewer than `capacity` tokens.

    Returns:
        A `KeyValueCache` of length 0. With a bfloat16 scale per token and head, int8
        takes 8 + 16 / features bits per number: for 64 features 0.258 of float32,
        for 128 0.254. Per channel the last `group_size` tokens are there as floats
        besides.

    Raises:
        TypeError: `shape` has sizes that are no integers, `spec` is no
            `jopt.QuantSpec`, `dtype` no float dtype, or `window` no bool.
        ValueError: `shape` has fewer than three axes, or the spec does not fit: scales
            that tokens share without `group_size`, groups that do not divide, formats
            with mean scales (ternary, binary), whose errors have no bound.

    References:
        Liu et al., KIVI, arXiv:2402.02750; Hooper et al., KVQuant, arXiv:2401.18079.

    >>> import jax, jax.numpy as jnp, jopt
    >>> cache = jopt.init_cache((1, 16, 2, 64), jopt.QuantSpec(jopt.formats.int8))
    >>> k, v = jax.random.normal(jax.random.key(0), (2, 1, 3, 2, 64))
    >>> cache = jax.jit(jopt.KeyValueCache.append)(cache, k, v)
    >>> keys, values, mask = cache.read()
    >>> mask.astype(int).ravel()
    Array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], dtype=int32)
    >>> error, bound = jnp.abs(keys[:, :3] - k), cache.error_bounds()[0][:, :3]
    >>> bool((error <= bound * (1 + 1e-5)).all())
    True
    >>> cache
    KeyValueCache([1, 16, 2, 64], QuantSpec(int8, axis=(-4, -3, -2)), 4,228 bytes)
    """
    shape = _checked_shape(shape)
    check_flags(window=window)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype must be a float dtype, that the cache reads, got {dtype!r}: how "
            "tokens are stored is said by spec, such as jopt.QuantSpec"
            "(jopt.formats.int8)"
        )
    keys, key_residual = empty(shape, spec, dtype, "keys")
    values, value_residual = empty(
        shape, spec if value_spec is None else value_spec, dtype, "values"
    )
    length = jnp.zeros(shape[:TOKENS], jnp.int32)
    return KeyValueCache(
        keys, values, length, key_residual, value_residual, window=window
    )


def _checked_shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    if any(isinstance(n, bool) or not hasattr(n, "__index__") for n in sizes):
        raise TypeError(
            "shape must be (..., capacity, heads, features) of integers, got "
            f"{shape!r}: (batch, capacity, heads, features) is usual"
        )
    if len(sizes) < 3 or min(sizes) < 1:
        raise ValueError(
            "shape must be (..., capacity, heads, features) of positive sizes, got "
            f"{shape}: (batch, capacity, heads, features) is usual"
        )
    return tuple(int(size) for size in sizes)


def _checked_counts(given: Any, rows: tuple[int, ...], num_new: int) -> jax.Array:
    """Return numbers of tokens as int32, or raise; traced ones may be out of range."""
    if not isinstance(given, jax.Array):
        given = np.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(
            f"num_tokens must be integers, got {given.dtype}{list(given.shape)}: how "
            "many of the tokens of each row are to be stored"
        )
    if given.shape not in ((), rows):
        raise ValueError(
            f"num_tokens must have the shape {rows} of the rows, got {given.shape}: "
            "one number for each, or one for all"
        )
    if not isinstance(given, jax.core.Tracer):
        known = np.asarray(given)
        if np.any((known < 0) | (known > num_new)):
            raise ValueError(
                f"num_tokens must be from 0 to the {num_new} tokens of keys, got "
                f"{known.tolist()}: 0 stores nothing of a row"
            )
    return jnp.asarray(given, jnp.int32)


def _check_tokens(cache: KeyValueCache, keys: jax.Array, values: jax.Array) -> int:
    leading, (heads, features) = cache.shape[:TOKENS], cache.shape[-2:]
    for name, x in (("keys", keys), ("values", values)):
        wanted = (*leading, *x.shape[TOKENS:-2], heads, features)
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        if x.shape != wanted or x.shape != keys.shape or not is_float:
            raise ValueError(
                f"{name} must be floats of shape {(*leading, 'n', heads, features)}, "
                f"n the same for both, got {x.dtype}{list(x.shape)}: reshape them to "
                "[..., tokens, heads, features]"
            )
    num_new = keys.shape[TOKENS]
    if num_new > cache.capacity:
        raise ValueError(
            f"keys must fit the capacity of {cache.capacity} tokens, got {num_new} at "
            "once: make a longer cache, or append the last ones only"
        )
    return num_new


def _check_room(cache: KeyValueCache, length: jax.Array) -> None:
    """Raise for too many tokens where their number is known."""
    if cache.window or isinstance(length, jax.core.Tracer) or not length.size:
        return
    longest = int(jnp.max(length))
    if longest > cache.capacity:
        raise ValueError(
            f"length must stay within the capacity of {cache.capacity} tokens, got "
            f"{longest}: make a longer cache, or one with window=True"
        )
