"""Rounding on the way forward, the identity on the way back.

A rounded number has the derivative 0 almost everywhere, which trains nothing. The
straight-through estimator takes the derivative of the clipped identity instead:

    dq/dw = 1 inside the range, 0 outside

(Bengio et al., arXiv:1308.3432). The value is the quantized one exactly, not
`w + (q - w)`, which may miss it by an ulp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jopt.arrays.codes import (
    check_array,
    check_scale,
    compute_levels,
    is_inside_range,
    scale_levels,
)
from jopt.arrays.rounding import Rounding, nearest
from jopt.arrays.scales import Scale, compute_range, compute_scale, highest_level
from jopt.arrays.specs import QuantSpec


@jax.custom_jvp
def straight_through(
    value: jax.Array, w: jax.Array, inside: jax.Array | None = None
) -> jax.Array:
    """Return `value` with the derivative of `w`, where `inside` holds.

    Args:
        value: any array.
        w: an array of the same shape and dtype.
        inside: a boolean array; None for everywhere.

    Returns:
        `value`, exactly.

    >>> jax.grad(lambda w: straight_through(jnp.round(w), w))(0.7)
    Array(1., dtype=float32, weak_type=True)
    """
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    value, w, inside = primals
    _, w_dot, _ = tangents
    out = straight_through(value, w, inside)  # for derivatives of the derivative
    if inside is None:
        return out, w_dot
    return out, jnp.where(inside, w_dot, jnp.zeros_like(w_dot))


def fake_quantize(
    w: ArrayLike,
    spec: QuantSpec,
    *,
    scale: Scale | ArrayLike | None = None,
    bits: ArrayLike | None = None,
    rounding: Rounding = nearest,
    key: jax.Array | None = None,
    path: str = "w",
) -> jax.Array:
    """Round an array to its grid, and let gradients pass straight through.

    Equals `dequantize(quantize_array(w, spec, ...))` bit for bit. The derivative is
    exactly 1; under given scales it is 0 where `w` is clipped, that is more than half a
    step beyond the last level (ternary and binary, whose scale is a mean and no range,
    pass all). Scales get no gradient.

    Args:
        w: float array of any shape.
        spec: the format, and which elements share a scale.
        scale: as for `quantize_array`.
        bits: a width that replaces that of an integer format; may be traced, so that a
            schedule compiles once.
        rounding: `nearest`, `stochastic` or a function like them.
        key: a PRNG key, for rules that need one.
        path: what errors call the array.

    Returns:
        An array of the shape and dtype of `w`.

    Raises:
        TypeError: `w` is not floating point.
        ValueError: the spec, the scales or the bits do not fit.

    References:
        Bengio et al., arXiv:1308.3432 (straight through); Jacob et al.,
        arXiv:1712.05877 (fake quantization).

    >>> from jopt.arrays import formats
    >>> w = jnp.array([0.3, -1.0, 0.8])
    >>> fake_quantize(w, QuantSpec(formats.int2))
    Array([ 0., -1.,  1.], dtype=float32)
    """
    w = check_array(w, spec, path)
    if bits is not None:
        highest_level(spec, bits)  # raises before tracing, with the value given
        bits = jnp.asarray(bits)
    given = None if scale is None else check_scale(scale, spec, w.shape, path)
    return _fake_quantize(w, given, bits, key, spec=spec, rounding=rounding)


@functools.partial(jax.jit, static_argnames=("spec", "rounding"), inline=True)
def _fake_quantize(
    w: jax.Array,
    scale: Scale | None,
    bits: jax.Array | None,
    key: jax.Array | None,
    *,
    spec: QuantSpec,
    rounding: Rounding,
) -> jax.Array:
    frozen, inside = lax.stop_gradient(w), None
    if scale is None:
        scale = compute_scale(*compute_range(frozen, spec), spec, bits=bits)
    else:
        scale = lax.stop_gradient(scale)
        inside = is_inside_range(frozen, scale, spec, bits=bits)
    levels = compute_levels(frozen, scale, spec, bits=bits, rounding=rounding, key=key)
    return straight_through(scale_levels(levels, scale, w.dtype), w, inside)
