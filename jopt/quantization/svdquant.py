"""SVDQuant: the largest directions of a matrix stay, the rest goes into few bits.

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

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jopt.arrays.arguments import check_flags
from jopt.arrays.quantized_plus_low_rank import multiply_factors
from jopt.arrays.scale_fits import Fit, by_range, by_squared_error
from jopt.arrays.scales import Scale
from jopt.arrays.specs import QuantSpec
from jopt.programs.targets import Target
from jopt.quantization.gptq import check, prepare, round_prepared
from jopt.quantization.layer_report import QuantizationReport
from jopt.quantization.layer_solving import Method, Solved
from jopt.quantization.layers import quantize_layers
from jopt.quantization.low_rank import is_aligned
from jopt.quantization.nearest import round_to_nearest
from jopt.quantization.specs import SpecOrRules
from jopt.trees import rules

ResidualMethod = Literal["rtn", "gptq"]

_BLOCK_SIZE = 128  # inputs whose errors GPTQ passes on together


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
    correction: float = 0.0,
    damping: float = 0.01,
    fit: Fit | None = None,
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
        spec_or_rules: a `jopt.QuantSpec`, or rules, as for `gptq`. Outputs must have
            scales of their own, as they have where `axis` is left out.
        rank: of the factors. With 0 there are none, and the result is that of
            `jopt.rtn`, or of `jopt.gptq`.
        residual_method: how the rest is rounded: "rtn" to nearest, or "gptq".
        refit: whether the factors are found again once the rest is rounded. It never
            makes the error of a layer larger, but for damping.
        factor_dtype: of the factors.
        select: which leaves, as for `gptq`.
        error_propagation: whether a layer sees the inputs that the quantized layers
            before it give, instead of those of the floats.
        correction: as for `gptq`.
        damping: part of the mean of the diagonal that is added to it.
        fit: how scales follow from what is left; None for what `residual_method` has.
        errors: whether the report says what each layer loses of its results.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`, as for `gptq`, with `jopt.QuantizedPlusLowRank` leaves;
        factors count in the bits. Leaves whose inputs and outputs are no axes of their
        own (fused kernels that are sliced), or that have no more than `rank` of them,
        are left alone and listed.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: `rank` is no count, `residual_method` is unknown, outputs share a
            scale, or as for `gptq`.

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
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ValueError(f"rank must be a count, 0 for none, got {rank!r}")
    if residual_method not in ("rtn", "gptq"):
        raise ValueError(
            f"residual_method must be 'rtn' or 'gptq', got {residual_method!r}"
        )
    try:
        dtype = jnp.dtype(factor_dtype)
        got = "" if jnp.issubdtype(dtype, jnp.floating) else str(dtype)
    except TypeError:  # no dtype at all
        got = repr(factor_dtype)
    if got:
        raise ValueError(
            f"factor_dtype must be a float dtype, got {got}; bfloat16 is usual"
        )
    check_flags(refit=refit)
    is_gptq = residual_method == "gptq"
    if fit is None:
        fit = by_squared_error if is_gptq else by_range
    options: dict[str, Any] = {
        "damping": damping,
        "factor_dtype": jnp.dtype(factor_dtype),
        "fit": fit,
        "rank": rank,
        "refit": refit and rank > 0,
        "residual_method": residual_method,
    }
    check(**_gptq_options(options))
    method = Method(
        "svdquant",
        split_and_round,
        "gram" if options["refit"] or is_gptq else "squares",
        prepare=prepare_rest if is_gptq else None,
        options=tuple(options.items()),
        has_own_scales=rank > 0,
        fit=fit,
        refuse=functools.partial(refuse, rank=rank) if rank else None,
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
    **options: Any,
) -> Solved:
    """Split one matrix into low rank and codes.

    Args:
        weights: [inputs, outputs], float32.
        prepared: [inputs, inputs], with the Gram matrix below the diagonal; None where
            neither `refit` nor GPTQ asks for it.
        squares: [inputs], the diagonal of the Gram matrix.
        scale: of the whole, for `rank` 0; else the rest has scales of its own.
        spec: of the matrix.
        options: of `svdquant`.

    Returns:
        The rest on the grid, its scales, and the factors.
    """
    rank, dtype, damping = (options[k] for k in ("rank", "factor_dtype", "damping"))
    if rank == 0:
        return _round(weights, prepared, squares, scale, spec, options)
    factors = _rounded(low_rank_factors(weights, None, rank), dtype)
    rest = weights - multiply_factors(*factors)
    own = options["fit"](rest, spec)
    found = _round(rest, prepared, squares, own, spec, options)
    if options["refit"]:
        assert prepared is not None
        gram = prepared
        if options["residual_method"] == "gptq":  # what is above is its own
            below = jnp.tril(prepared, -1)
            gram = below + below.T + jnp.diag(squares)
        lost = weights - found.values
        again = low_rank_factors(lost, gram, rank, damping=damping)
        again = _rounded(again, dtype)
        # The first factors were rounded before the rest was found, which made up for
        # it; the second were not, so that they need not be better.
        is_better = _loss(lost, again, gram) < _loss(lost, factors, gram)
        factors = jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), again, factors
        )
    return found._replace(low_rank=factors)


def _round(
    rest: jax.Array,
    prepared: jax.Array | None,
    squares: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    options: dict[str, Any],
) -> Solved:
    if options["residual_method"] == "rtn":
        return round_to_nearest(rest, prepared, squares, scale, spec)
    assert prepared is not None
    own = _gptq_options(options)
    return round_prepared(rest, prepared, squares, scale, spec, **own)


def _gptq_options(options: dict[str, Any]) -> dict[str, Any]:
    own = {key: options[key] for key in ("damping", "fit")}
    usual = {"activation_order": False, "static_groups": False}
    return {**usual, "block_size": _BLOCK_SIZE, **own}


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
    return prepare(gram, **_gptq_options(options))


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
