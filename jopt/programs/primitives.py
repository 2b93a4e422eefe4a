"""Every primitive has an entry: it moves, multiplies, holds programs, or computes.

Whatever is not named anywhere is treated like an opaque one: it runs as it stands, what
it consumes is listed, and what it returns is no view. A test fails for each primitive
of the running JAX that has no entry, so that the decision is made by a person.
"""

from jopt.programs import compat, operations, view_rules

# Computes on values as they are; parameters that end here are listed as other uses.
_PLAIN_NAMES = """
    abs acos acosh add add_any after_all all_to_all and approx_top_k argmax argmin
    asin asinh atan atan2 atanh axis_index bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil cholesky clamp clz complex conj cos cosh
    create_token cumlogsumexp cummax cummin cumprod cumsum debug_callback
    debug_print digamma dynamic_update_slice eig eigh empty empty2 eq eq_to erf
    erf_inv erfc exp exp2 expm1 fft floor ge gt hessenberg householder_product
    igamma igamma_grad_a igammac imag integer_pow io_callback iota is_finite
    layout_constraint le le_to lgamma log log1p log2 logistic lt lt_to lu max min ne
    nextafter not one_minus_square or pad pgather pmax pmin polygamma polynomial
    population_count pow ppermute psum psum2 psum_invariant pure_callback qr
    ragged_all_to_all random_bits random_clone random_fold_in random_gamma
    random_seed random_split random_unwrap random_wrap real reduce reduce_and
    reduce_max reduce_min reduce_or reduce_prod reduce_scatter reduce_sum
    reduce_window reduce_window_max reduce_window_min reduce_window_sum reduce_xor
    regularized_incomplete_beta rem rng_bit_generator rng_uniform round rsqrt
    scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub schur
    select_and_gather_add select_and_scatter select_and_scatter_add select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sort sqrt
    square sub svd tan tanh threefry2x32 top_k triangular_solve tridiagonal
    tridiagonal_solve unreduced_psum vary_unreduced_cast xor zeta
"""
PLAIN = frozenset(_PLAIN_NAMES.split())

# Read and write references, whose content is no result of an equation.
REFS = frozenset(
    {"addupdate", "empty_ref", "freeze", "get", "mutable_array", "new_ref", "swap"}
)

# Holds programs or foreign code that is never entered.
_OPAQUE_NAMES = """
    call composite custom_lin custom_linear_solve custom_partitioning custom_root
    eval_jaxpr ffi_call pallas_call
"""
OPAQUE = frozenset(_OPAQUE_NAMES.split())


def known() -> frozenset[str]:
    """List the names of all primitives with an entry.

    Returns:
        Those of the tables here, of views, of operations and of control flow.
    """
    return frozenset().union(
        PLAIN,
        REFS,
        OPAQUE,
        view_rules.SAME,
        view_rules.RULES,
        operations.TABLE,
        compat.ENTERED,
    )


def is_opaque(name: str, *, holds_bodies: bool) -> bool:
    """Tell whether jopt does not look into an operation that has something inside.

    Args:
        name: of the primitive.
        holds_bodies: whether an equation of it holds other programs.

    Returns:
        True for foreign code, and for programs other than the combiners of reductions.
    """
    return name in OPAQUE or (holds_bodies and name not in PLAIN)
