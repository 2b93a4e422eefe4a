"""Prune the matrices of one layer of a leaf, in one program, and say what that costs.

    prepare:      Gram matrices  ->  what the method reads of them, in their place
    prune_layer:  leaf, mask     ->  leaf, mask, facts

Memory is the point of the cut: a Gram matrix is as large as what it prunes. Inputs that
several leaves share are prepared once; nothing of the size of a leaf is reshaped,
copied or compared outside of the one program that writes the result.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays.gram_errors import squared_norms, sum_by_outputs
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
from jopt.programs.statistics import squares_and_whole
from jopt.programs.targets import Target
from jopt.pruning.goals import Goal


class Method(NamedTuple):
    """An algorithm on one matrix, by value, so that programs are shared.

    Attributes:
        name: as users call it.
        matrix: `(weights, prepared, squares, *, sparsity, pattern, **options)`
            to weights and mask.
        moments: what it needs of the inputs.
        prepare: `(gram, **options)` to an array of its shape that holds the Gram matrix
            below the diagonal; None for the Gram matrix itself.
        options: further arguments.
    """

    name: str
    matrix: Callable[..., tuple[jax.Array, jax.Array]]
    moments: Moments
    prepare: Callable[..., jax.Array] | None = None
    options: tuple[tuple[str, Any], ...] = ()


class Inputs(NamedTuple):
    """What is known of the inputs of one layer.

    Attributes:
        prepared: `[batch, columns, columns]`, None where only squares are kept.
        squares: `[batch, columns]`, of the norm of each input.
    """

    prepared: jax.Array | None
    squares: jax.Array


class Facts(NamedTuple):
    """What became of the matrices of one layer.

    Attributes:
        is_finite: whether the inputs are.
        is_met: whether the matrices are what the inputs met.
        is_solved: whether the result is finite.
        reached: `[batch]`, whether other inputs than zeros came.
        num_kept: `[batch]`, weights that the mask keeps.
        errors: `[2]`, squared norms of what was lost of the results, and of all of
            them; NaN where they were not asked for, or no Gram matrix was kept.
    """

    is_finite: Any
    is_met: Any
    is_solved: Any
    reached: Any
    num_kept: Any
    errors: Any

    @property
    def is_pruned(self) -> Any:
        """Whether any matrix was pruned."""
        return self.is_finite & self.is_met & self.is_solved & self.reached.any()


def check(method: Method, targets: Sequence[Target]) -> None:
    """Raise what a method has to say of its arguments, without computing anything.

    Args:
        method: with its options.
        targets: with their goals.
    """
    for columns, outputs, goal in {(*t.layout.sizes[2:], t.goal) for t in targets}:
        _check_one(columns, outputs, goal, method)


def _check_one(columns: int, outputs: int, goal: Goal, method: Method) -> None:
    def go() -> Any:
        weights = jnp.zeros((columns, outputs))
        prepared = None
        if method.moments == "gram":
            prepared = _prepare(jnp.zeros((columns, columns)), method)
        squares = jnp.zeros(columns)
        return _solve(weights, prepared, squares, goal.sparsity, method, goal)

    jax.eval_shape(go)


@functools.partial(jax.jit, static_argnames="method", donate_argnums=0)
def _prepared(gram: jax.Array, *, method: Method) -> Inputs:
    squares, gram = squares_and_whole(gram)
    return Inputs(each(lambda g: _prepare(g, method), gram), squares)


def _prepare(gram: jax.Array, method: Method) -> jax.Array:
    if method.prepare is None:
        return gram
    return method.prepare(gram, **dict(method.options))


@automatic()
def prepare(moments: jax.Array, *, method: Method) -> Inputs:
    """Get ready what the matrices that read one input share.

    Args:
        moments: `[batch, columns, columns]`, used up; or squares `[batch, columns]`.
        method: what will be done.

    Returns:
        What is known of the input, on every device of its mesh.
    """
    moments = on_every_device(moments)
    if moments.ndim == 2:
        return Inputs(None, moments)
    return _prepared(moments, method=method)


def prune_layer(
    leaf: jax.Array,
    mask: jax.Array | None,
    inputs: Inputs,
    seen: jax.Array,
    layer: int,
    sparsity: Any,
    *,
    target: Target,
    method: Method,
    is_own: bool,
    errors: bool,
) -> tuple[jax.Array, jax.Array, Facts]:
    """Prune one layer of a leaf.

    Args:
        leaf: weights.
        mask: of the leaf so far, None before its first layer; used up.
        inputs: what `prepare` returned.
        seen: `[batch, columns]`, sums of `w v`.
        layer: which one.
        sparsity: of this layer, None for what the target's goal says.
        target: which matrices.
        method: what to do.
        is_own: whether the leaf may be used up.
        errors: whether to measure them.

    Returns:
        The leaf and its mask, where the leaf lay, and the facts. Both are as they were
        where the inputs are not finite, met something else, or nothing.
    """
    with automatic():
        whole = as_automatic(leaf)
        run = _in_place if is_own else _anew
        pruned, kept, facts = run(
            whole,
            None if mask is None else as_automatic(mask),
            inputs,
            on_every_device(seen),
            layer,
            sparsity,
            layout=target.layout,
            goal=target.goal,
            method=method,
            with_errors=errors,
            split=by_outputs(whole, target.layout),
            back=whole.sharding if isinstance(whole.sharding, NamedSharding) else None,
        )
    return placed_as(pruned, leaf), placed_as(kept, leaf), jax.device_get(facts)


def _prune_layer(
    leaf: jax.Array,
    mask: jax.Array | None,
    inputs: Inputs,
    seen: jax.Array,
    layer: jax.Array,
    sparsity: jax.Array | None,
    *,
    layout: Layout,
    goal: Goal,
    method: Method,
    with_errors: bool,
    split: NamedSharding | None,
    back: NamedSharding | None,
) -> tuple[jax.Array, jax.Array, Facts]:
    every = layout.to_matrices(leaf)
    num_layers = every.shape[0]
    weights = every[0] if num_layers == 1 else every[layer]
    if split is not None:
        weights = constrain(weights, split)
    squares = inputs.squares
    is_finite = jnp.isfinite(squares).all()
    met = is_met(seen, weights)
    units = unit_of(weights), unit_of(squares)

    def one(w: jax.Array, m: jax.Array | None, squares: jax.Array) -> Any:
        wide = w.astype(jnp.float32)
        own = goal.sparsity if sparsity is None else sparsity
        pruned, mask = _solve(wide, m, squares, own, method, goal)
        is_left = ~(is_finite & met & jnp.any(squares > 0))
        mask = mask | is_left
        # What did not change keeps every bit, in float64 too.
        is_same = is_left | (pruned == wide)
        kept = jnp.where(is_same, w, pruned.astype(w.dtype))
        kept = jnp.where(mask, kept, jnp.zeros_like(kept))
        errors = jnp.full(2, jnp.nan, jnp.float32)
        if m is not None and with_errors:
            errors = squared_norms(
                w, kept, m, squares, units=units, in_parts=split is None
            )

        def count(start: jax.Array, is_new: jax.Array) -> jax.Array:
            width = is_new.shape[0]
            parts = (lax.dynamic_slice_in_dim(x, start, width, 1) for x in (mask, kept))
            is_kept, numbers = parts
            each = jnp.stack([is_kept, ~jnp.isfinite(numbers)]) & is_new[None, None, :]
            return each.sum((1, 2))

        num_kept, num_wrong = sum_by_outputs(count, w.shape[1], in_parts=split is None)
        return kept, mask, num_kept, num_wrong, errors

    kept, new, num_kept, num_wrong, errors = each(
        one, weights, inputs.prepared, squares
    )
    facts = Facts(
        is_finite,
        met,
        num_wrong.sum() == 0,
        jnp.any(squares > 0, axis=-1),
        num_kept,
        jnp.sum(errors, axis=0),
    )
    if split is not None:
        whole = NamedSharding(split.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        facts = jax.tree.map(lambda x: constrain(x, whole), facts)
    if mask is None:
        mask = jnp.ones(leaf.shape, jnp.bool_)
    results = []
    for values, before in ((kept, leaf), (new, mask)):
        values = values[None]
        if num_layers > 1:
            values = layout.to_matrices(before).at[layer].set(values[0])
        after = layout.from_matrices(values, before)
        if back is not None:
            after = constrain(after, back)
        results.append(after)
    return results[0], results[1], facts


_STATIC = ("layout", "goal", "method", "with_errors", "split", "back")
_anew = jax.jit(_prune_layer, static_argnames=_STATIC, donate_argnames="mask")
_in_place = jax.jit(
    _prune_layer, static_argnames=_STATIC, donate_argnames=("leaf", "mask")
)


def _solve(
    weights: jax.Array,
    prepared: jax.Array | None,
    squares: jax.Array,
    sparsity: Any,
    method: Method,
    goal: Goal,
) -> tuple[jax.Array, jax.Array]:
    return method.matrix(
        weights,
        prepared,
        squares,
        sparsity=sparsity,
        pattern=goal.pattern,
        **dict(method.options),
    )
