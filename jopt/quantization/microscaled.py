"""Products of microscaled operands: blocks of small floats that share a scale.

    y[m, n] = sum_b s_x[m, b] s_w[n, b] sum_{k in b} x[m, k] w[n, k],   b a block,

is one instruction on hardware that has it, and `jax.nn.scaled_matmul` in JAX, for
mxfp8 (blocks of 32) and nvfp4 (of 16, with an outer scale per matrix).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.arrays.formats import decode_levels
from jopt.arrays.packing import unpack_codes
from jopt.arrays.quantized import QuantizedArray
from jopt.programs import compat
from jopt.programs.operations import Site

_ELEMENTS = {"mxfp8": jnp.float8_e4m3fn, "nvfp4": jnp.float4_e2m1fn}


class _Matrix(NamedTuple):
    """An operand as `[batch, rows, columns]`, and the sizes of batch and rows."""

    codes: jax.Array
    scale: jax.Array
    outer_scale: jax.Array | None
    batch: tuple[int, ...]
    rows: tuple[int, ...]


def microscaled_dot(
    site: Site, pair: tuple[QuantizedArray, QuantizedArray]
) -> jax.Array | None:
    """Multiply two microscaled arrays block by block.

    Args:
        site: of a `dot_general`.
        pair: both operands, of one format.

    Returns:
        The float32 result; None where this operation, these blocks or this backend do
        not allow it.
    """
    names = {q.spec.format.name for q in pair}
    if site.primitive != "dot_general" or len(names) > 1 or not names <= set(_ELEMENTS):
        return None
    if site.params.get("out_sharding") is not None or not compat.has_scaled_matmul():
        return None
    contracted, batch = site.params["dimension_numbers"]
    if len(contracted[0]) != 1:
        return None
    sides = [
        _matrix(q, axes[0], lead)
        for q, axes, lead in zip(pair, contracted, batch, strict=True)
    ]
    x, w = sides
    if x is None or w is None:
        return None
    out = jax.nn.scaled_matmul(x.codes, w.codes, x.scale, w.scale)
    out = out.reshape(*x.batch, *x.rows, *w.rows)
    for side in sides:
        if side is not None and side.outer_scale is not None:
            out = out * side.outer_scale
    return out


def _matrix(q: QuantizedArray, column: int, batch: Any) -> _Matrix | None:
    size = q.spec.format.group_size
    groups = q.scale.shape[column] * (size or 0)
    if groups != q.shape[column] or q.permutation is not None:
        return None
    outer = q.outer_scale
    if outer is not None and outer.size > 1:  # one per layer: a batch of matrices
        return None
    codes = q.codes
    if q.packed_axis is not None and q.packed_size is not None:
        codes = unpack_codes(
            codes, q.spec.format.bits, q.packed_size, axis=q.packed_axis, signed=False
        )
    if q.order == "nk":
        codes = jnp.swapaxes(codes, -1, -2)
    dtype = _ELEMENTS[q.spec.format.name]
    if codes.dtype != dtype:
        codes = decode_levels(codes, q.spec.format).astype(dtype)
    rows = [a for a in range(q.ndim) if a != column and a not in batch]
    order = (*batch, *rows, column)
    lead = tuple(q.shape[a] for a in batch)
    sizes = tuple(q.shape[a] for a in rows)

    def arranged(x: jax.Array) -> jax.Array:
        x = jnp.transpose(x, order)
        return x.reshape(math.prod(lead), math.prod(sizes), x.shape[-1])

    outer = None if outer is None else outer.reshape(())
    return _Matrix(arranged(codes), arranged(q.scale), outer, lead, sizes)
