"""Counts of elements are exact beyond 32 bits, traced or not."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.arrays import counts

numbers = st.integers(0, 2**47 - 1)
few = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = [
    *(1, 2, 3, 10, 25, 999, 10**6, 10**6 + 1, 2**24 + 1, 2**25 + 1),
    *(2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 3 * 2**32 + 7, 2**40 + 5),
    *(10**12 + 1, 2**47 + 11),
]


def to_int(count):
    return int(count.high) * 2**16 + int(count.low)


def limbs(*values):
    return counts.Count(
        jnp.array([value >> 16 for value in values], jnp.uint32),
        jnp.array([value & 0xFFFF for value in values], jnp.uint32),
    )


def round_half_even(numerator, denominator):
    return round(Fraction(numerator, denominator))


@few
@given(numbers, numbers)
def test_arithmetic_is_that_of_integers(a, b):
    x, y = counts.as_count(a), counts.as_count(b)
    assert to_int(counts.add(x, y)) == a + b
    assert to_int(counts.subtract(x, y)) == max(a - b, 0)
    assert bool(counts.less(x, y)) == (a < b)
    assert bool(counts.equal(x, y)) == (a == b)
    assert to_int(counts.smaller(x, y)) == min(a, b)
    assert int(counts.clip_to_int(x, 12345)) == min(a, 12345)
    assert float(counts.to_float(x)) == pytest.approx(a, rel=1e-6)


def test_a_total_over_leaves_passes_2_to_the_33():
    leaves = [2**31 + 3, 2**32 - 1, 2**32 + 5, 7]
    assert to_int(counts.total(limbs(*leaves))) == sum(leaves)


@pytest.mark.parametrize("number", [0, 5, -3, 2**31 - 1])
def test_a_traced_integer_widens_as_a_python_integer_does(number):
    assert to_int(jax.jit(counts.as_count)(number)) == to_int(counts.as_count(number))
    assert to_int(counts.as_count(number)) == max(number, 0)


def test_a_float_is_no_count():
    with pytest.raises(TypeError, match="k must be an integer, got float32"):
        counts.as_count(jnp.float32(3))


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5)])
def test_summing_in_limbs_counts_what_is_true(monkeypatch, shape):
    values = np.random.default_rng(0).random(shape) < 0.5
    assert to_int(counts.sum_of_booleans(values)) == values.sum()
    monkeypatch.setattr(counts, "_NARROW", 0)  # as an array of 2^31 elements is summed
    assert to_int(counts.sum_of_booleans(jnp.asarray(values))) == values.sum()


def test_limbs_carry_when_rows_add_up_beyond_32_bits():
    rows = [2**31 - 1, 2**24 - 1, 65535, 65536] * 50
    assert to_int(counts._sum_last_axis(limbs(*rows))) == sum(rows)


@pytest.mark.parametrize("size", SIZES)
def test_traced_and_python_sparsities_prune_the_same_number(size):
    random = np.random.default_rng(size % 1000).random(40)
    sparsities = np.float32([*random, 0, 1, 0.5, 0.9, 0.123456, 1 / 3, 1e-6, 1 - 1e-6])
    traced = jax.vmap(lambda sparsity: counts.num_pruned(size, sparsity))(sparsities)
    for i, sparsity in enumerate(sparsities):
        parts = round(float(np.float32(sparsity) * np.float32(1e6)))
        expected = round_half_even(parts * size, 10**6)
        assert counts.num_pruned(size, float(sparsity)) == expected
        assert to_int(traced.at(i)) == expected


@few
@given(st.integers(1, 2**44), st.integers(0, 10**6))
def test_six_decimals_are_exact(size, parts):
    expected = round_half_even(parts * size, 10**6)
    assert counts.num_pruned(size, parts / 1e6) == expected
    assert to_int(counts.num_pruned(size, jnp.float32(parts / 1e6))) == expected


def test_the_count_is_not_off_by_one_where_float32_was():
    """In float32, `round(size * (1 - sparsity))` misses at 2^25 + 1."""
    size = 2**25 + 1
    assert counts.num_pruned(size, 0.9) == round(Fraction(9, 10) * size)
    assert counts.num_pruned(size, 0.0) == 0
    assert counts.num_pruned(size, 1.0) == size


@pytest.mark.parametrize("size, pruned", [(5, 2), (15, 8), (25, 12)])
def test_halves_go_to_the_even_neighbour(size, pruned):
    assert counts.num_pruned(size, 0.5) == pruned
    assert to_int(counts.num_pruned(size, jnp.float32(0.5))) == pruned


@pytest.mark.parametrize("sparsity, pruned", [(-0.5, 0), (1.5, 100), (np.nan, 0)])
def test_an_array_out_of_range_is_clipped(sparsity, pruned):
    traced = jax.jit(counts.num_pruned, static_argnums=0)
    assert to_int(traced(100, jnp.float32(sparsity))) == pruned


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), 90, np.float32(2)])
def test_a_python_number_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got"):
        counts.num_pruned(100, sparsity)


def test_a_sparsity_for_each_layer_is_refused():
    with pytest.raises(ValueError, match="sparsity must be a scalar, got shape"):
        counts.num_pruned(100, jnp.zeros(3))
    with pytest.raises(TypeError, match="sparsity must be a number"):
        counts.num_pruned(4, "0.5")
    with pytest.raises(ValueError, match="got nan: look at the schedule"):
        counts.num_pruned(4, jnp.array(float("nan")))
