"""Products of codes: what an operation on quantized operands is in integers.

    (s_x c_x) (s_w c_w) = s_x s_w (c_x c_w),   c_x c_w in int32

as long as no scale varies along what is contracted, where groups are split off:

    sum over groups g of s_x[g] s_w[g] (c_x[g] c_w[g])

and zero points are subtracted from the sums: with K terms

    (c_x - z_x) (c_w - z_w) = c_x c_w - z_w sum c_x - z_x sum c_w + K z_x z_w.

Eight-bit floats multiply as they are, into float32; microscaling formats through
`jax.nn.scaled_matmul` where the backend has it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays.axes import align, insert_axis, lay_like, lay_out, split_axis
from jopt.arrays.codes import compute_codes
from jopt.arrays.integer import integer_conv, integer_dot
from jopt.arrays.packing import unpack_codes
from jopt.arrays.quantized import QuantizedArray
from jopt.arrays.scales import Scale, effective_scale
from jopt.arrays.specs import QuantSpec
from jopt.programs.operations import Site


class Factor(NamedTuple):
    """An operand as codes and what they are worth.

    Attributes:
        codes: int8, or eight-bit floats, of the operand's shape.
        scale: float32 of the operand's rank; sizes are 1, the operand's or groups.
        zero_point: int32 like it, or None.
        is_swapped: whether all three have their last two axes swapped: moving codes
            would cost more than multiplying them.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    is_swapped: bool = False

    def swapped(self) -> "Factor":
        """Swap the last two axes in fact."""
        zero_point = self.zero_point
        return Factor(
            jnp.swapaxes(self.codes, -1, -2),
            jnp.swapaxes(self.scale, -1, -2),
            None if zero_point is None else jnp.swapaxes(zero_point, -1, -2),
            not self.is_swapped,
        )


def is_multiplied(spec: QuantSpec) -> bool:
    """Tell whether codes of a format can be multiplied as they are.

    Args:
        spec: of an operand.

    Returns:
        True for integers and floats of at most eight bits.
    """
    is_float8 = spec.format.kind == "float" and spec.format.bits == 8
    return spec.format.kind == "integer" or (
        is_float8 and spec.format.group_size is None
    )


def factor_of(w: QuantizedArray) -> Factor | None:
    """Take a stored array apart.

    Args:
        w: the array.

    Returns:
        Its codes and scales; None if they cannot be multiplied as they are.
    """
    plain = (w.outer_scale, w.permutation, w.input_scale) == (None, None, None)
    if not plain or not is_multiplied(w.spec):
        return None
    codes = w.codes
    if w.packed_axis is not None and w.packed_size is not None:
        codes = unpack_codes(
            codes,
            w.spec.format.bits,
            w.packed_size,
            axis=w.packed_axis,
            signed=w.spec.format.code_dtype == jnp.int8,
        )
    if w.order == "kn":
        return _factor(codes, Scale(w.scale, w.zero_point))
    zero_point = w.zero_point
    if zero_point is not None:
        zero_point = jnp.swapaxes(zero_point, -1, -2)
    stored = _factor(codes, Scale(jnp.swapaxes(w.scale, -1, -2), zero_point))
    return stored._replace(is_swapped=True)


def factor(x: jax.Array, scale: Scale, spec: QuantSpec) -> Factor:
    """Round an array to codes.

    Args:
        x: float array.
        scale: its scales.
        spec: of it; `is_multiplied` must hold.

    Returns:
        The codes and scales.
    """
    return _factor(compute_codes(x, scale, spec), scale)


def _factor(codes: jax.Array, scale: Scale) -> Factor:
    zero_point = scale.zero_point
    if zero_point is not None:
        zero_point = zero_point.astype(jnp.int32)
    if codes.dtype == jnp.uint8:  # fast products are those of signed bytes
        codes = (codes ^ 0x80).astype(jnp.int8)
        # A spec of unsigned codes is never symmetric, so there is a zero point.
        zero_point = None if zero_point is None else zero_point - 128
    return Factor(codes, effective_scale(scale), zero_point)


def multiply(site: Site, pair: Sequence[Factor]) -> jax.Array | None:
    """Compute the operation of a site on codes.

    Args:
        site: a `dot_general` or a convolution.
        pair: both operands.

    Returns:
        The float32 result; None where scales or zero points do not allow it, or where a
        sum of so many codes may not fit 32 bits.
    """
    if len({factor.codes.dtype == jnp.int8 for factor in pair}) > 1:
        return None
    if site.primitive == "dot_general":
        params = site.params
        return _dot(params["dimension_numbers"], pair, params.get("out_sharding"))
    if site.primitive == "conv_general_dilated":
        return _conv(site, pair)
    return None


def _fits(pair: Sequence[Factor], count: int) -> bool:
    """Tell whether sums of so many terms fit an int32.

    Before zero points are subtracted they need not: integers wrap, and wrap back.
    """
    if pair[0].codes.dtype != jnp.int8:
        return True
    largest = [128 if f.zero_point is None else 255 for f in pair]
    return count * math.prod(largest) < 2**31


def _dot(
    dimension_numbers: Any, pair: Sequence[Factor], out_sharding: Any
) -> jax.Array | None:
    contracted, batch = dimension_numbers
    sides = [
        _as_stored(f, c, b) for f, c, b in zip(pair, contracted, batch, strict=True)
    ]
    pair, contracted, batch = zip(*sides, strict=True)
    groups = {
        f.scale.shape[axis]
        for f, axes in zip(pair, contracted, strict=True)
        for axis in axes
        if f.scale.shape[axis] > 1
    }
    if not groups:
        count = math.prod(pair[0].codes.shape[a] for a in contracted[0])
        if not _fits(pair, count):
            return None
        return _product(contracted, batch, pair, out_sharding)
    sizes = [
        f.codes.shape[a] for f, axes in zip(pair, contracted, strict=True) for a in axes
    ]
    has_zero = any(f.zero_point is not None for f in pair)
    if len(groups) > 1 or len(sizes) > 2 or has_zero or groups == set(sizes):
        return None
    (count,) = groups
    places = [axes[0] for axes in contracted]
    split = [_split(f, axis, count) for f, axis in zip(pair, places, strict=True)]
    codes = align([f.codes for f in split], places)
    split = [f._replace(codes=c) for f, c in zip(split, codes, strict=True)]
    moved = [
        tuple(a + (a > axis) for a in lead) + (axis,)
        for lead, axis in zip(batch, places, strict=True)
    ]
    lead = len(batch[0])
    parts_sharding = insert_axis(out_sharding, lead, codes[0], places[0])
    parts = _product([(axis + 1,) for axis in places], moved, split, parts_sharding)
    return lay_out(jnp.sum(parts, axis=lead), out_sharding)


def _as_stored(f: Factor, contracted: Any, batch: Any) -> tuple[Factor, Any, Any]:
    """Name the axes of swapped codes as they lie in memory."""
    if not f.is_swapped:
        return f, contracted, batch
    last, before = f.codes.ndim - 1, f.codes.ndim - 2
    if not {last, before} & {*contracted, *batch}:  # results would be swapped too
        return f.swapped(), contracted, batch
    name = {last: before, before: last}
    contracted, batch = (
        tuple(name.get(a, a) for a in axes) for axes in (contracted, batch)
    )
    return f._replace(is_swapped=False), contracted, batch


def _split(f: Factor, axis: int, count: int) -> Factor:
    """Cut the contracted axis of codes into groups, each with one scale."""
    codes = split_axis(f.codes, axis, f.codes.shape[axis] // count)
    return Factor(codes, jnp.expand_dims(f.scale, axis + 1))


def _product(
    contracted: Any, batch: Any, pair: Sequence[Factor], out_sharding: Any
) -> jax.Array:
    numbers: Any = (tuple(map(tuple, contracted)), tuple(map(tuple, batch)))
    x, w = pair
    layouts = [_Layout(numbers, side, [f.codes.ndim for f in pair]) for side in (0, 1)]
    if x.codes.dtype != jnp.int8:
        total = lax.dot_general(
            x.codes,
            w.codes,
            numbers,
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding,
        )
    else:
        sums = integer_dot(x.codes, w.codes, numbers, out_sharding)
        sums = _subtract_zero_points(sums, pair, contracted, layouts)
        total = sums.astype(jnp.float32)
    for f, layout in zip(pair, layouts, strict=True):
        total = total * lay_like(layout(f.scale), total)
    return total


def _subtract_zero_points(
    sums: jax.Array, pair: Sequence[Factor], contracted: Any, layouts: Any
) -> jax.Array:
    zeros = [
        None if f.zero_point is None else lay_like(layout(f.zero_point), sums)
        for f, layout in zip(pair, layouts, strict=True)
    ]
    for i, zero in enumerate(zeros):
        if zero is None:
            continue
        codes, axes = pair[1 - i].codes, tuple(contracted[1 - i])
        others = jnp.sum(codes, axis=axes, keepdims=True, dtype=jnp.int32)
        sums = sums - zero * lay_like(layouts[1 - i](others), sums)
    if zeros[0] is not None and zeros[1] is not None:
        count = math.prod(pair[0].codes.shape[axis] for axis in contracted[0])
        sums = sums + count * zeros[0] * zeros[1]
    return sums


class _Layout:
    """Where the axes of one operand of a `dot_general` lie in its result."""

    def __init__(self, numbers: Any, side: int, ranks: Sequence[int]) -> None:
        contracted, batch = numbers
        free = [
            [a for a in range(rank) if a not in (*contracted[i], *batch[i])]
            for i, rank in enumerate(ranks)
        ]
        self._contracted = tuple(contracted[side])
        self._order = (*batch[side], *free[side])
        self._lead, self._side = len(batch[side]), side
        self._others = len(free[1 - side])

    def __call__(self, values: jax.Array) -> jax.Array:
        """Lay out values of the operand's rank, of size one where contracted."""
        if values.ndim == 0:
            return values
        values = jnp.transpose(values, (*self._contracted, *self._order))
        values = jnp.squeeze(values, tuple(range(len(self._contracted))))
        first = values.ndim if self._side == 0 else self._lead
        return jnp.expand_dims(values, tuple(range(first, first + self._others)))


def _conv(site: Site, pair: Sequence[Factor]) -> jax.Array | None:
    numbers = site.params["dimension_numbers"]
    x, w = pair = [f.swapped() if f.is_swapped else f for f in pair]
    kept = {numbers.lhs_spec[0]}, {numbers.rhs_spec[0]}
    for f, axes in zip(pair, kept, strict=True):
        if f.zero_point is not None or f.codes.dtype != jnp.int8:
            return None
        if any(n > 1 and a not in axes for a, n in enumerate(f.scale.shape)):
            return None
    count = math.prod(w.codes.shape[a] for a in numbers.rhs_spec[1:])
    if site.params["batch_group_count"] > 1 or not _fits(pair, count):
        return None
    sums = integer_conv(x.codes, w.codes, **_conv_params(site.params))
    places = numbers.out_spec[0], numbers.out_spec[1]
    total = sums.astype(jnp.float32)
    for f, place in zip(pair, places, strict=True):
        shape = [1] * total.ndim
        shape[place] = f.scale.size
        total = total * lay_like(f.scale.reshape(shape), total)
    return total


_CONV_PARAMS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "out_sharding",
)


def _conv_params(params: Any) -> dict[str, Any]:
    return {name: params.get(name) for name in _CONV_PARAMS}
