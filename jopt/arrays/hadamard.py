"""The Hadamard transform: an orthogonal map that spreads every number over all others.

    y = H x / sqrt(n),    H_ij = +1 or -1,    H H^T = n I

so one large number among n becomes n numbers of equal size, 1 / sqrt(n) as large, and a
grid of few bits fits them all. With n = 2^k m,

    H_n = H_2 (x) ... (x) H_2 (x) H_m

takes k sums and differences per number and one small product, O(n (log n + m)). H_m for
m = 12, 20, 28, 36, 44, ... is Paley's: q + 1 for a prime q = 3 mod 4, 2 (q + 1) for a
prime q = 1 mod 4. Sizes that have none are cut into blocks of a power of two.

Paley, On orthogonal matrices, 1933. For quantization: Tseng et al., QuIP#,
arXiv:2402.04396; Ashkboos et al., QuaRot, arXiv:2404.00456.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jopt.arrays.axes import named_sharding

_LARGEST = 512  # a matrix beyond which blocks are cheaper


def hadamard_transform(
    x: ArrayLike, *, axis: int = -1, inverse: bool = False
) -> jax.Array:
    """Multiply the vectors along one axis by the normalised Hadamard matrix.

    y_i = sum_j H_ij x_j / sqrt(n),   or with `inverse`   x_j = sum_i H_ij y_i / sqrt(n)

    Args:
        x: float array. Half precision is summed in float32.
        axis: along which; its size n is any. H is Sylvester's for powers of two and
            Sylvester's times Paley's where there is one; else blocks of the largest
            power of two that divides n are transformed, an odd n not at all.
        inverse: whether to undo it.

    Returns:
        An array of the shape and dtype of `x`. For n = 4^k whole numbers give exact
        results, and the inverse gives them back bit for bit.

    Raises:
        TypeError: `x` is not floating point.

    References:
        Ashkboos et al., QuaRot, arXiv:2404.00456.

    >>> hadamard_transform(jnp.array([8.0, 0.0, 0.0, 0.0]))
    Array([4., 4., 4., 4.], dtype=float32)
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a float array, got {x.dtype}; cast it first")
    sharding = named_sharding(x)
    run = functools.partial(_transform, axis=axis % x.ndim, inverse=inverse)
    if sharding is None:
        return run(x)
    return jnp.asarray(jax.sharding.auto_axes(run, out_sharding=sharding)(x))


def block_size(size: int) -> int:
    """Return how many numbers of an axis are mixed with each other.

    Args:
        size: of the axis.

    Returns:
        The size itself where it has a Hadamard matrix, else the largest power of two
        that divides it.

    >>> [block_size(n) for n in (64, 768, 14336, 11008, 10, 7)]
    [64, 768, 14336, 256, 2, 1]
    """
    return math.prod(_factors(size))


def _transform(x: jax.Array, *, axis: int, inverse: bool) -> jax.Array:
    size = x.shape[axis]
    power, odd = _factors(size)
    if power * odd == 1:
        return x
    wide = jnp.moveaxis(x, axis, -1)
    lead = wide.shape[:-1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = wide.astype(dtype).reshape(*lead, -1, power, odd)
    for stage in range(power.bit_length() - 1):
        pairs = wide.reshape(*lead, -1, 2, odd << stage)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        wide = jnp.stack([a + b, a - b], axis=-2)
    if odd > 1:
        matrix = jnp.asarray(_paley(odd), dtype)
        wide = jnp.matmul(
            wide.reshape(*lead, -1, odd),
            matrix if inverse else matrix.T,
            precision=jax.lax.Precision.HIGHEST,
        )
    scaled = wide.reshape(*lead, size) * (1 / math.sqrt(power * odd))
    return jnp.moveaxis(scaled.astype(x.dtype), -1, axis)


@functools.cache
def _factors(size: int) -> tuple[int, int]:
    """Split a size into a power of two and the order of a Paley matrix, or blocks."""
    power = size & -size if size else 1
    order = size // power if size else 1
    if order == 1:
        return power, 1
    # The order of a Hadamard matrix beyond 2 is a multiple of four.
    for step in range(2, power.bit_length()):
        wanted = order << step
        if wanted <= _LARGEST and _paley_prime(wanted) is not None:
            return power >> step, wanted
    return power, 1


def _paley_prime(order: int) -> int | None:
    """Return the prime of Paley's construction of an order, if there is one."""
    if _is_prime(order - 1) and order % 4 == 0:
        return order - 1
    half = order // 2 - 1
    return half if _is_prime(half) and half % 4 == 1 else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


@functools.cache
def _paley(order: int) -> np.ndarray:
    """Construct the Hadamard matrix of an order for which there is a prime."""
    prime = _paley_prime(order)
    assert prime is not None
    squares = {k * k % prime for k in range(1, prime)}
    character = np.array([0] + [1 if k in squares else -1 for k in range(1, prime)])
    places = np.arange(prime)
    jacobsthal = character[(places[:, None] - places[None, :]) % prime]
    conference = np.ones((prime + 1, prime + 1), int)
    conference[0, 0] = 0
    conference[1:, 1:] = jacobsthal
    one = np.eye(prime + 1, dtype=int)
    if prime % 4 == 3:  # the conference matrix is made antisymmetric
        conference[1:, 0] = -1
        return conference + one
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(one, [[1, -1], [-1, -1]])
