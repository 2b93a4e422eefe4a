"""Quantization with learned rounding, and quantization without any data.

`adaround` and `autoround` learn for each weight whether it goes up or down, for what
its layer computes; `hqq` fits scales and zero points to the weights alone, with a norm
that large weights do not rule.
"""

from collections.abc import Callable, Iterable
from typing import Any

import optax

from jopt.arrays.arguments import check_strength, require_count
from jopt.arrays.scale_fits import Fit, by_range, half_quadratic
from jopt.programs.sites import SiteTable
from jopt.quantization.chosen_once import with_all_codes
from jopt.quantization.conversion import convert
from jopt.quantization.layer_report import QuantizationReport
from jopt.quantization.layer_solving import Method
from jopt.quantization.layers import quantize_layers
from jopt.quantization.learned_rounding import learn_offsets, learn_up_or_down
from jopt.quantization.specs import SpecOrRules
from jopt.trees import rules
from jopt.updates.project import require_transformation

# By identity part of compiled programs: one object, so that they are compiled once.
_ADAM = optax.adam(1e-2)


def adaround(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec_or_rules: SpecOrRules,
    *,
    select: rules.Select = None,
    error_propagation: bool = True,
    correction: float = 0.0,
    optimizer: optax.GradientTransformation = _ADAM,
    num_steps: int = 1000,
    strength: float = 4.0,
    fit: Fit = by_range,
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, QuantizationReport]:
    """Quantize by AdaRound: each weight learns whether it is rounded up or down.

        q = a + h(v) (b - a),   h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1),
        loss = ||X W - X Q||^2 / ||X W - X round(W)||^2
               + strength mean(1 - |2 h(v) - 1|^beta)

    with the levels a <= w <= b beside each weight, and beta going from 20 to 2. The
    first term is tr(D^T G D) with the Gram matrix G of the inputs, so no activation is
    kept; the scales are those of `fit`. The loss is that of each output by itself, and
    outputs for which what was learned is not better stay rounded to nearest.

    What it costs: the passes of `gptq`, and per matrix `num_steps` products of its
    Gram matrix and its weights.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        batches: of inputs, as for `gptq`.
        spec_or_rules: a `jopt.QuantSpec` of any format, or rules, as for `gptq`.
        select: which leaves, as for `gptq`.
        error_propagation: whether a layer sees what quantized layers before it give.
        correction: as for `gptq`.
        optimizer: of v, any Optax transformation. Keep one object: each new one is
            compiled anew.
        num_steps: of it, per matrix.
        strength: of the second term.
        fit: how scales follow from weights, as for `gptq`.
        errors: whether the report says what each layer loses of its results.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`, as for `gptq`.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: as for `gptq`, or a number is out of range.

    References:
        Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization,
        arXiv:2004.10568.

    >>> import jax.numpy as jnp, jopt
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[-8.0], [2.3], [3.45]])}
    >>> x = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.9, 1.0]])
    >>> packed, _ = adaround(apply, params, [x], jopt.QuantSpec(jopt.formats.int4))
    >>> float(packed["w"].to_array()[1:].sum())  # 2.3 + 3.45 is nearer to 6 than to 5
    6.0
    """
    require_count("num_steps", num_steps, least=1)
    check_strength("strength", strength, "4.0 is usual")
    require_transformation(optimizer, "adaround", argument="optimizer")
    method = Method(
        "adaround",
        learn_up_or_down,
        options=(
            ("num_steps", num_steps),
            ("optimizer", optimizer),
            ("strength", strength),
        ),
        fit=fit,
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


def autoround(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec_or_rules: SpecOrRules,
    *,
    select: rules.Select = None,
    error_propagation: bool = True,
    correction: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    num_steps: int = 200,
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, QuantizationReport]:
    """Quantize by AutoRound: rounding and ranges learned by the signs of gradients.

        q = round(w / s + v) s,   |v| <= 1/2,   s of a range shrunk by [1/2, 1]

    minimises ||X W - X Q||^2 = tr(D^T G D) per matrix, with G the Gram matrix of its
    inputs, through gradients that take rounding for the identity. Each output takes
    the best of all steps, the first of which is rounding to nearest. As published but
    for the loss, which there is that of a block of layers.

    What it costs: the passes of `gptq`, and per matrix `num_steps` products of its
    Gram matrix and its weights.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        batches: of inputs, as for `gptq`.
        spec_or_rules: a `jopt.QuantSpec` of any format, or rules, as for `gptq`.
            Outputs must have scales of their own. Formats with an outer scale (nvfp4)
            keep their ranges.
        select: which leaves, as for `gptq`.
        error_propagation: whether a layer sees what quantized layers before it give.
        correction: as for `gptq`.
        optimizer: any Optax transformation; None for steps of the sign of the gradient,
            from 1 / num_steps down to 0 on a line. Keep one object: each new one is
            compiled anew.
        num_steps: of it, per matrix.
        errors: whether the report says what each layer loses of its results.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`, as for `gptq`.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: as for `gptq`, outputs share a scale, or a number is out of range.

    References:
        Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the
        Quantization of LLMs, arXiv:2309.05516.

    >>> import jax.numpy as jnp, jopt
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[7.0], [2.4], [3.4]])}
    >>> x, spec = jnp.array([[0.1, 1.0, 1.0]]), jopt.QuantSpec(jopt.formats.int4)
    >>> learned, nearest = (f(apply, params, [x], spec) for f in (autoround, jopt.rtn))
    >>> learned[1]["w"].error < 0.5 * nearest[1]["w"].error
    True
    """
    require_count("num_steps", num_steps, least=1)
    if optimizer is None:
        optimizer = _sign_descent(num_steps)
    require_transformation(optimizer, "autoround", argument="optimizer")
    method = Method(
        "autoround",
        learn_offsets,
        options=(("num_steps", num_steps), ("optimizer", optimizer)),
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
        correction=correction,
        errors=errors,
        progress=progress,
    )


def hqq(
    params: Any,
    spec_or_rules: SpecOrRules,
    *,
    sites: SiteTable | None = None,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
    norm: float = 0.7,
    num_steps: int = 20,
) -> Any:
    """Quantize without data, by half-quadratic fits of scales and zero points.

        minimise ||W - Q||_p^p,   p = norm < 1

    which a few large errors do not rule. In turns, E = shrink(W - Q) is taken for what
    may stay wrong, and the scale (and zero point) of each group fitted to W - E by
    least squares; the best of all turns per group is kept, the first of which is
    rounding to nearest. It is `jopt.quantize` with `jopt.scale_fits.half_quadratic` as
    its `fit`, which other methods take too, and with the grid of `gptq`, of all codes
    where the spec leaves that open. Equations, and what is done in another way than in
    the original, are at the fit.

    Args:
        params: a float array, or any tree.
        spec_or_rules: a `jopt.QuantSpec`, or rules `{path pattern: spec or None}`.
        sites: as for `jopt.quantize`: roles of axes, where `axis` is left out.
        select: which leaves, as for `jopt.quantize`.
        stacked_axes: which axis stacks layers, as for `jopt.quantize`.
        norm: p, in (0, 1].
        num_steps: turns.

    Returns:
        The tree with `QuantizedArray` leaves, as `jopt.quantize` gives it.

    Raises:
        ValueError: as for `jopt.quantize`, a number is out of range, or a format
            prescribes what its scales may be (mxfp8, mxfp4, nvfp4).

    References:
        Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models,
        2023.

    >>> import jax.numpy as jnp, jopt
    >>> params = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(64, 1).at[0].set(-4.0)}
    >>> spec = jopt.QuantSpec(jopt.formats.int3, narrow_range=False)
    >>> errors = [
    ...     jnp.abs(params["w"] - q["w"].to_array()).mean()
    ...     for q in (hqq(params, spec), jopt.quantize(params, spec))
    ... ]
    >>> bool(errors[0] < 0.8 * errors[1])
    True
    """
    return convert(
        params,
        spec_or_rules,
        sites=sites,
        scales=None,
        fit=half_quadratic(norm=norm, num_steps=num_steps),
        select=select,
        stacked_axes=stacked_axes,
        decide=with_all_codes,
    )


def _sign_descent(num_steps: int) -> optax.GradientTransformation:
    """Return steps of one size, of each number of steps the same object."""
    if num_steps not in _SIGN_DESCENTS:
        rate = optax.linear_schedule(1.0 / num_steps, 0.0, num_steps)
        _SIGN_DESCENTS[num_steps] = optax.sign_sgd(rate)
    return _SIGN_DESCENTS[num_steps]


_SIGN_DESCENTS: dict[int, optax.GradientTransformation] = {}
