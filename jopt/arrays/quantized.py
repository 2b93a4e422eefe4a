"""Arrays of few bits: codes, scales, and what turns them into numbers again.

    codes = clip(round(w / scale) + zero_point),     w ~ (codes - zero_point) * scale

in four steps that can be called alone, `compute_range`, `compute_scale`,
`compute_codes` and `decode`, or together: `quantize_array` returns a `QuantizedArray`
whose codes are really packed, `dequantize` its floats, and `fake_quantize` the same
floats, bit for bit, with the gradient of the identity (straight through; Bengio et al.,
arXiv:1308.3432). All arithmetic is float32, whatever the array's dtype.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jopt.arrays import quantized_shards, quantized_views
from jopt.arrays.codes import (
    check_array,
    check_scale,
    compute_codes,
    decode,
    round_to_dtype,
)
from jopt.arrays.compressed import CompressedArray
from jopt.arrays.packing import pack_codes, unpack_codes
from jopt.arrays.rounding import Rounding, nearest, stochastic
from jopt.arrays.scales import (
    Scale,
    compute_range,
    compute_scale,
    quotient,
    reduce_groups,
    sum_groups,
)
from jopt.arrays.specs import QuantSpec, check_spec, group_axis, scale_shape
from jopt.arrays.straight_through import fake_quantize, straight_through

__all__ = [
    "QuantSpec",
    "QuantizedArray",
    "Rounding",
    "Scale",
    "check_spec",
    "compute_codes",
    "compute_range",
    "compute_scale",
    "decode",
    "dequantize",
    "fake_quantize",
    "from_codes",
    "nearest",
    "quantize_array",
    "scale_shape",
    "stochastic",
    "straight_through",
    "sum_groups",
]

Order = Literal["kn", "nk"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedArray(CompressedArray):
    """An array stored as codes of a few bits and scales.

    Invariants:
        * Scales have the rank of the array, in its axis order whatever `order` is, and
          sizes that divide its sizes; zero points have the shape of the scales.
        * Codes are packed along the axis that groups run along, which no stacked axis
          ever is: a code never shares its byte with another layer's, and a group's
          codes fill whole bytes whatever the number of outputs.
        * Shape, size and bytes follow from the children. So `lax.scan` may slice a
          leading axis off all of them, and `vmap` may add one.
        * `dequantize` depends on the children and static fields alone, not on how they
          were computed.

    Attributes:
        codes: uint8 packed, or int8, uint8 or float8 where a code fills a byte.
        scale: of `spec.scale_dtype`.
        zero_point: of the codes' unpacked dtype; asymmetric specs only.
        outer_scale: float32 of the array's rank; nvfp4 only.
        input_scale: float of the array's rank, sizes 1 or the array's; `dequantize`
            divides by it (activation-aware scaling multiplied the weights by it).
        permutation: int `[..., size]` along the axis that groups run along (leading
            axes as the array's): stored element i is element permutation[i] of `w`.
        spec: how it was quantized, explicit axes counted from the end.
        dtype: that `dequantize` returns.
        packed_axis: of the stored codes, counted from the end; None if not packed.
        packed_size: number of codes along `packed_axis`.
        order: "kn" as the array; "nk" if codes are stored with the last two axes
            swapped, which integer dot products prefer.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    outer_scale: jax.Array | None = None
    input_scale: jax.Array | None = None
    permutation: jax.Array | None = None
    spec: QuantSpec = dataclasses.field(kw_only=True, metadata={"static": True})
    dtype: np.dtype = dataclasses.field(kw_only=True, metadata={"static": True})
    packed_axis: int | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )
    packed_size: int | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )
    order: Order = dataclasses.field(
        default="kn", kw_only=True, metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the codes stand for."""
        shape = list(self.codes.shape)
        if self.packed_axis is not None and self.packed_size is not None:
            shape[self.packed_axis] = self.packed_size
        if self.order == "nk":
            shape[-2:] = shape[-1], shape[-2]
        return tuple(shape)

    def to_array(self) -> jax.Array:
        """Compute the floats that the codes stand for, as `dequantize` does."""
        return _dequantize(self)

    def after(
        self, primitive: str, params: Mapping[str, Any], operands: Sequence[Any]
    ) -> Any:
        """Take a view without decoding, see `jopt.arrays.quantized_views`."""
        return quantized_views.view(self, primitive, params, operands)

    def partition_specs(
        self, spec: PartitionSpec, sizes: Mapping[str, int]
    ) -> "QuantizedArray | None":
        """Say how the parts lie on the devices of a `shard_map`."""
        return quantized_shards.partition_specs(self, spec, sizes)

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):
            return f"QuantizedArray({self.spec!r})"
        return (
            f"QuantizedArray({self.dtype}{list(self.shape)}, {self.spec!r}, "
            f"{self.bits_per_weight:.4g} bits per weight)"
        )


def quantize_array(
    w: ArrayLike,
    spec: QuantSpec,
    *,
    scale: Scale | ArrayLike | None = None,
    rounding: Rounding = nearest,
    key: jax.Array | None = None,
    order: Order = "kn",
    path: str = "w",
) -> QuantizedArray:
    """Quantize a float array to packed codes and scales.

    codes = clip(round(w / scale) + zero_point)

    Args:
        w: float array of any shape.
        spec: the format, and which elements share a scale.
        scale: scales to use (a `Scale`, or the array of one without zero points);
            computed from the range of `w` when None. Under given scales, numbers beyond
            the range are clipped, and a group with NaN gets a NaN scale.
        rounding: `nearest`, `stochastic` or a function like them.
        key: a PRNG key, for rules that need one.
        order: "nk" to store codes with the last two axes swapped.
        path: what errors call the array.

    Returns:
        A `QuantizedArray` that `dequantize` turns into an array of the shape and dtype
        of `w`. A group that holds NaN or infinity reads NaN throughout.

    Raises:
        TypeError: `w` is not floating point.
        ValueError: the spec or the scales do not fit `w`.

    >>> from jopt.arrays import formats
    >>> w = jnp.linspace(-1.0, 1.0, 256).reshape(64, 4)
    >>> quantize_array(w, QuantSpec(formats.int4, group_size=32))
    QuantizedArray(float32[64, 4], QuantSpec(int4, group_size=32), 4.5 bits per weight)
    """
    w = check_array(w, spec, path)
    if order not in ("kn", "nk") or (order == "nk" and w.ndim < 2):
        raise ValueError(
            f"order must be 'kn', or 'nk' for two axes or more, got {order!r} "
            f"for {path!r} of shape {w.shape}"
        )
    given = None if scale is None else check_scale(scale, spec, w.shape, path)
    return _quantize(w, given, key, spec=spec, rounding=rounding, order=order)


def dequantize(tree: Any) -> Any:
    """Turn quantized and other compressed arrays into floats.

    w = unpermute((level(codes) - zero_point) * scale * outer_scale) / input_scale

    Args:
        tree: a `QuantizedArray` or any other compressed array, or a tree with some as
            leaves.

    Returns:
        The float array, or the tree with float arrays in place of compressed ones and
        all other leaves as they were.

    >>> from jopt.arrays import formats
    >>> q = quantize_array(jnp.array([3.5, -7.0]), QuantSpec(formats.int4))
    >>> dequantize([q, "other"])
    [Array([ 4., -7.], dtype=float32), 'other']
    """
    return jax.tree.map(
        lambda leaf: leaf.to_array() if isinstance(leaf, CompressedArray) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, CompressedArray),
    )


@functools.partial(jax.jit, static_argnames=("spec", "rounding", "order"), inline=True)
def _quantize(
    w: jax.Array,
    scale: Scale | None,
    key: jax.Array | None,
    *,
    spec: QuantSpec,
    rounding: Rounding,
    order: Order,
) -> QuantizedArray:
    if scale is None:
        scale = compute_scale(*compute_range(w, spec), spec)
    else:
        scale = _nan_where_group_is(scale, w)
    codes = compute_codes(w, scale, spec, rounding=rounding, key=key)
    return from_codes(codes, scale, spec, w.dtype, order=order)


def from_codes(
    codes: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    dtype: DTypeLike,
    *,
    input_scale: jax.Array | None = None,
    order: Order = "kn",
) -> QuantizedArray:
    """Pack codes that were found by whatever means.

    Args:
        codes: unpacked, of `spec.format.code_dtype`.
        scale: their scales.
        spec: how they are to be read.
        dtype: of the floats that they stand for.
        input_scale: that the floats were multiplied by, see `QuantizedArray`.
        order: as for `quantize_array`.

    Returns:
        The quantized array.
    """
    ndim, axis = codes.ndim, group_axis(codes.ndim, spec)
    if order == "nk":
        codes = jnp.swapaxes(codes, -1, -2)
        axis = {-1: -2, -2: -1}.get(axis, axis) if axis is not None else None
    packed_axis = axis if spec.format.bits < 8 else None
    packed_size = None
    if packed_axis is not None:
        packed_size = codes.shape[packed_axis]
        codes = pack_codes(codes, spec.format.bits, axis=packed_axis)
    return QuantizedArray(
        codes,
        *scale,
        input_scale=input_scale,
        spec=_counted_from_end(spec, ndim),
        dtype=jnp.dtype(dtype),
        packed_axis=packed_axis,
        packed_size=packed_size,
        order=order,
    )


@functools.partial(jax.jit, inline=True)
def _dequantize(q: QuantizedArray) -> jax.Array:
    codes = q.codes
    if q.packed_axis is not None and q.packed_size is not None:
        codes = unpack_codes(
            codes,
            q.spec.format.bits,
            q.packed_size,
            axis=q.packed_axis,
            signed=q.spec.format.code_dtype == jnp.int8,
        )
    if q.order == "nk":
        codes = jnp.swapaxes(codes, -1, -2)
    scale = Scale(q.scale, q.zero_point, q.outer_scale)
    w = decode(codes, scale, q.spec)
    if q.permutation is not None:
        w = _unpermute(w, q.permutation, group_axis(q.ndim, q.spec))
    if q.input_scale is not None:
        w = quotient(w, q.input_scale.astype(jnp.float32))
    return round_to_dtype(w, q.dtype)


def _unpermute(w: jax.Array, permutation: jax.Array, axis: int | None) -> jax.Array:
    """Put element i of an axis to the place permutation[..., i]."""
    axis = -1 if axis is None else axis
    places = jnp.argsort(permutation, axis=-1)
    if places.ndim == 1:
        return jnp.take(w, places, axis=axis)
    lanes = [1] * w.ndim
    lanes[: places.ndim - 1] = places.shape[:-1]
    lanes[axis] = places.shape[-1]
    return jnp.take_along_axis(w, places.reshape(lanes), axis=axis)


def _nan_where_group_is(scale: Scale, w: jax.Array) -> Scale:
    """Give groups with NaN the scale NaN, because integer codes hold none."""
    is_nan = jnp.isnan(reduce_groups(w, scale.scale.shape, _max_or_zero))
    step = jnp.where(is_nan, jnp.nan, scale.scale.astype(jnp.float32))
    return scale._replace(scale=step.astype(scale.scale.dtype))


def _max_or_zero(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    return jnp.max(x, axis=axis, initial=0)


def _counted_from_end(spec: QuantSpec, ndim: int) -> QuantSpec:
    """Name axes so that leading axes may come and go."""
    if spec.axis is None:
        return spec if ndim >= 2 else dataclasses.replace(spec, axis=())
    axes = spec.axis if isinstance(spec.axis, tuple) else (spec.axis,)
    axes = tuple(a - ndim if a >= 0 else a for a in axes)
    return dataclasses.replace(
        spec, axis=axes if isinstance(spec.axis, tuple) else axes[0]
    )
