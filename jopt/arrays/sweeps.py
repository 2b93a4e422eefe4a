"""Inputs of a matrix decided one after another, those that follow making up for each.

With H = X^T X, R^T R = H^-1, R upper, and W [inputs, outputs], whatever is decided of
input i, q_i for w_i, leaves an error, which the inputs that follow take up as well as
they can:

    e = (w_i - q_i) / R_ii,    W_j -= R_ij e  for j > i

so ||X W - X Q||^2 ends near its minimum over what was still free. SparseGPT decides
between w_i and zero, GPTQ for the nearest level of a grid. Errors are passed on inside
16 inputs one by one, from there to the end of a block by one product, and from the
block to all that follows by another (Frantar et al., GPTQ, arXiv:2210.17323).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_STRIP = 16  # inputs whose errors are passed on one by one
_ROWS = 512  # of later inputs that are updated by one product
_EXACT = lax.Precision.HIGHEST

Planned = TypeVar("Planned")


def sweep(
    weights: jax.Array,
    factor: jax.Array,
    plan: Callable[[jax.Array, jax.Array, jax.Array], Planned],
    decide: Callable[[jax.Array, Planned, jax.Array], jax.Array],
    *,
    unit: int,
    block: int,
) -> tuple[jax.Array, Planned]:
    """Decide all inputs.

    Args:
        weights: [inputs, outputs], float32.
        factor: [inputs, inputs], R on and above the diagonal, as
            `factors.inverse_factor` returns it; what is below is not read.
        plan: `(rows [unit, outputs], diagonal [unit] of R, first input)` to what
            `decide` is to know: called when the first input of each unit is reached,
            with all of its weights as they are by then. Past the last input weights are
            0 and the diagonal is 1.
        decide: `(w [outputs], planned, place in the unit)` to q.
        unit: inputs that are planned together.
        block: inputs whose errors are passed on together; rounded up to whole units.

    Returns:
        Q, float32; and all that was planned, with an axis for the units in front.

    >>> factor, w = jnp.array([[1.0, -0.5], [0.0, 1.0]]), jnp.array([[0.6], [1.0]])
    >>> rounded, _ = sweep(
    ...     w, factor, lambda *_: None, lambda w, *_: jnp.round(w), unit=1, block=128
    ... )
    >>> rounded[:, 0]
    Array([1., 1.], dtype=float32)
    """
    size = weights.shape[0]
    per_block = -(-min(block, size) // unit)
    block = unit * per_block
    num_blocks = -(-size // block)
    strip = _strip(unit, per_block)
    start = jnp.pad(weights, ((0, num_blocks * block - size), (0, 0)))

    def step(b: jax.Array, carry: Any) -> Any:
        current, planned = carry
        begin = b * block
        mine = lax.dynamic_slice_in_dim(current, begin, block)
        r = jnp.triu(_slice(factor, begin, block, begin, block))
        is_real = begin + jnp.arange(block) < size
        # What lies past the end has no errors.
        r = r + jnp.diag(jnp.where(is_real, 0.0, 1.0))
        found, new, errors = _sweep_block(mine, r, begin, plan, decide, unit, strip)
        current = lax.dynamic_update_slice_in_dim(current, found, begin, 0)
        planned = _put(planned, new, b * per_block)
        return _pass_on(current, factor, errors, begin, block), planned

    shapes = jax.eval_shape(plan, start[:unit], factor[0, :1].repeat(unit), _ZERO)
    planned = _room(shapes, num_blocks * per_block)
    found, planned = lax.fori_loop(0, num_blocks, step, (start, planned))
    return found[:size], planned


_ZERO: Any = np.int32(0)


def _strip(unit: int, per_block: int) -> int:
    """Choose how many inputs are taken one by one: part of a unit, or several."""
    if unit >= _STRIP:
        return next(d for d in range(_STRIP, 0, -1) if unit % d == 0)
    return unit * next(d for d in range(_STRIP // unit, 0, -1) if per_block % d == 0)


def _room(shapes: Any, number: int) -> Any:
    return jax.tree.map(lambda s: jnp.zeros((number, *s.shape), s.dtype), shapes)


def _put(every: Any, new: Any, place: jax.Array) -> Any:
    """Put what was planned for units one after another into its place among all."""
    return jax.tree.map(
        lambda a, b: lax.dynamic_update_slice_in_dim(a, b, place, 0), every, new
    )


def _sweep_block(
    current: jax.Array,
    r: jax.Array,
    first: jax.Array,
    plan: Callable[..., Any],
    decide: Callable[..., jax.Array],
    unit: int,
    strip: int,
) -> tuple[jax.Array, Any, jax.Array]:
    """Decide a block, strip by strip; return it, what was planned, and its errors."""
    block, num_outputs = current.shape
    diagonal = jnp.diagonal(r)

    def plan_at(rows: jax.Array, place: jax.Array) -> Any:
        scale = lax.dynamic_slice_in_dim(diagonal, place, unit)
        return plan(rows, scale, jnp.asarray(first + place, jnp.int32))  # in x64 too

    def decide_rows(
        rows: jax.Array,
        errors: jax.Array,
        planned: Any,
        begin: jax.Array,
        here: Any,
        count: int,
        offset: Any,
    ) -> Any:
        """Decide `count` rows of a strip at `begin` from `here` on."""

        def decide_row(i: jax.Array, carry: Any) -> Any:
            rows, errors = carry
            w = lax.dynamic_index_in_dim(rows, i, keepdims=False)
            scale = lax.dynamic_index_in_dim(diagonal, begin + i, keepdims=False)
            q = decide(w, planned, i - here + offset)
            error = (w - q) / scale
            part = lax.dynamic_slice(r, (begin + i, begin), (1, strip))[0]
            rows = rows - part[:, None] * error[None, :]
            rows = lax.dynamic_update_slice_in_dim(rows, q[None], i, 0)
            return rows, lax.dynamic_update_slice_in_dim(errors, error[None], i, 0)

        return lax.fori_loop(here, here + count, decide_row, (rows, errors))

    def close(
        current: jax.Array, rows: jax.Array, mine: jax.Array, begin: jax.Array
    ) -> jax.Array:
        """Put a strip back, and pass on its errors to the rest of the block."""
        part = lax.dynamic_slice(r, (begin, 0), (strip, block))
        part = jnp.where(jnp.arange(block) >= begin + strip, part, 0.0)
        current = current - jnp.matmul(part.T, mine, precision=_EXACT)
        return lax.dynamic_update_slice_in_dim(current, rows, begin, 0)

    nothing = jnp.zeros((strip, num_outputs), jnp.float32)
    units = jax.eval_shape(plan_at, current[:unit], _ZERO)
    carry = (current, _room(units, block // unit), jnp.zeros_like(current))

    def of_large_unit(u: jax.Array, carry: Any) -> Any:
        current, planned, errors = carry
        new = plan_at(lax.dynamic_slice_in_dim(current, u * unit, unit), u * unit)

        def of_strip(s: jax.Array, carry: Any) -> Any:
            current, errors = carry
            begin = u * unit + s * strip
            rows = lax.dynamic_slice_in_dim(current, begin, strip)
            rows, mine = decide_rows(rows, nothing, new, begin, 0, strip, s * strip)
            errors = lax.dynamic_update_slice_in_dim(errors, mine, begin, 0)
            return close(current, rows, mine, begin), errors

        current, errors = lax.fori_loop(0, unit // strip, of_strip, (current, errors))
        return current, _put(planned, _one(new), u), errors

    def of_small_units(s: jax.Array, carry: Any) -> Any:
        current, planned, errors = carry
        begin = s * strip
        rows = lax.dynamic_slice_in_dim(current, begin, strip)

        def of_unit(u: jax.Array, carry: Any) -> Any:
            rows, mine, planned = carry
            here = u * unit
            own = lax.dynamic_slice_in_dim(rows, here, unit)
            new = plan_at(own, begin + here)
            rows, mine = decide_rows(rows, mine, new, begin, here, unit, 0)
            return rows, mine, _put(planned, _one(new), begin // unit + u)

        rows, mine, planned = lax.fori_loop(
            0, strip // unit, of_unit, (rows, nothing, planned)
        )
        errors = lax.dynamic_update_slice_in_dim(errors, mine, begin, 0)
        return close(current, rows, mine, begin), planned, errors

    if unit >= strip:
        current, planned, errors = lax.fori_loop(0, block // unit, of_large_unit, carry)
    else:
        current, planned, errors = lax.fori_loop(
            0, block // strip, of_small_units, carry
        )
    return current, planned, errors


def _one(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _slice(
    matrix: jax.Array, row: jax.Array, rows: int, column: jax.Array, columns: int
) -> jax.Array:
    """Slice a matrix; what lies past its end is 0."""
    size = matrix.shape[0]
    # A slice that would end past the matrix is moved into it, and its content back.
    first_row = jnp.clip(row, 0, max(size - rows, 0))
    first_column = jnp.clip(column, 0, max(size - columns, 0))
    part = lax.dynamic_slice(
        matrix, (first_row, first_column), (min(rows, size), min(columns, size))
    )
    part = jnp.pad(part, ((0, rows - part.shape[0]), (0, columns - part.shape[1])))
    part = jnp.roll(part, first_row - row, 0)
    part = jnp.roll(part, first_column - column, 1)
    inside_rows = row + jnp.arange(rows) < size
    inside_columns = column + jnp.arange(columns) < size
    return jnp.where(inside_rows[:, None] & inside_columns[None, :], part, 0.0)


def _pass_on(
    current: jax.Array,
    factor: jax.Array,
    errors: jax.Array,
    begin: jax.Array,
    block: int,
) -> jax.Array:
    """Let all later inputs take up the errors of a block, some rows at a time."""
    size = current.shape[0]
    rows = min(_ROWS, size)

    def step(i: jax.Array, current: jax.Array) -> jax.Array:
        wanted = begin + block + i * rows
        first = jnp.minimum(wanted, size - rows)  # the last may overlap: masked below
        part = _slice(factor, begin, block, first, rows)
        part = jnp.where(first + jnp.arange(rows) >= wanted, part, 0.0)
        mine = lax.dynamic_slice_in_dim(current, first, rows)
        mine = mine - jnp.matmul(part.T, errors, precision=_EXACT)
        return lax.dynamic_update_slice_in_dim(current, mine, first, 0)

    num_steps = -(-(size - begin - block) // rows)
    return lax.fori_loop(0, num_steps, step, current)
