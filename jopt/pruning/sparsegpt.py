"""SparseGPT on one matrix: prune, and let the weights that stay make up for it.

With the Gram matrix of the inputs H = X^T X + damping, and W [inputs, outputs], inputs
are taken one after another. What is pruned of input i leaves an error, which the inputs
that follow take up as well as they can:

    e = (w_i - q_i) / R_ii,    W_j -= R_ij e  for j >= i,      R^T R = H^-1, R upper

so W ends near the minimum of ||X W - X W'||^2 over the weights that stay. Errors are
passed on inside 16 inputs one by one, from there to the end of a block by one product,
and from the block to all that follows by another.

R is found where the Gram matrix is, with no room for another: see `inverse_factor`.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot, arXiv:2301.00774.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays import patterns, selection
from jopt.pruning.factors import inverse_factor
from jopt.pruning.wanda import along_inputs, num_kept

_STRIP = 16  # inputs whose errors are passed on one by one
_ROWS = 512  # of later inputs that are updated by one product
_EXACT = jax.lax.Precision.HIGHEST


def sparsegpt_matrix(
    weights: jax.Array,
    gram: jax.Array,
    *,
    sparsity: Any = None,
    pattern: patterns.Pattern = patterns.Unstructured(),  # noqa: B008
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix by SparseGPT.

    Args:
        weights: [inputs, outputs].
        gram: [inputs, inputs]: X^T X over the calibration rows, at any scale.
        sparsity: fraction of zeros, a number or a traced scalar; None for `jopt.NM`.
            The smallest w^2 / R_ii^2 of each block go; the count is exact over the
            blocks so far, and so over the matrix.
        pattern: `Unstructured`, or `NM` along the inputs, whatever its axis: the mask
            of m inputs is chosen when they are reached.
        block_size: inputs whose mask is chosen together; raised to a multiple of m.
        damping: added to the diagonal of H, as a fraction of its mean.

    Returns:
        The weights, those that stay updated and exact zeros elsewhere, in their dtype;
        and the mask. All NaN if H is not positive definite: see `inverse_factor`.

    Raises:
        ValueError: shapes do not fit, a number is out of range, or another pattern.

    >>> gram = jnp.array([[2.0, 1.0], [1.0, 1.0]])
    >>> weights = jnp.array([[0.1], [1.0]])
    >>> found, mask = sparsegpt_matrix(weights, gram, sparsity=0.5, damping=0.0)
    >>> found.round(3), mask[:, 0]  # 1 + 0.1 * gram_01 / gram_11
    (Array([[0. ],
           [1.1]], dtype=float32), Array([False,  True], dtype=bool))
    """
    if gram.shape != (weights.shape[0],) * 2:
        raise ValueError(
            f"gram must have shape {(weights.shape[0],) * 2} for weights of shape "
            f"{weights.shape}, got {gram.shape}"
        )
    check_matrix(weights.shape, sparsity, pattern, block_size, damping)
    return prune_prepared(
        weights,
        prepare(gram, damping=damping),
        jnp.diagonal(gram),
        sparsity=sparsity,
        pattern=pattern,
        block_size=block_size,
        damping=damping,
    )


def prepare(gram: jax.Array, *, block_size: int = 128, damping: float) -> jax.Array:
    """Put R into a Gram matrix, which stays below the diagonal: see `inverse_factor`.

    Args:
        gram: [inputs, inputs].
        block_size: of no account here.
        damping: as for `sparsegpt_matrix`.

    Returns:
        [inputs, inputs], float32.
    """
    del block_size
    return inverse_factor(gram, damping)


def prune_prepared(
    weights: jax.Array,
    prepared: jax.Array,
    squares: jax.Array,
    *,
    sparsity: Any,
    pattern: patterns.Pattern,
    block_size: int,
    damping: float,
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix, given what `prepare` returned.

    Args:
        weights: [inputs, outputs].
        prepared: [inputs, inputs].
        squares: [inputs], the diagonal of the Gram matrix. An input that is always 0
            loses its weights first.
        sparsity: as for `sparsegpt_matrix`.
        pattern: as for `sparsegpt_matrix`.
        block_size: as for `sparsegpt_matrix`.
        damping: that `prepare` was given.

    Returns:
        As `sparsegpt_matrix`.
    """
    check_matrix(weights.shape, sparsity, pattern, block_size, damping)
    size, num_outputs = weights.shape
    m = pattern.m if isinstance(pattern, patterns.NM) else 1
    groups = -(-min(block_size, size) // m)  # in a block
    block = m * groups
    most = max(_STRIP // m, 1)
    strip = m * next(d for d in range(most, 0, -1) if groups % d == 0)
    kept = None
    if not isinstance(pattern, patterns.NM):
        ends = [min(i + block, size) for i in range(0, size, block)]
        upto = [num_kept(end * num_outputs, sparsity) for end in ends]
        kept = jnp.diff(jnp.stack([jnp.int32(0), *map(jnp.int32, upto)]))
    return _prune(weights, prepared, squares == 0, kept, pattern, block, strip)


def check_matrix(
    shape: tuple[int, ...],
    sparsity: Any,
    pattern: patterns.Pattern,
    block_size: int,
    damping: float,
    *,
    path: str = "weights",
) -> None:
    """Raise for arguments that are wrong whatever the values."""
    if not isinstance(pattern, patterns.Unstructured | patterns.NM):
        raise ValueError(
            f"pattern must be Unstructured() or NM(n, m) for SparseGPT, got {pattern}; "
            "jopt.wanda takes all patterns"
        )
    patterns.check_pattern(along_inputs(pattern), shape, path=path)
    is_nm = isinstance(pattern, patterns.NM)
    if is_nm and sparsity is not None:
        raise ValueError(f"sparsity must be None with {pattern}, got {sparsity}")
    if not is_nm and sparsity is None:
        raise ValueError(f"sparsity must be given with {pattern}, got None")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping}; 0.01 is usual")


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _prune(
    weights: jax.Array,
    factor: jax.Array,
    dead: jax.Array,
    kept: jax.Array | None,
    pattern: patterns.Pattern,
    block: int,
    strip: int,
) -> tuple[jax.Array, jax.Array]:
    """Take blocks of inputs one after another; the last may reach past the end."""
    size = weights.shape[0]
    num_blocks = -(-size // block)
    start = jnp.where(dead[:, None], 0.0, weights.astype(jnp.float32))
    start = jnp.pad(start, ((0, num_blocks * block - size), (0, 0)))

    def rows_of(begin: jax.Array, count: int, columns: int, first: jax.Array) -> Any:
        """Return R[begin : begin + count, first : first + columns], 0 past the end."""
        return _slice(factor, begin, count, first, columns)

    def step(b: jax.Array, carry: Any) -> Any:
        current, masks = carry
        begin = b * block
        mine = lax.dynamic_slice_in_dim(current, begin, block)
        r = jnp.triu(rows_of(begin, block, block, begin))
        is_real = begin + jnp.arange(block) < size
        # What lies past the end has no errors.
        r = r + jnp.diag(jnp.where(is_real, 0.0, 1.0))
        mask = None
        if kept is not None:
            scores = jnp.square(mine / jnp.diagonal(r)[:, None])
            scores = jnp.where(is_real[:, None], scores, jnp.nan)
            mask = selection.top_k_mask(scores, kept[b])
        found, mask, errors = _prune_block(mine, r, mask, pattern, strip)
        current = lax.dynamic_update_slice_in_dim(current, found, begin, 0)
        masks = lax.dynamic_update_slice_in_dim(masks, mask, begin, 0)
        return _pass_on(current, rows_of, errors, begin, block), masks

    masks = jnp.zeros(start.shape, jnp.bool_)
    found, masks = lax.fori_loop(0, num_blocks, step, (start, masks))
    found, masks = found[:size], masks[:size]
    found = jnp.where(masks, found, 0.0)
    # Whatever of R is not a number, its first is not one either.
    found = jnp.where(jnp.isfinite(factor[0, 0]), found, jnp.nan)
    return found.astype(weights.dtype), masks


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


def _prune_block(
    current: jax.Array,
    r: jax.Array,
    mask: jax.Array | None,
    pattern: patterns.Pattern,
    strip: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prune a block of inputs, strip by strip; return it, its mask and its errors."""
    block, num_outputs = current.shape
    is_nm = mask is None
    group = pattern.m if isinstance(pattern, patterns.NM) else strip
    diagonal = jnp.diagonal(r)

    def prune_group(g: jax.Array, carry: Any) -> Any:
        rows, mask, errors, begin = carry
        here = g * group
        if is_nm:
            scale = lax.dynamic_slice_in_dim(diagonal, begin + here, group)
            mine = lax.dynamic_slice_in_dim(rows, here, group)
            scores = jnp.square(mine / scale[:, None])
            chosen = patterns.make_mask(scores, pattern=along_inputs(pattern))
            mask = lax.dynamic_update_slice_in_dim(mask, chosen, here, 0)

        def prune_row(i: jax.Array, carry: Any) -> Any:
            rows, errors = carry
            w = lax.dynamic_index_in_dim(rows, i, keepdims=False)
            keep = lax.dynamic_index_in_dim(mask, i, keepdims=False)
            scale = lax.dynamic_index_in_dim(diagonal, begin + i, keepdims=False)
            error = jnp.where(keep, 0.0, w / scale)
            part = lax.dynamic_slice(r, (begin + i, begin), (1, strip))[0]
            rows = rows - part[:, None] * error[None, :]
            return rows, lax.dynamic_update_slice_in_dim(errors, error[None], i, 0)

        rows, errors = lax.fori_loop(here, here + group, prune_row, (rows, errors))
        return rows, mask, errors, begin

    def prune_strip(s: jax.Array, carry: Any) -> Any:
        current, mask, errors = carry
        begin = s * strip
        rows = lax.dynamic_slice_in_dim(current, begin, strip)
        chosen = lax.dynamic_slice_in_dim(mask, begin, strip)
        start = (rows, chosen, jnp.zeros((strip, num_outputs), jnp.float32), begin)
        rows, chosen, mine, _ = lax.fori_loop(0, strip // group, prune_group, start)
        part = lax.dynamic_slice(r, (begin, 0), (strip, block))
        part = jnp.where(jnp.arange(block) >= begin + strip, part, 0.0)
        current = current - jnp.matmul(part.T, mine, precision=_EXACT)
        current = lax.dynamic_update_slice_in_dim(current, rows, begin, 0)
        mask = lax.dynamic_update_slice_in_dim(mask, chosen, begin, 0)
        errors = lax.dynamic_update_slice_in_dim(errors, mine, begin, 0)
        return current, mask, errors

    first = jnp.zeros(current.shape, jnp.bool_) if mask is None else mask
    carry = (current, first, jnp.zeros_like(current))
    return lax.fori_loop(0, block // strip, prune_strip, carry)


def _pass_on(
    current: jax.Array, rows_of: Any, errors: jax.Array, begin: jax.Array, block: int
) -> jax.Array:
    """Let all later inputs take up the errors of a block, some rows at a time."""
    size = current.shape[0]
    rows = min(_ROWS, size)

    def step(i: jax.Array, current: jax.Array) -> jax.Array:
        wanted = begin + block + i * rows
        first = jnp.minimum(wanted, size - rows)  # the last may overlap: masked below
        part = rows_of(begin, block, rows, first)
        part = jnp.where(first + jnp.arange(rows) >= wanted, part, 0.0)
        mine = lax.dynamic_slice_in_dim(current, first, rows)
        mine = mine - jnp.matmul(part.T, errors, precision=_EXACT)
        return lax.dynamic_update_slice_in_dim(current, mine, first, 0)

    num_steps = -(-(size - begin - block) // rows)
    return lax.fori_loop(0, num_steps, step, current)
