"""Quantize the matrices of one layer of a leaf in one program, and say what that costs.

    prepare:         Gram matrices  ->  what the method reads of them, in their place
    quantize_layer:  leaf, codes    ->  leaf, codes, scales, facts

The leaf goes on as floats on the grid, so that what follows sees what will be executed;
codes lie in an array of the leaf's shape. Scales are small, and are put together when
all layers have theirs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays.codes import compute_codes, compute_levels, scale_levels
from jopt.arrays.gram_errors import squared_norms
from jopt.arrays.quantized_plus_low_rank import multiply_factors
from jopt.arrays.scale_fits import Fit, by_range
from jopt.arrays.scales import Scale
from jopt.arrays.specs import QuantSpec
from jopt.arrays.units import unit_of
from jopt.programs.layouts import Layout
from jopt.programs.passes import Moments
from jopt.programs.probes import is_met
from jopt.programs.spread import (
    as_automatic,
    automatic,
    by_outputs,
    constrain,
    each,
    on_every_device,
    placed_as,
)
from jopt.programs.statistics import mirrored, squares_and_whole
from jopt.programs.targets import Target
from jopt.quantization.layer_scales import layer_scale

_DAMPING = 0.01  # of Gram matrices that correct for a drift


class Solved(NamedTuple):
    """What a method found for one matrix [inputs, outputs].

    Attributes:
        values: float32, on the grid, in units of the stored numbers: those of the
            weights times `input_scale`.
        scale: fields [groups, outputs].
        input_scale: [inputs], that the weights were multiplied by; None for 1.
        low_rank: factors [inputs, rank] and [rank, outputs], whose product is added to
            the values in the end; None for none.
    """

    values: jax.Array
    scale: Scale
    input_scale: jax.Array | None = None
    low_rank: tuple[jax.Array, jax.Array] | None = None


class Method(NamedTuple):
    """An algorithm on one matrix, by value, so that programs are shared.

    Attributes:
        name: as users call it.
        matrix: `(weights, prepared, squares, scale, spec, **options)` to `Solved`:
            float32 [inputs, outputs], what `prepare` made of the Gram matrix, its
            diagonal, the scales of rounding to nearest, and the spec of a matrix, whose
            groups run along the inputs.
        moments: what it needs of the inputs.
        prepare: `(gram, **options)` to an array of its shape that holds the Gram matrix
            below the diagonal; None for the Gram matrix itself.
        order: `(squares, **options)` to the inputs in the order in which `prepared` has
            them; None for as they are.
        options: further arguments.
        has_own_scales: whether it gives outputs other scales than rounding to nearest,
            so that they cannot share one.
        fit: the scales of a leaf, for rounding to nearest.
        refuse: says why it cannot take a target, or None where it can.
    """

    name: str
    matrix: Callable[..., Solved]
    moments: Moments = "gram"
    prepare: Callable[..., jax.Array] | None = None
    order: Callable[..., jax.Array] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    has_own_scales: bool = False
    fit: Fit = by_range
    refuse: Callable[[Target], str | None] | None = None


class Inputs(NamedTuple):
    """What is known of the inputs X of one layer.

    Attributes:
        prepared: `[batch, columns, columns]`, None where only squares are kept; of
            magnitudes with their row below.
        squares: `[batch, columns]`, of the norm of each input.
        drift: `[batch, columns, columns]`, (X^T X)^-1 X^T (X' - X) with the inputs X'
            that the floats give, damped; None where they are not asked for.
    """

    prepared: jax.Array | None
    squares: jax.Array
    drift: jax.Array | None = None


class Facts(NamedTuple):
    """What became of the matrices of one layer.

    Attributes:
        is_finite: whether the inputs are.
        is_met: whether the matrices are what the inputs met.
        is_solved: whether the result is finite.
        reached: `[batch]`, whether other inputs than zeros came.
        noise: `[2]`, squared norms of what was lost of the weights, and of all, in some
            unit.
        errors: `[2]`, of what was lost of the results, and of all of them, in some
            unit; NaN where they were not asked for, or no Gram matrix was kept.
    """

    is_finite: Any
    is_met: Any
    is_solved: Any
    reached: Any
    noise: Any
    errors: Any


def matrix_spec(spec: QuantSpec) -> QuantSpec:
    """Say how a matrix [inputs, outputs] of a leaf is quantized."""
    return dataclasses.replace(spec, axis=None)


@functools.partial(jax.jit, static_argnames="method", donate_argnums=0)
def _prepared(gram: jax.Array, *, method: Method) -> Inputs:
    squares, gram = squares_and_whole(gram)
    if method.prepare is None:
        return Inputs(gram, squares)
    options = dict(method.options)
    return Inputs(each(functools.partial(method.prepare, **options), gram), squares)


@jax.jit
def _split(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Part the Gram matrices from what they make of the moments of a drift."""

    def solve(both: jax.Array) -> jax.Array:
        gram, moved = mirrored(both[0]), both[1]
        diagonal = jnp.diagonal(gram)
        more = jnp.where(diagonal == 0, 1.0, _DAMPING * jnp.mean(diagonal))
        factor = jax.scipy.linalg.cho_factor(gram + jnp.diag(more))
        return jax.scipy.linalg.cho_solve(factor, moved)

    return moments[:, 0], each(solve, moments)


@automatic()
def prepare(moments: jax.Array, *, method: Method) -> Inputs:
    """Get ready what the matrices that read one input share.

    Args:
        moments: as `moments_shape` says, used up if they are no squares.
        method: what will be done.

    Returns:
        What is known of the input, on every device of its mesh.
    """
    moments = on_every_device(moments)
    if moments.ndim == 2:
        return Inputs(None, moments)
    if moments.ndim == 4:
        gram, drift = _split(moments)
        return _prepared(gram, method=method)._replace(drift=drift)
    return _prepared(moments, method=method)


def quantize_layer(
    leaf: jax.Array,
    codes: jax.Array | None,
    static: Scale,
    inputs: Inputs,
    seen: jax.Array,
    layer: int,
    *,
    target: Target,
    method: Method,
    is_own: bool,
    errors: bool,
    correction: float = 0.0,
) -> tuple[jax.Array, jax.Array, Solved, Facts]:
    """Quantize one layer of a leaf.

    Args:
        leaf: weights.
        codes: of the leaf so far, None before its first layer; used up.
        static: the scales of the leaf for rounding to nearest.
        inputs: what `prepare` returned.
        seen: `[batch, columns]`, sums of `w v`.
        layer: which one.
        target: which matrices; its goal is the spec of the leaf.
        method: what to do.
        is_own: whether the leaf may be used up.
        errors: whether to measure them.
        correction: how much of the drift of its inputs the weights make up for, before
            they are quantized: W + correction drift W.

    Returns:
        The leaf and its codes, where the leaf lay; scales of the layer, fields
        `[batch, groups, outputs]`, and no values; the facts. Matrices that nothing
        reached are rounded to nearest; all of them, where the inputs are not finite or
        met something else.
    """
    with automatic():
        whole = as_automatic(leaf)
        run = _in_place if is_own else _anew
        solved, now, new, facts = run(
            whole,
            None if codes is None else as_automatic(codes),
            jax.tree.map(on_every_device, static),
            inputs,
            on_every_device(seen),
            layer,
            layout=target.layout,
            spec=target.goal,
            method=method,
            with_errors=errors,
            correction=correction,
            split=by_outputs(whole, target.layout),
            back=whole.sharding if isinstance(whole.sharding, NamedSharding) else None,
        )
    found = placed_as(now, leaf), placed_as(new, leaf)
    return *found, solved, jax.device_get(facts)


def _quantize_layer(
    leaf: jax.Array,
    codes: jax.Array | None,
    static: Scale,
    inputs: Inputs,
    seen: jax.Array,
    layer: jax.Array,
    *,
    layout: Layout,
    spec: QuantSpec,
    method: Method,
    with_errors: bool,
    correction: float,
    split: NamedSharding | None,
    back: NamedSharding | None,
) -> tuple[Solved, jax.Array, jax.Array, Facts]:
    every = layout.to_matrices(leaf)
    num_layers = every.shape[0]
    weights = every[0] if num_layers == 1 else every[layer]
    if split is not None:
        weights = constrain(weights, split)
    is_finite = jnp.isfinite(inputs.squares).all()
    met = is_met(seen, weights)
    rounded = layer_scale(static, leaf.shape, layout, spec, layer)
    form = matrix_spec(spec)
    options = dict(method.options)
    unit, gram_unit = unit_of(weights), unit_of(inputs.squares)

    def one(
        w: jax.Array,
        prepared: jax.Array | None,
        squares: jax.Array,
        drift: jax.Array | None,
        nearest: Scale,
    ) -> Any:
        wide = goal = w.astype(jnp.float32)
        start = nearest
        if drift is not None:
            moved = jnp.matmul(drift, wide, precision=lax.Precision.HIGHEST)
            goal = wide + correction * moved
            if nearest.outer_scale is None:  # one of all groups stays as it is
                start = method.fit(goal, form)
        found = method.matrix(goal, prepared, squares, start, form, **options)
        is_solved = jnp.isfinite(found.values).all()
        is_left = ~(is_finite & met & jnp.any(squares > 0))
        scale = jax.tree.map(
            lambda a, b: jnp.where(is_left, a, b), nearest, found.scale
        )
        by_input = found.input_scale
        if by_input is not None:
            by_input = jnp.where(is_left, 1.0, by_input)
        simple = scale_levels(compute_levels(wide, nearest, form), nearest, jnp.float32)
        values = jnp.where(is_left, simple, found.values)
        new = compute_codes(values, scale, form)
        if by_input is not None:
            values = values / by_input[:, None]
        factors = jax.tree.map(lambda x: jnp.where(is_left, 0, x), found.low_rank)
        if factors is not None:
            values = values + multiply_factors(*factors)
        kept = values.astype(w.dtype)
        lost = jnp.sum(jnp.square((wide - values) / unit))
        noise = jnp.stack([lost, jnp.sum(jnp.square(wide / unit))])
        errors = jnp.full(2, jnp.nan, jnp.float32)
        if prepared is not None and with_errors:
            order: Any = slice(None)
            if method.order is not None:
                order = method.order(squares, **options)
            errors = squared_norms(
                goal[order],
                values[order],
                prepared,
                squares[order],
                units=(unit, gram_unit),
                in_parts=split is None,
            )
        solved = Solved(jnp.zeros(()), scale, by_input, factors)
        return kept, new, solved, is_solved | is_left, noise, errors

    kept, new, solved, is_solved, noise, errors = each(
        one, weights, inputs.prepared, inputs.squares, inputs.drift, rounded
    )
    facts = Facts(
        is_finite,
        met,
        is_solved.all(),
        jnp.any(inputs.squares > 0, axis=-1),
        jnp.sum(noise, axis=0),
        jnp.sum(errors, axis=0),
    )
    if split is not None:
        everywhere = NamedSharding(split.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        facts, solved = jax.tree.map(
            lambda x: constrain(x, everywhere), (facts, solved)
        )
    if codes is None:
        codes = compute_codes(leaf, static, spec)
    results = []
    for values, before in ((kept, leaf), (new, codes)):
        values = values[None]
        if num_layers > 1:
            values = layout.to_matrices(before).at[layer].set(values[0])
        after = layout.from_matrices(values, before)
        if back is not None:
            after = constrain(after, back)
        results.append(after)
    return solved, results[0], results[1], facts


_STATIC = (
    "layout", "spec", "method", "with_errors", "correction", "split", "back"
)  # fmt: skip
_anew = jax.jit(_quantize_layer, static_argnames=_STATIC, donate_argnames="codes")
_in_place = jax.jit(
    _quantize_layer, static_argnames=_STATIC, donate_argnames=("leaf", "codes")
)
