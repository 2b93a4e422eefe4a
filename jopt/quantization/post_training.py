"""Quantization with calibration data: codes chosen for what a layer computes.

For each matrix that multiplies, y = x w with w [columns, outputs], the inputs that it
meets in a few batches say which errors of its weights matter:

    packed, report = gptq(apply, params, batches, jopt.QuantSpec(jopt.formats.int4))

Earlier layers are quantized first, and later ones see what that does to their inputs
(`error_propagation`). All take any function, stacked layers, kernels of many axes,
convolutions and experts, and every format that has no scale of its own per element.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jopt.quantization.gptq import check, input_order, prepare, round_prepared
from jopt.quantization.layer_report import QuantizationReport
from jopt.quantization.layer_solving import Method
from jopt.quantization.layers import quantize_layers
from jopt.quantization.nearest import round_to_nearest
from jopt.quantization.specs import SpecOrRules
from jopt.quantization.svdquant import (
    ResidualMethod,
    prepare_rest,
    refuse,
    split_and_round,
)
from jopt.trees import rules


def gptq(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec_or_rules: SpecOrRules,
    *,
    select: rules.Select = None,
    error_propagation: bool = True,
    activation_order: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
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
            output (and layer, and expert), and groups run along the inputs.
        select: which leaves: a predicate `(path, leaf) -> bool` such as
            `jopt.matching(...)`, a tree of bools, or None for float leaves that only
            multiply, of two axes or more not counting stacked layers.
        error_propagation: whether a layer sees the inputs that the quantized layers
            before it give, instead of those of the floats.
        activation_order: whether inputs that are large come first, with the scales that
            the weights have before anything is rounded. It helps where few inputs are
            much larger than others.
        block_size: inputs whose errors are passed on together.
        damping: part of the mean of the diagonal that is added to it.
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
        Pre-trained Transformers, arXiv:2210.17323.

    >>> import jax.numpy as jnp, jopt
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[7.0], [2.4]])}
    >>> x = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> packed, report = gptq(apply, params, [x], jopt.QuantSpec(jopt.formats.int4))
    >>> print(report)
      layer    shape   format    bits   SNR dB      error
     ─────────────────────────────────────────────────────
      w       [2, 1]     int4   12.00     25.3   1.81e-03
    """
    options = (
        ("activation_order", activation_order),
        ("block_size", block_size),
        ("damping", damping),
    )
    check(**dict(options))  # type: ignore[arg-type]
    method = Method(
        "gptq",
        round_prepared,
        prepare=prepare,
        order=input_order if activation_order else None,
        options=options,
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
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, QuantizationReport]:
    """Round to nearest, and measure on real inputs what that does to every layer.

    The codes are those of `jopt.quantize(params, spec, sites=...)`, which needs no
    batches; this is the yardstick of the others. Arguments, results and errors are
    those of `gptq`.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        batches: of inputs, as for `gptq`.
        spec_or_rules: a `jopt.QuantSpec`, or rules, as for `gptq`.
        select: which leaves, as for `gptq`.
        error_propagation: whether errors are measured on the inputs that the quantized
            layers before it give.
        errors: whether the report says what each layer loses of its results.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`, as for `gptq`.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: as for `gptq`.

    >>> import jax.numpy as jnp, jopt
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[7.0], [2.4]])}
    >>> packed, _ = rtn(apply, params, [jnp.eye(2)], jopt.QuantSpec(jopt.formats.int4))
    >>> jopt.dequantize(packed)["w"][:, 0]
    Array([7., 2.], dtype=float32)
    """
    return quantize_layers(
        Method("rtn", round_to_nearest, "squares"),
        apply,
        params,
        batches,
        spec_or_rules,
        select=select,
        error_propagation=error_propagation,
        errors=errors,
        progress=progress,
    )


def svdquant(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec_or_rules: SpecOrRules,
    *,
    rank: int = 16,
    residual_method: ResidualMethod = "rtn",
    refit: bool = True,
    factor_dtype: DTypeLike = jnp.bfloat16,
    select: rules.Select = None,
    error_propagation: bool = True,
    damping: float = 0.01,
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, QuantizationReport]:
    """Quantize what is left of each matrix beside its largest directions.

    W ~ A B + Q,    Q = round(W - A B),    then A, B = argmin ||X (W - Q - A B)||

    The factors A [inputs, rank] and B [rank, outputs] stay in high precision, and take
    up the outliers of W: first its largest singular directions, and once the rest is
    rounded what is best for the inputs X. `jopt.execute` multiplies codes by codes and,
    beside them, the unrounded input by the two thin matrices: x W ~ x_q Q + (x A) B.

    What it costs: the passes and Gram matrices of `gptq`, one or two singular value
    decompositions per matrix, and beside its codes `rank (inputs + outputs)` numbers of
    `factor_dtype`.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        batches: of inputs, as for `gptq`.
        spec_or_rules: a `jopt.QuantSpec`, or rules, as for `gptq`.
        rank: of the factors.
        residual_method: how the rest is rounded: "rtn" to nearest, or "gptq".
        refit: whether the factors are found again once the rest is rounded. It never
            makes the error of a layer larger, but for damping.
        factor_dtype: of the factors.
        select: which leaves, as for `gptq`.
        error_propagation: whether a layer sees the inputs that the quantized layers
            before it give, instead of those of the floats.
        damping: part of the mean of the diagonal that is added to it.
        errors: whether the report says what each layer loses of its results.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`, as for `gptq`, with `jopt.QuantizedPlusLowRank` leaves;
        factors count in the bits. Leaves whose inputs and outputs are no axes of their
        own (fused kernels that are sliced), or that have no more than `rank` of them,
        are left alone and listed.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: `rank` is no positive count, `residual_method` is unknown, or as for
            `gptq`.

    References:
        Li et al., SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit
        Diffusion Models, arXiv:2411.05007.

    >>> import jopt
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3)).at[0, 0].set(1.5)}
    >>> int4 = jopt.QuantSpec(jopt.formats.int4)
    >>> packed, _ = svdquant(apply, params, [jnp.eye(4)], int4, rank=1)
    >>> packed["w"].lora_a.shape, packed["w"].lora_b.shape
    ((4, 1), (1, 3))
    >>> bool(jnp.abs(jopt.dequantize(packed)["w"] - params["w"]).max() < 0.05)
    True
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a count of at least 1, got {rank!r}")
    if residual_method not in ("rtn", "gptq"):
        raise ValueError(
            f"residual_method must be 'rtn' or 'gptq', got {residual_method!r}"
        )
    check(activation_order=False, block_size=128, damping=damping)
    is_gptq = residual_method == "gptq"
    options = (
        ("rank", rank),
        ("factor_dtype", jnp.dtype(factor_dtype)),
        ("refit", refit),
        ("residual_method", residual_method),
        ("block_size", 128),
        ("damping", damping),
    )
    method = Method(
        "svdquant",
        split_and_round,
        "gram" if refit or is_gptq else "squares",
        prepare=prepare_rest if is_gptq else None,
        options=options,
        refuse=functools.partial(refuse, rank=rank),
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
