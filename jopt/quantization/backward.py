"""Rounded gradients: what arrives at a product from behind, in few bits.

    y = x w,      dx = Q_x(dy) w^T,   dw = x^T Q_w(dy)

Both products of the backward pass meet a rounded dy, each with scales that are constant
along what it contracts: for dx one per token, for dw one per output. The forward pass
keeps every bit. Products are those of floats that lie on the grids: what integers would
give, to the rounding of sums.

References:
    Wu et al., Training and Inference with Integers in Deep Neural Networks,
    arXiv:1802.04680; Zhou et al., DoReFa-Net, arXiv:1606.06160 (stochastic rounding of
    gradients); Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433
    (e5m2 for gradients).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jopt.arrays.quantized import fake_quantize
from jopt.arrays.rounding import Rounding
from jopt.arrays.specs import QuantSpec
from jopt.arrays.straight_through import straight_through
from jopt.programs.operations import Site
from jopt.quantization.operands import is_float
from jopt.quantization.roles import operand_spec
from jopt.trees import paths


def round_gradients(
    compute: Callable[..., jax.Array],
    operands: Sequence[Any],
    site: Site,
    spec: QuantSpec,
    *,
    rounding: Rounding,
    key: jax.Array | None,
    is_on: jax.Array | None,
) -> jax.Array:
    """Compute an operation whose backward pass meets a rounded cotangent.

    Args:
        compute: of both operands.
        operands: both.
        site: which one it is.
        spec: of cotangents; explicit axes are those of the result.
        rounding: the rule.
        key: a PRNG key, for rules that need one.
        is_on: whether to round, None for always.

    Returns:
        What `compute` returns, bit for bit.
    """
    value = compute(*operands)
    terms = []
    for i, x in enumerate(operands):
        if not is_float(x):
            continue
        others = [o if j == i else lax.stop_gradient(o) for j, o in enumerate(operands)]
        resolved = operand_spec(_wide(spec), cotangent_roles(site, i))
        number = None
        if key is not None:
            name = paths.fold_path(key, f"{site.name} {i}")
            number = jax.random.key_data(name)
        rounded = _rounder(resolved, rounding, site.name, key)
        on = jnp.bool_(True) if is_on is None else is_on
        terms.append(rounded(compute(*others), number, on))
    if not terms:
        return value
    # The terms are there for their derivatives; the value is that of the operation.
    return straight_through(lax.stop_gradient(value), sum(terms[1:], terms[0]))


def _wide(spec: QuantSpec) -> QuantSpec:
    """Give scales that are not stored their full precision.

    A rounded one may clip the largest number, which is then too small on average.
    """
    if spec.format.scale_type is not None:
        return spec
    return dataclasses.replace(spec, scale_dtype=jnp.float32)


def _rounder(
    spec: QuantSpec, rounding: Rounding, name: str, key: jax.Array | None
) -> Callable[..., jax.Array]:
    """Return the identity whose derivative rounds what comes back."""
    impl = None if key is None else jax.random.key_impl(key)

    @jax.custom_vjp
    def identity(y: jax.Array, number: Any, on: jax.Array) -> jax.Array:
        return y

    def forward(y: jax.Array, number: Any, on: jax.Array) -> tuple[jax.Array, Any]:
        return y, (number, on)

    def backward(kept: Any, g: jax.Array) -> tuple[jax.Array, Any, Any]:
        number, on = kept
        noise = None
        if number is not None:
            # A scan runs a site often: other gradients draw other numbers.
            noise = jax.random.wrap_key_data(number, impl=impl)
            noise = jax.random.fold_in(noise, _bits_of(g))
        q = fake_quantize(
            g, spec, rounding=rounding, key=noise, path=f"gradient of {name}"
        )
        zeros = jax.tree.map(
            lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), (number, on)
        )
        return jnp.where(on, q, g), *zeros

    identity.defvjp(forward, backward)
    return identity


def _bits_of(x: jax.Array) -> jax.Array:
    """Mix the bits of an array into one number, in any order of its elements."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    mixed = (bits ^ (bits >> 15)) * np.uint32(0x2C1B3C6D)
    return jnp.sum(mixed ^ (mixed >> 12), dtype=jnp.uint32)


def cotangent_roles(site: Site, operand: int) -> tuple[str, ...]:
    """Return the roles of the axes of a result in the product that makes a gradient.

    Args:
        site: an operation.
        operand: whose gradient.

    Returns:
        "in" for what is contracted: the outputs of the other operand.
    """
    roles = site.operand_roles
    rank = len(site.out_shape.shape)
    if site.primitive == "conv_general_dilated":
        batch, feature, *_ = site.params["dimension_numbers"].out_spec
        kept = batch if operand == 0 else feature
        return tuple("out" if a == kept else "in" for a in range(rank))
    if site.primitive == "dot_general":
        lead = roles[0].count("batch")
        rows = roles[0].count("out")
        kinds = ["batch"] * lead + ["out"] * rows
        kinds += ["in"] * (rank - lead - rows)
        if operand == 1:
            kinds[lead:] = ["in"] * rows + ["out"] * (rank - lead - rows)
        return tuple(kinds)
    return ("in",) * rank  # groups of rows: one scale
