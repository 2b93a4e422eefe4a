"""Real execution of quantized parameters: codes times codes where that is possible.

    execute(apply)(packed, x)                     apply(dequantize(packed), x)
    execute(apply, activations=spec)(packed, x)   int8 x int8 -> int32 at every site

The results are those of the function that `fake_quantize` returns: with scales that are
powers of two bit for bit, as long as sums of codes stay below 2^24, where float32 is
exact, and elsewhere to the rounding of one product: in float32 to that of its sums; in
bfloat16 and float16, where fake-quantized operands are rounded to the dtype and codes
are not, to four half ulps of sum |x||w|. So are the gradients: codes have none, so the
derivative is that of the product of floats that they stand for.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.quantized import QuantizedArray, quantize_array
from jopt.arrays.quantized_plus_low_rank import QuantizedPlusLowRank
from jopt.arrays.ranges import scale_of
from jopt.arrays.scales import Scale, compute_range, compute_scale, reduce_groups
from jopt.arrays.specs import QuantSpec
from jopt.programs import interpret, sites
from jopt.programs.batches import check_apply
from jopt.programs.handlers import Handler, Use
from jopt.quantization import microscaled, products
from jopt.quantization.low_rank import multiply_low_rank
from jopt.quantization.operands import (
    Activations,
    check_activations,
    is_float,
    range_at,
    ranges_of,
    round_operand,
    site_specs,
    static_spec,
)
from jopt.quantization.roles import operand_spec
from jopt.trees.calibration import Calibration, Pair


def execute(
    apply: Callable[..., Any], *, activations: Activations = None
) -> Callable[..., Any]:
    """Run a function on quantized parameters.

    y = s_x s_w (c_x c_w),   the product of codes in int32

    Args:
        apply: a pure function `apply(params, *inputs)` of float params.
        activations: None for weight-only execution; a `jopt.QuantSpec` or rules over
            site names for ranges from each input; a `jopt.Calibration` for static
            ranges. As for `jopt.fake_quantize`.

    Returns:
        `apply'(packed, *inputs)`, whose params may have `QuantizedArray` leaves, as
        `jopt.quantize(params, spec, sites=...)` makes them. Sites where codes cannot be
        multiplied (formats with a codebook, zero points or batch groups in
        convolutions, scales that vary along what is contracted, sums beyond 32 bits)
        round their input and multiply floats. Grouped, depthwise and transposed
        convolutions multiply codes, on CPUs as float32 numbers, exactly, because XLA
        has no fast integer form of them: the same results, at the speed of floats.
        Rows (of convolutions: images) that hold NaN give NaN.

    Raises:
        TypeError: `apply` is no function, or `activations` says nothing of inputs.
        ValueError: (when called) a rule or a calibration fits no site.

    References:
        Jacob et al., arXiv:1712.05877.

    >>> import jax.numpy as jnp, jopt
    >>> int8 = jopt.QuantSpec(jopt.formats.int8)
    >>> apply = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.array([[127.0], [2.0]])}, jnp.array([[127.0, 1.0]])
    >>> packed = jopt.quantize(params, int8, sites=jopt.sites(apply, params, x))
    >>> execute(apply, activations=int8)(packed, x)
    Array([[16131.]], dtype=float32)
    """
    check_apply(apply)
    check_activations(activations)

    @interpret.compiled_if_eager
    def run(params: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        analysis = sites.analyse(apply, params, inputs, kwargs)
        pairs = site_specs(activations, analysis.table)
        calibration = activations if isinstance(activations, Calibration) else None
        values = ranges_of(calibration, pairs)
        # Stored weights are followed to their sites in any case: a layer is decoded
        # where it is used, and gathered over devices in its few bits.
        handler = Handler(
            lambda use: _compute(use, pairs.get(use.site.name)),
            select=lambda site: site.is_weight or site.name in pairs,
        )
        return interpret.evaluate(analysis, handler, params, inputs, kwargs, values)

    def executed(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return run(params, inputs, kwargs)

    return functools.wraps(apply)(executed) if hasattr(apply, "__name__") else executed


def _compute(use: Use, specs: Pair | None) -> jax.Array:
    """Multiply codes if both operands have some, else rounded floats.

    What differs from call to call are arguments of both ways to compute, so that their
    derivatives know of it. Beside codes, the low rank of a weight meets the input as it
    is.
    """
    if isinstance(use.weight, QuantizedPlusLowRank):
        thin = multiply_low_rank(use)
        if thin is not None:
            operands = list(use.operands)
            operands[use.site.operand] = use.weight.residual
            plain = _compute(dataclasses.replace(use, operands=tuple(operands)), specs)
            return plain + thin.astype(plain.dtype)
    if specs is None:
        return use.run()
    given = use.operands, use.value
    if jax.eval_shape(functools.partial(_codes, use, specs), *given) is None:
        return _floats(use, specs, *given)
    return _straight_through(
        functools.partial(_codes, use, specs), functools.partial(_floats, use, specs)
    )(*given)


def _codes(use: Use, specs: Pair, operands: Any, value: Any) -> jax.Array | None:
    """Multiply codes, where both operands have some and allow it."""
    use = dataclasses.replace(use, operands=operands, value=value)
    both = [_factor(use, i, spec) for i, spec in enumerate(specs)]
    result = None
    if all(isinstance(f, products.Factor) for f in both):
        result = products.multiply(use.site, both)
    elif all(isinstance(f, QuantizedArray) for f in both):
        result = microscaled.microscaled_dot(use.site, tuple(both))
    return None if result is None else result.astype(use.site.out_shape.dtype)


def _floats(use: Use, specs: Pair, operands: Any, value: Any) -> jax.Array:
    """Multiply rounded floats, as `fake_quantize` does."""
    use = dataclasses.replace(use, operands=operands, value=value)
    rounded = [
        x if spec is None or not is_float(x) else round_operand(use, i, spec)
        for i, (x, spec) in enumerate(zip(operands, specs, strict=True))
    ]
    return use.default(*rounded)


def _straight_through(
    function: Callable[..., Any], surrogate: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """Return a function with the derivative of another one, of the same arguments."""
    straight = jax.custom_jvp(function)

    def rule(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        # Decoded weights are computed again on the way back, not kept until then.
        _, tangent = jax.jvp(jax.checkpoint(surrogate), primals, tangents)
        return straight(*primals), tangent

    straight.defjvp(rule)
    return straight


def _factor(use: Use, i: int, spec: QuantSpec | None) -> Any:
    """Take an operand as codes: a stored one as it is, a float one rounded."""
    x = use.operands[i]
    if isinstance(x, QuantizedArray):
        return x if x.spec.format.group_size else products.factor_of(x)
    if spec is None or not is_float(x):
        return None
    ends = range_at(use, i)
    if ends is not None:
        spec = static_spec(spec)
        if not products.is_multiplied(spec):
            return None
        scale = scale_of(ends, spec, x.ndim)
        if spec.format.kind == "integer":
            scale = _with_nan(scale, x, use.site.operand_roles[i])
        return products.factor(x, scale, spec)
    spec = operand_spec(spec, use.site.operand_roles[i])
    if spec.format.group_size:
        return quantize_array(x, spec, path=f"input of {use.site.name}")
    if not products.is_multiplied(spec):
        return None
    scale = compute_scale(*compute_range(x, spec), spec)
    return products.factor(x, scale, spec)


def _with_nan(scale: Scale, x: jax.Array, roles: Sequence[str]) -> Scale:
    """Give rows with NaN the scale NaN, because integer codes hold none."""
    shape = tuple(1 if r == "in" else n for n, r in zip(x.shape, roles, strict=True))
    # The largest of numbers with NaN is NaN, and a read of them as they are is fast.
    is_nan = jnp.isnan(reduce_groups(x, shape, _largest))
    return scale._replace(scale=jnp.where(is_nan, jnp.nan, scale.scale))


def _largest(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    return jnp.max(x, axis=axis, initial=0)
