"""Products of int8 codes in int32, in the forms that XLA computes fast.

Any backend multiplies signed bytes by signed bytes, but on a CPU only some forms reach
the instructions for it. Measured there (with VNNI, and with AVX2 alone), against the
same product in float32:

    dots with two rows or more      1.5 to 3.5 times faster, 1.2 to 1.5 times
    dots with one row               1.6 (1024 x 1024) to 10 times slower (4096 x 4096):
                                    every weight is widened first; as a sum of 16
                                    products of two rows 0.7 to 1.3 times as fast
    convolutions, > 16 outputs      1.3 to 2.4 times faster, 0.9 to 1.2 times
    convolutions, <= 16 outputs     8 times slower; as a dot of windows about equal
    grouped, dilated inputs         slower; in float32, exactly, equal

The last is exact because a sum of up to 1040 products of two codes stays below 2^24.
Other platforms get the operation as it is, in int8 and int32: the detours answer to the
kernels of XLA for CPUs, and have been measured nowhere else.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays.axes import is_explicit, split_axis

_ROWS, _PARTS, _TERMS = 2, 16, 64  # more rows, more parts, shorter ones: slower
_EXACT_TERMS = 2**24 // 128**2  # float32 adds so many products of codes exactly
_FEW_OUTPUTS, _FEW_INPUTS = 16, 8  # a convolution of so few is faster as a dot


def integer_dot(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, out_sharding: Any = None
) -> jax.Array:
    """Multiply int8 arrays as `lax.dot_general` does, into int32.

    Args:
        lhs: int8 array.
        rhs: int8 array.
        dimension_numbers: of `lax.dot_general`.
        out_sharding: of `lax.dot_general`.

    Returns:
        int32 array, exactly that of
        `lax.dot_general(..., preferred_element_type=jnp.int32)`.

    >>> x = jnp.full((1, 2), 100, jnp.int8)
    >>> integer_dot(x, x, (((1,), (1,)), ((), ())))
    Array([[20000]], dtype=int32)
    """
    contracted, batch = dimension_numbers
    pair = [lhs, rhs]
    free = [
        [a for a in range(x.ndim) if a not in (*c, *b)]
        for x, c, b in zip(pair, contracted, batch, strict=True)
    ]
    rows = [
        math.prod(x.shape[a] for a in axes) for x, axes in zip(pair, free, strict=True)
    ]
    thin = next((i for i in (0, 1) if rows[i] == 1 and rows[1 - i] > 1), None)
    plain = functools.partial(
        _dot, numbers=dimension_numbers, out_sharding=out_sharding
    )
    if thin is None or out_sharding is not None:
        return plain(lhs, rhs)
    padded = functools.partial(_row_dot, numbers=dimension_numbers, thin=thin)
    return lax.platform_dependent(lhs, rhs, cpu=padded, default=plain)


def _row_dot(lhs: jax.Array, rhs: jax.Array, *, numbers: Any, thin: int) -> jax.Array:
    """Multiply one row, as a product of several rows."""
    pair = [lhs, rhs]
    contracted, batch = ([[*axes] for axes in both] for both in numbers)
    parts = _parts(pair[1 - thin], contracted[1 - thin])
    if parts > 1:
        for i, (axis,) in enumerate(contracted):
            pair[i] = split_axis(pair[i], axis, pair[i].shape[axis] // parts)
            batch[i] = [a + (a > axis) for a in batch[i]] + [axis]
            contracted[i] = [axis + 1]
    x = jnp.expand_dims(pair[thin], 0)  # one more free axis, the first
    pair[thin] = jnp.pad(x, [(0, _ROWS - 1)] + [(0, 0)] * (x.ndim - 1))
    for both in (contracted, batch):
        both[thin] = [a + 1 for a in both[thin]]
    out = _dot(*pair, numbers=(contracted, batch))
    free = lhs.ndim - len(numbers[0][0]) - len(numbers[1][0])
    out = lax.index_in_dim(out, 0, len(batch[0]) + thin * free, keepdims=False)
    return jnp.sum(out, len(batch[0]) - 1, dtype=jnp.int32) if parts > 1 else out


def _parts(weights: jax.Array, contracted: Sequence[int]) -> int:
    """Count the parts that a product of one row is a sum of."""
    if len(contracted) != 1 or is_explicit(weights):
        return 1
    (axis,) = contracted
    size = weights.shape[axis]
    if axis == weights.ndim - 1 or size < 2 * _TERMS:
        return 1
    parts = math.gcd(size, _PARTS)
    return min(parts, 1 << (size // _TERMS).bit_length() - 1)


def _dot(
    lhs: jax.Array, rhs: jax.Array, *, numbers: Any, out_sharding: Any = None
) -> jax.Array:
    return lax.dot_general(
        lhs,
        rhs,
        numbers,
        preferred_element_type=jnp.int32,
        out_sharding=out_sharding,
    )


def integer_conv(
    image: jax.Array,
    kernel: jax.Array,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    out_sharding: Any = None,
) -> jax.Array:
    """Convolve int8 arrays as `lax.conv_general_dilated` does, into int32.

    Args:
        image: int8 array.
        kernel: int8 array.
        window_strides: as the others of `lax.conv_general_dilated`.
        padding: explicit, low and high per spatial axis.
        lhs_dilation: of the image.
        rhs_dilation: of the kernel.
        dimension_numbers: where batch, features and places are.
        feature_group_count: groups of features.
        batch_group_count: groups of images.
        out_sharding: of the result, on explicit meshes.

    Returns:
        int32 array, exactly that of the operation with
        `preferred_element_type=jnp.int32`.

    >>> image = jnp.ones((1, 3, 3, 1), jnp.int8)
    >>> kernel = jnp.ones((2, 2, 1, 1), jnp.int8)
    >>> numbers = lax.conv_dimension_numbers((1, 3, 3, 1), (2, 2, 1, 1),
    ...                                      ("NHWC", "HWIO", "NHWC"))
    >>> integer_conv(image, kernel, window_strides=(1, 1), padding=((0, 0), (0, 0)),
    ...              lhs_dilation=(1, 1), rhs_dilation=(1, 1),
    ...              dimension_numbers=numbers).ravel()
    Array([4, 4, 4, 4], dtype=int32)
    """

    def conv(image: jax.Array, kernel: jax.Array, dtype: Any = jnp.int32) -> jax.Array:
        return lax.conv_general_dilated(
            image,
            kernel,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
            out_sharding=out_sharding,
        )

    def windows(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return _dot_of_windows(
            image, kernel, window_strides, padding, rhs_dilation, dimension_numbers
        )

    def floats(image: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = image.astype(jnp.float32), kernel.astype(jnp.float32)
        return conv(*wide, jnp.float32).astype(jnp.int32)

    outputs, inputs, *window = (kernel.shape[a] for a in dimension_numbers.rhs_spec)
    is_padded = all(low >= 0 and high >= 0 for low, high in padding)
    is_plain = (
        feature_group_count == batch_group_count == 1
        and all(d == 1 for d in lhs_dilation)
        and is_padded
        and 0 not in (*image.shape, *kernel.shape)
    )
    is_small = outputs <= _FEW_OUTPUTS or inputs < _FEW_INPUTS
    # JAX 0.10 for CPU reads past the end where float32 images are cut, not padded.
    is_exact = is_padded and inputs * math.prod(window) <= _EXACT_TERMS
    if is_plain and (is_small or math.prod(window) == 1) and not is_explicit(image):
        return lax.platform_dependent(image, kernel, cpu=windows, default=conv)
    if not is_plain and is_exact:
        return lax.platform_dependent(image, kernel, cpu=floats, default=conv)
    return conv(image, kernel)


def _dot_of_windows(
    image: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    numbers: lax.ConvDimensionNumbers,
) -> jax.Array:
    """Write every window out as a row, and multiply rows by the kernel."""
    images, features, *places = numbers.lhs_spec
    x = jnp.transpose(image, (images, *places, features))
    out, into, *places = numbers.rhs_spec
    w = jnp.transpose(kernel, (*places, into, out))
    window, (inputs, outputs) = w.shape[:-2], w.shape[-2:]
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    # Or XLA computes what the codes come from anew for every place of the window.
    x = lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, window, strict=True)]
    sizes = [
        max((n - r) // s + 1, 0)
        for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)
    ]
    columns = []
    for place in itertools.product(*map(range, window)):
        start = [d * p for d, p in zip(dilation, place, strict=True)]
        stop = [
            b + (n - 1) * s + 1 for b, n, s in zip(start, sizes, strides, strict=True)
        ]
        columns.append(
            lax.slice(
                x,
                (0, *start, 0),
                (x.shape[0], *stop, inputs),
                (1, *strides, 1),
            )
        )
    rows = jnp.concatenate(columns, -1) if len(columns) > 1 else columns[0]
    rows = rows.reshape(-1, rows.shape[-1])
    sums = integer_dot(rows, w.reshape(-1, outputs), (((1,), (0,)), ((), ())))
    sums = sums.reshape(x.shape[0], *sizes, outputs)
    images, features, *places = numbers.out_spec
    source = {images: 0, features: sums.ndim - 1}
    source |= {axis: i + 1 for i, axis in enumerate(places)}
    return jnp.transpose(sums, [source[axis] for axis in range(sums.ndim)])
