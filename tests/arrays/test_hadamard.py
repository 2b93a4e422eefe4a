"""The Hadamard transform against matrices, and what must hold whatever the size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from jopt.arrays.hadamard import block_size, hadamard_transform


def matrix(size):
    """Read the matrix of the transform off the unit vectors."""
    rows = hadamard_transform(jnp.eye(size, dtype=jnp.float32), axis=0)
    return np.asarray(rows, np.float64)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 128])
def test_powers_of_two_are_sylvesters(size):
    expected = scipy.linalg.hadamard(size) / np.sqrt(size)
    np.testing.assert_allclose(matrix(size), expected, atol=1e-7)
    if size in (4, 64):  # whole numbers times a power of two
        np.testing.assert_array_equal(matrix(size), expected)


@pytest.mark.parametrize("size", [12, 20, 24, 28, 36, 44, 56, 60, 76, 96, 104, 768])
def test_paleys_sizes_mix_all(size):
    """Entries of one size, and rows that are orthogonal, make a Hadamard matrix."""
    assert block_size(size) == size
    signs = matrix(size) * np.sqrt(size)
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-5)
    whole = np.rint(signs).astype(int)
    np.testing.assert_array_equal(whole @ whole.T, size * np.eye(size, dtype=int))


@pytest.mark.parametrize(
    ("size", "block"), [(7, 1), (10, 2), (52, 4), (92, 4), (172 * 8, 32), (0, 1)]
)
def test_other_sizes_are_cut_into_blocks(size, block):
    assert block_size(size) == block
    if not size:
        assert hadamard_transform(jnp.ones((3, 0))).shape == (3, 0)
        return
    one = scipy.linalg.hadamard(block) / np.sqrt(block)
    expected = np.kron(np.eye(size // block), one)
    np.testing.assert_allclose(matrix(size), expected, atol=1e-6)


@given(st.sampled_from([4, 12, 16, 28, 48, 10]), st.integers(0, 2), st.integers(0, 9))
def test_the_inverse_undoes_it_and_norms_stay(size, axis, seed):
    shape = [2, 3, 2]
    shape[axis] = size
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    y = hadamard_transform(x, axis=axis)
    np.testing.assert_allclose(
        np.linalg.norm(y, axis=axis), np.linalg.norm(x, axis=axis), rtol=1e-5
    )
    back = hadamard_transform(y, axis=axis - 3, inverse=True)
    np.testing.assert_allclose(back, x, atol=3e-6)


def test_powers_of_four_are_exact():
    x = jax.random.randint(jax.random.key(0), (5, 256), -100, 100).astype(jnp.float32)
    y = hadamard_transform(x)
    expected = np.asarray(x, np.float64) @ scipy.linalg.hadamard(256) / 16
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(hadamard_transform(y, inverse=True), x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """Sums of 1024 numbers of 100 are beyond float16; results are rounded once."""
    x = jnp.full((1024,), 100, dtype)
    y = hadamard_transform(x)
    assert y.dtype == dtype
    assert y[0] == 3200 and not y[1:].any()


def test_under_transformations():
    x = jax.random.normal(jax.random.key(1), (3, 12))
    y = hadamard_transform(x)
    # Fused sums round another way.
    np.testing.assert_allclose(jax.jit(hadamard_transform)(x), y, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(hadamard_transform)(x), y, atol=1e-6)
    _, pull = jax.vjp(hadamard_transform, x)
    np.testing.assert_allclose(
        pull(y)[0], hadamard_transform(y, inverse=True), atol=1e-6
    )


def test_integers_are_refused():
    with pytest.raises(TypeError, match="must be a float array, got int32"):
        hadamard_transform(jnp.arange(4))
