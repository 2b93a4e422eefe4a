"""Numbers of elements beyond 32 bits, and how many a sparsity prunes.

JAX computes in 32 bits, and a model has more weights than that can count; float32 is
off by one from 2^24 on. A `Count` holds two limbs, `high * 2^16 + low`, so a total over
leaves or devices is a plain sum and a carry. `num_pruned` turns a sparsity into a count
in integers, so a schedule traced under `jit` and a Python float agree at every size.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

AxisName = str | tuple[str, ...]

_NARROW = 2**31  # arrays below this size are counted in 32 bits
_PARTS = 1_000_000  # a sparsity is read to six decimals


class Count(NamedTuple):
    """Numbers of elements below 2^48: `high * 2^16 + low`, uint32 of equal shapes."""

    high: jax.Array
    low: jax.Array  # below 2^16

    def at(self, i: ArrayLike) -> "Count":
        """Picks one of several counts."""
        return Count(self.high[i], self.low[i])


def as_count(number: "ArrayLike | Count") -> Count:
    """Widens a Python integer or an integer array; what is negative becomes 0."""
    if isinstance(number, Count):
        return number
    if isinstance(number, int):
        number = max(number, 0)
        return Count(jnp.uint32(number >> 16), jnp.uint32(number & 0xFFFF))
    number = jnp.asarray(number)
    if not jnp.issubdtype(number.dtype, jnp.integer):
        raise TypeError(
            f"k must be an integer, got {number.dtype}: pass scores.size minus "
            "num_pruned(scores.size, sparsity)"
        )
    number = jnp.where(number > 0, number, 0).astype(jnp.uint32)
    return Count(number >> 16, number & 0xFFFF)


def as_counts(numbers: Sequence[int]) -> Count:
    """Widens several Python integers below 2^48.

    >>> [int(limb[1]) for limb in as_counts([1, 2**32 + 5])]
    [65536, 5]
    """
    high = np.array([n >> 16 for n in numbers], np.uint32)
    low = np.array([n & 0xFFFF for n in numbers], np.uint32)
    return Count(jnp.asarray(high), jnp.asarray(low))


def from_float(number: jax.Array) -> Count:
    """Widens whole float32 numbers; what is negative becomes 0, above 2^47 that.

    >>> [int(limb) for limb in from_float(jnp.float32(65537))]
    [1, 1]
    """
    number = jnp.clip(number, 0, np.float32(2**47))
    high = jnp.floor(number / 65536)
    low = number - high * 65536
    return Count(high.astype(jnp.uint32), low.astype(jnp.uint32))


def add(a: Count, b: Count) -> Count:
    """Returns a + b."""
    return carry(a.high + b.high, a.low + b.low)


def subtract(a: Count, b: Count) -> Count:
    """Returns a - b, or 0 where b is larger."""
    low = a.low - b.low  # wraps below 0: its bit 16 is the borrow
    high = a.high - b.high - ((low >> 16) & 1)
    enough = ~less(a, b)
    return Count(jnp.where(enough, high, 0), jnp.where(enough, low & 0xFFFF, 0))


def less(a: Count, b: Count) -> jax.Array:
    """Returns a < b."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def carry(high: jax.Array, low: jax.Array) -> Count:
    """Moves what exceeds 16 bits of the low limb to the high limb."""
    return Count(high + (low >> 16), low & 0xFFFF)


def equal(a: Count, b: Count) -> jax.Array:
    """Returns a == b."""
    return (a.high == b.high) & (a.low == b.low)


def psum(count: Count, axis_name: AxisName) -> Count:
    """Adds the counts of all devices along mapped axes of up to 2^15 devices."""
    high, low = lax.psum(tuple(count), axis_name)  # type: ignore[no-untyped-call]
    return carry(high, low)


def agree(count: Count, axis_name: AxisName) -> Count:
    """Returns a count that is the same on all devices as one known to be the same."""
    return Count(*lax.pmax(tuple(count), axis_name))  # type: ignore[no-untyped-call]


def where(condition: ArrayLike, a: Count, b: Count) -> Count:
    """Returns a where the condition holds, else b."""
    return Count(
        jnp.where(condition, a.high, b.high), jnp.where(condition, a.low, b.low)
    )


def smaller(a: Count, b: Count) -> Count:
    """Returns the smaller of a and b."""
    return where(less(a, b), a, b)


def total(count: Count) -> Count:
    """Adds up counts along an axis shorter than 2^16."""
    high, low = (
        jnp.sum(count.high, dtype=jnp.uint32),
        jnp.sum(count.low, dtype=jnp.uint32),
    )
    return carry(high, low)


def deal(need: Count, room: Count) -> Count:
    """Gives each of several in turn as much as it has room for, while there is need."""

    def give(need: Count, room: Count) -> tuple[Count, Count]:
        mine = smaller(need, room)
        return subtract(need, mine), mine

    given: Count = lax.scan(give, need, room)[1]
    return given


def clip_to_int(count: Count, largest: int) -> jax.Array:
    """Returns min(count, largest) as uint32, for a largest below 2^32."""
    number = (count.high << 16) | count.low
    return jnp.where(less(as_count(largest), count), jnp.uint32(largest), number)


def to_float(count: Count) -> jax.Array:
    """Returns the count rounded to float32, for estimates."""
    return count.high.astype(jnp.float32) * 65536 + count.low.astype(jnp.float32)


def sum_of_booleans(values: jax.Array) -> Count:
    """Counts what is true, whatever the size, by plain reductions.

    The axes are summed one after the other with a carry between, because 32 bits do not
    hold the sum of a large array; an array below 2^31 needs one reduction only.
    """
    if values.size < _NARROW:
        return as_count(jnp.sum(values, dtype=jnp.uint32))
    count = as_count(jnp.sum(values, axis=-1, dtype=jnp.uint32))
    while count.low.ndim:
        count = _sum_last_axis(count)
    return count


def _sum_last_axis(count: Count) -> Count:
    """Sums an axis below 2^24 long: the low limb in two halves of eight bits."""
    high = jnp.sum(count.high, axis=-1, dtype=jnp.uint32)
    upper = jnp.sum(count.low >> 8, axis=-1, dtype=jnp.uint32)
    lower = jnp.sum(count.low & 0xFF, axis=-1, dtype=jnp.uint32)
    high = high + (upper >> 8) + (lower >> 16)
    return carry(high, (lower & 0xFFFF) + ((upper & 0xFF) << 8))


def num_pruned(size: int, sparsity: ArrayLike) -> "int | Count":
    """Counts the elements that a sparsity prunes: `round(sparsity * size)`.

    The sparsity is read to six decimals, and a half goes to the even neighbour. Python
    and traced sparsities give the same number at every size, exactly.

    Args:
      size: The number of elements.
      sparsity: The fraction to prune, a Python number or a scalar array. An array is
        clipped to [0, 1] (a traced NaN prunes nothing), since it may not be known.

    Returns:
      An integer for a Python number, a `Count` for an array.

    Raises:
      ValueError: If a Python sparsity is outside [0, 1] or an array is no scalar.
      TypeError: If the sparsity is no number.

    >>> num_pruned(25, 0.9)  # 22.5 to even
    22
    >>> num_pruned(10**10, 0.123456)
    1234560000
    """
    if isinstance(sparsity, int | float | np.generic):
        if not 0 <= sparsity <= 1:
            raise ValueError(
                f"sparsity must be in [0, 1], got {sparsity}: it is the fraction of "
                "elements set to zero"
            )
        parts = int(np.round(np.float32(sparsity) * np.float32(_PARTS)))
        whole, rest = divmod(parts * size, _PARTS)
        return whole + (2 * rest + whole % 2 > _PARTS)
    if not isinstance(sparsity, np.ndarray | jax.Array):
        raise TypeError(
            f"sparsity must be a number or a scalar array, got {sparsity!r}"
        )
    # By NumPy: inside of a trace, JAX would trace what is asked of a known array too.
    is_known = not isinstance(sparsity, jax.core.Tracer)
    if is_known and np.isnan(np.asarray(sparsity)).any():
        raise ValueError("sparsity must be in [0, 1], got nan: look at the schedule")
    sparsity = jnp.asarray(sparsity, jnp.float32)
    if sparsity.ndim:
        raise ValueError(
            f"sparsity must be a scalar, got shape {sparsity.shape}: map over leaves "
            "or layers that have a sparsity of their own"
        )
    return _part_of(size, sparsity)


@functools.partial(jax.jit, static_argnums=0)
def _part_of(size: int, sparsity: jax.Array) -> Count:
    """Returns round(parts * size / 10^6) where parts <= 10^6, without overflow.

    With size = 10^6 a + b the quotient is parts * a + parts * b / 10^6, and with both
    factors of the second product split at 1000 no term reaches 2^32.
    """
    clipped = jnp.where(sparsity > 0, jnp.minimum(sparsity, 1), 0)
    parts = jnp.round(clipped * _PARTS).astype(jnp.uint32)
    a, b = divmod(size, _PARTS)
    b1, b0 = divmod(b, 1000)
    p1, p0 = parts // 1000, parts % 1000
    rest = (p1 * b0 + p0 * b1) * 1000 + p0 * b0
    whole = p1 * b1 + rest // _PARTS
    rest = rest % _PARTS
    odd = (whole + parts * (a & 1)) & 1
    whole += (2 * rest + odd > _PARTS).astype(jnp.uint32)
    return add(_multiply(parts, a), as_count(whole))


def _multiply(x: jax.Array, a: int) -> Count:
    """Returns x * a, a product below 2^48, in limbs of 16 bits."""
    x1, x0 = x >> 16, x & 0xFFFF
    a1, a0 = np.uint32(a >> 16), np.uint32(a & 0xFFFF)
    return carry(((x1 * a1) << 16) + x1 * a0 + x0 * a1, x0 * a0)
