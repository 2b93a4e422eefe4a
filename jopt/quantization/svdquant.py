"""SVDQuant on one matrix: its largest directions stay, the rest goes into few bits.

    W ~ L + Q,    L = A B of rank r,    Q = round(W - L)

First L is the r largest singular directions of W, which leaves the rest the smallest
norm (Eckart and Young), and so a small range to round. Then, Q given, L is found again
as what is best for the inputs X of the layer: with X^T X + damping = C C^T, C lower,

    min ||X (W - Q - L)||    at    C^T L = the r largest directions of C^T (W - Q).

Weighing the first L too would make the rest larger where inputs are small, and with it
the scales of all: it loses more than it gains.

Li et al., SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion
Models, arXiv:2411.05007, which smooths W by the range of the inputs before.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jopt.arrays.scales import Scale, compute_range, compute_scale
from jopt.arrays.specs import QuantSpec
from jopt.programs.targets import Target
from jopt.quantization.gptq import prepare, round_prepared
from jopt.quantization.layer_solving import Solved, multiply_factors
from jopt.quantization.low_rank import is_aligned
from jopt.quantization.nearest import round_to_nearest

ResidualMethod = Literal["rtn", "gptq"]


def low_rank_factors(
    weights: jax.Array, gram: jax.Array | None, rank: int, *, damping: float = 0.01
) -> tuple[jax.Array, jax.Array]:
    """Find the best approximation of a rank for what a matrix computes.

    min ||X (W - A B)||_F

    Args:
        weights: W [inputs, outputs].
        gram: [inputs, inputs]: X^T X at any scale; None to weigh all inputs alike.
        rank: r, at most the smaller size.
        damping: added to the diagonal, as a fraction of its mean.

    Returns:
        A [inputs, rank] and B [rank, outputs], float32, of equal norms in each
        direction where inputs weigh alike.

    >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> a, b = low_rank_factors(w, None, 1)
    >>> jnp.round(a @ b, 4) + 0.0
    Array([[3., 0.],
           [0., 0.]], dtype=float32)
    """
    wide = weights.astype(jnp.float32)
    if gram is None:
        u, s, v = jnp.linalg.svd(wide, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        return u[:, :rank] * root[None], root[:, None] * v[:rank]
    size = gram.shape[0]
    ridge = damping * jnp.mean(jnp.diagonal(gram))
    lower = jnp.linalg.cholesky(gram + ridge * jnp.eye(size, dtype=gram.dtype))
    scaled = jnp.matmul(lower.T, wide, precision=jax.lax.Precision.HIGHEST)
    u, s, v = jnp.linalg.svd(scaled, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    left = jax.scipy.linalg.solve_triangular(
        lower, u[:, :rank] * root[None], trans=1, lower=True
    )
    return left, root[:, None] * v[:rank]


def split_and_round(
    weights: jax.Array,
    prepared: jax.Array | None,
    squares: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    *,
    rank: int,
    factor_dtype: DTypeLike,
    refit: bool,
    residual_method: ResidualMethod,
    block_size: int,
    damping: float,
) -> Solved:
    """Split one matrix into low rank and codes.

    Args:
        weights: [inputs, outputs], float32.
        prepared: [inputs, inputs], with the Gram matrix below the diagonal; None where
            neither `refit` nor GPTQ asks for it.
        squares: [inputs], the diagonal of the Gram matrix.
        scale: of no account: the rest has scales of its own.
        spec: of the matrix.
        rank: of the factors.
        factor_dtype: of the factors.
        refit: whether factors are found again once the rest is rounded.
        residual_method: how the rest is rounded.
        block_size: of GPTQ.
        damping: part of the mean of the diagonal that is added to it.

    Returns:
        The rest on the grid, its scales, and the factors.
    """
    del scale
    factors = _rounded(low_rank_factors(weights, None, rank), factor_dtype)
    rest = weights - multiply_factors(*factors)
    own = compute_scale(*compute_range(rest, spec), spec)
    if residual_method == "rtn":
        found = round_to_nearest(rest, None, squares, own, spec)
    else:
        assert prepared is not None
        options: dict[str, Any] = {
            "activation_order": False,
            "block_size": block_size,
            "damping": damping,
        }
        found = round_prepared(rest, prepared, squares, own, spec, **options)
    if refit:
        assert prepared is not None
        below = jnp.tril(prepared, -1)
        gram = below + below.T + jnp.diag(squares)
        lost = weights - found.values
        again = low_rank_factors(lost, gram, rank, damping=damping)
        again = _rounded(again, factor_dtype)
        # The first factors were rounded before the rest was found, which made up for
        # it; the second were not, so that they need not be better.
        is_better = _loss(lost, again, gram) < _loss(lost, factors, gram)
        factors = jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), again, factors
        )
    return found._replace(low_rank=factors)


def _rounded(
    factors: tuple[jax.Array, jax.Array], dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    return factors[0].astype(dtype), factors[1].astype(dtype)


def _loss(
    lost: jax.Array, factors: tuple[jax.Array, jax.Array], gram: jax.Array
) -> jax.Array:
    """Return ||X (W - Q - A B)||^2."""
    rest = lost - multiply_factors(*factors)
    product = jnp.matmul(gram, rest, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(rest * product)


def prepare_rest(gram: jax.Array, **options: Any) -> jax.Array:
    """Get a Gram matrix ready for GPTQ on what is left.

    Args:
        gram: [inputs, inputs].
        options: of `split_and_round`.

    Returns:
        [inputs, inputs], what is below the diagonal as it was.
    """
    return prepare(gram, activation_order=False, damping=options["damping"])


def refuse(target: Target, *, rank: int) -> str | None:
    """Say why a leaf cannot be split, if it cannot.

    Args:
        target: matrices of the leaf.
        rank: of the factors.

    Returns:
        The reason, or None.
    """
    layers, batch, columns, outputs = target.layout.sizes
    if not is_aligned(target.layout):
        return "its inputs and outputs are not whole axes of the leaf"
    if rank >= min(columns, outputs):
        return f"rank {rank} is no less than that of a matrix [{columns}, {outputs}]"
    lead = {a.axis for group in target.layout.groups[:2] for a in group}
    is_first = lead == set(range(len(lead)))
    if target.goal.format.name == "nvfp4" and layers * batch > 1 and not is_first:
        return "nvfp4 has one outer scale for several of its matrices"
    return None
