"""Quantization with calibration data: codes chosen for what a layer computes.

For each matrix that multiplies, y = x w with w [columns, outputs], the inputs that it
meets in a few batches say which errors of its weights matter:

    packed, report = gptq(apply, params, batches, jopt.QuantSpec(jopt.formats.int4))

Earlier layers are quantized first, and later ones see what that does to their inputs
(`error_propagation`). All take any function, stacked layers, kernels of many axes,
convolutions and experts, and every format that has no scale of its own per element.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jopt.arrays.scale_fits import Fit, by_range, by_squared_error
from jopt.quantization import awq as awq_rule
from jopt.quantization.gptq import (
    before_its_turn,
    check,
    input_order,
    prepare,
    round_prepared,
)
from jopt.quantization.layer_report import QuantizationReport
from jopt.quantization.layer_solving import Method
from jopt.quantization.layers import quantize_layers
from jopt.quantization.nearest import round_to_nearest
from jopt.quantization.specs import SpecOrRules
from jopt.trees import rules


def gptq(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec_or_rules: SpecOrRules,
    *,
    select: rules.Select = None,
    error_propagation: bool = True,
    correction: float = 0.0,
    activation_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
    fit: Fit = by_squared_error,
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, QuantizationReport]:
    """Quantize by GPTQ: inputs that are rounded later make up for those before.

    Per matrix, with H = X^T X + damping mean(diag(X^T X)) I over all rows X that meet
    it, and R^T R = H^-1, R upper triangular, inputs i are taken one after another:

        q_i = round(w_i),   W_j -= R_ij (w_i - q_i) / R_ii   for j > i

    What it costs: with `error_propagation`, one forward pass over all batches for each
    layer of each group of sites with one input (query, key and value share theirs), and
    one Gram matrix per size of input at a time. Without it, one pass, and all Gram
    matrices, float32 `[columns, columns]` per layer, at once.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        batches: of inputs; each item is the tuple of inputs after `params`, and a bare
            array or dict counts as one input. Passed over more than once: an iterator
            is read into a list, any other iterable must give the same batches again.
        spec_or_rules: a `jopt.QuantSpec` of any format, or rules `{path pattern: spec
            or None}`, the first match deciding. Where `axis` is left out scales are per
            output (and layer, and expert), and groups run along the inputs. Where
            `narrow_range` is left out symmetric integers use all their codes, -8 to 7
            in int4, with scales of either sign, unless a leaf is on the narrow grid.
        select: which leaves: a predicate `(path, leaf) -> bool` such as
            `jopt.matching(...)`, a tree of bools, or None for float leaves that only
            multiply, of two axes or more not counting stacked layers.
        error_propagation: whether a layer sees the inputs that the quantized layers
            before it give, instead of those of the floats.
        correction: how much a layer makes up for what quantized layers before it did to
            its inputs, in [0, 1] (QEP): with X' the inputs that the floats give, W is
            W + correction (X^T X + damping)^-1 X^T (X' - X) W before it is quantized.
            1 fits the calibration data best; 0.5 is usual. Errors in the report are
            then of that W. Both models run in each pass, so it costs twice the time and
            two more copies of the params. Not for functions with a `ragged_dot` or a
            `shard_map`.
        activation_order: whether inputs that are large come first, with the scales that
            the weights have before anything is rounded. It helps where few inputs are
            much larger than others.
        static_groups: whether groups have the scales that their weights have before
            anything is rounded, also in the order of the inputs, instead of those that
            they have by their turn. It loses less in groups of 128 at 3 and 2 bits
            where `fit=jopt.scale_fits.by_range`, and a little more by default.
        block_size: inputs whose errors are passed on together.
        damping: part of the mean of the diagonal that is added to it.
        fit: how scales follow from weights, a function of `jopt.scale_fits`: ranges
            are shrunk where that lowers their squared error, one of twelve shares;
            `by_range` takes the whole range, `least_error()` searches finer.
        errors: whether the report says what each layer loses of its results.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`: the params with `QuantizedArray` leaves, for `jopt.execute`,
        `jopt.dequantize` and `jopt.save`; and a row per layer with the relative error
        ||X W - X Q||^2 / ||X W||^2 and the signal-to-noise ratio of the weights, the
        worst first where it is printed, and what was left alone and why.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: there is no batch or nothing to quantize, a spec does not fit its
            leaf, a leaf is compressed already, or inputs are not finite.

    References:
        Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative
        Pre-trained Transformers, arXiv:2210.17323; Arai and Ichikawa, Quantization
        Error Propagation, arXiv:2504.09629.

    >>> import jax.numpy as jnp, jopt
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[-8.0], [2.4]])}
    >>> x = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> packed, report = gptq(apply, params, [x], jopt.QuantSpec(jopt.formats.int4))
    >>> print(report)
      layer    shape   format    bits   SNR dB      error
     ─────────────────────────────────────────────────────
      w       [2, 1]     int4   12.00     26.4   5.07e-03
    """
    options = (
        ("activation_order", activation_order),
        ("static_groups", static_groups),
        ("block_size", block_size),
        ("damping", damping),
        ("fit", fit),
    )
    check(**dict(options))  # type: ignore[arg-type]
    method = Method(
        "gptq",
        round_prepared,
        prepare=prepare,
        order=input_order if activation_order else None,
        options=options,
        fit=fit if activation_order or static_groups else before_its_turn(fit),
    )
    return quantize_layers(
        method,
        apply,
        params,
        batches,
        spec_or_rules,
        select=select,
        error_propagation=error_propagation,
        correction=correction,
        errors=errors,
        progress=progress,
    )


def awq(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec_or_rules: SpecOrRules,
    *,
    select: rules.Select = None,
    error_propagation: bool = True,
    num_alphas: int = 20,
    clip: bool = True,
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, QuantizationReport]:
    """Quantize by AWQ: weights that meet large inputs are rounded more finely.

    Per matrix, inputs i are scaled by s_i = mean|x_i|^alpha, normalised to
    sqrt(max s min s) = 1, and W is stored as round(s W), which stands for
    Q = round(s W) / s. Alpha is the one of a grid over [0, 1) with the smallest
    ||X W - X Q||^2, computed exactly from the Gram matrix; alpha = 0 is rounding to
    nearest, so no layer is worse than with that. Nothing has to precede the layer: s is
    kept as the `input_scale` of the `QuantizedArray`, one number per input, and layers
    that share an input may have scales of their own.

    What it costs: the passes of `gptq`, and per matrix `num_alphas` products of the
    Gram matrix with the weights.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        batches: of inputs, as for `gptq`.
        spec_or_rules: a `jopt.QuantSpec`, or rules, as for `gptq`. Outputs must have
            scales of their own, as they have where `axis` is left out.
        select: which leaves, as for `gptq`.
        error_propagation: whether a layer sees the inputs that the quantized layers
            before it give.
        num_alphas: how many of 0, 1/n, 2/n, ... are tried.
        clip: whether the range of each group may then shrink, by up to a half, where
            that lowers the loss. Formats with an outer scale (nvfp4) keep their ranges.
        errors: whether the report says what each layer loses of its results.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`, as for `gptq`. `jopt.execute(apply)` runs it as it runs any
        other; with `activations=` inputs are rounded and products are of floats,
        because what is contracted has scales: for products of integers, `jopt.smooth`.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: as for `gptq`, or outputs share a scale.

    References:
        Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and
        Acceleration, arXiv:2306.00978.

    >>> import jax.numpy as jnp, jopt
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[0.6], [7.0]])}
    >>> x, spec = jnp.diag(jnp.array([10.0, 0.1])), jopt.QuantSpec(jopt.formats.int4)
    >>> errors = [f(apply, params, [x], spec)[1]["w"].error for f in (awq, rtn)]
    >>> errors[0] < 0.05 * errors[1]
    True
    """
    awq_rule.check(num_alphas=num_alphas, clip=clip)
    method = Method(
        "awq",
        awq_rule.scale_and_round,
        "magnitudes",
        options=(("clip", clip), ("num_alphas", num_alphas)),
        has_own_scales=True,
    )
    return quantize_layers(
        method,
        apply,
        params,
        batches,
        spec_or_rules,
        select=select,
        error_propagation=error_propagation,
        errors=errors,
        progress=progress,
    )


def rtn(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec_or_rules: SpecOrRules,
    *,
    select: rules.Select = None,
    error_propagation: bool = True,
    correction: float = 0.0,
    fit: Fit = by_range,
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, QuantizationReport]:
    """Round to nearest, and measure on real inputs what that does to every layer.

    The codes are those of `jopt.quantize(params, spec, sites=..., fit=fit)`, which
    needs no batches, with `narrow_range=False` where the spec leaves that open; this is
    the yardstick of the others. Arguments, results and errors are those of `gptq`.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        batches: of inputs, as for `gptq`.
        spec_or_rules: a `jopt.QuantSpec`, or rules, as for `gptq`.
        select: which leaves, as for `gptq`.
        error_propagation: whether errors are measured on the inputs that the quantized
            layers before it give.
        correction: as for `gptq`.
        fit: how scales follow from weights, as for `gptq`.
        errors: whether the report says what each layer loses of its results.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`, as for `gptq`.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: as for `gptq`.

    >>> import jax.numpy as jnp, jopt
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[-8.0], [2.4]])}
    >>> packed, _ = rtn(apply, params, [jnp.eye(2)], jopt.QuantSpec(jopt.formats.int4))
    >>> jopt.dequantize(packed)["w"][:, 0]
    Array([-8.,  2.], dtype=float32)
    """
    return quantize_layers(
        Method("rtn", round_to_nearest, "squares", fit=fit),
        apply,
        params,
        batches,
        spec_or_rules,
        select=select,
        error_propagation=error_propagation,
        correction=correction,
        errors=errors,
        progress=progress,
    )
