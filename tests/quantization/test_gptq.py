"""GPTQ on one matrix, against the paper's algorithm in NumPy."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt.arrays.codes import compute_codes, decode
from jopt.arrays.scales import Scale, compute_range, compute_scale
from jopt.quantization.layer_solving import matrix_spec
from tests.quantization.by_hand import gptq_by_hand, round_by_hand

# The package has a function of the name of the module.
gptq_matrix = sys.modules["jopt.quantization.gptq"].gptq_matrix
F = jopt.formats


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make(size, outputs, seed=0):
    """Draw weights, and the Gram matrix of correlated integers: exact in float32."""
    x = np.rint(3 * draw(4 * size, size, seed=seed) @ draw(size, size, seed=1) / 4)
    return draw(size, outputs, seed=2), (x.T @ x).astype(np.float32)


SPECS = [
    jopt.QuantSpec(F.int4, group_size=16),
    jopt.QuantSpec(F.int3),
    jopt.QuantSpec(F.int8, scale_dtype=jnp.float32),
    jopt.QuantSpec(F.uint4, symmetric=False, group_size=12),
    jopt.QuantSpec(F.int4, symmetric=False),
    jopt.QuantSpec(F.int3, group_size=12, narrow_range=False),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("option", ["", "activation_order", "static_groups"])
def test_equals_the_published_algorithm(spec, option):
    weights, gram = make(48, 7)
    options = {option: True} if option else {}
    found, scale = gptq_matrix(weights, gram, spec, block_size=32, **options)
    expected, codes = gptq_by_hand(weights, gram, spec, **options)
    np.testing.assert_array_equal(compute_codes(found, scale, spec), codes)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        jopt.QuantSpec(F.uint2, symmetric=False, group_size=128),
        jopt.QuantSpec(F.int2, narrow_range=False, group_size=128),
    ],
    ids=str,
)
def test_static_groups_lose_less_in_large_groups_of_two_bits(spec):
    """Where scales reach the largest weights: there what comes in widens a range."""
    weights, gram = make(256, 32)
    lost = []
    for static_groups in (True, False):
        found, _ = gptq_matrix(
            weights,
            gram,
            spec,
            static_groups=static_groups,
            fit=jopt.scale_fits.by_range,
        )
        d = weights - np.asarray(found, np.float64)
        lost.append(np.sum(d * (gram @ d)))
    assert lost[0] < 0.97 * lost[1]


@pytest.mark.parametrize("block", [1, 16, 24, 48, 500])
def test_blocks_do_not_change_the_result(block):
    weights, gram = make(48, 5)
    spec = jopt.QuantSpec(F.int4, group_size=24)
    expected, _ = gptq_by_hand(weights, gram, spec)
    found, _ = gptq_matrix(weights, gram, spec, block_size=block)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        jopt.QuantSpec(F.int2, group_size=8),
        jopt.QuantSpec(F.nf4, group_size=8),
        jopt.QuantSpec(F.ternary),
        jopt.QuantSpec(F.fp8_e4m3),
        jopt.QuantSpec(F.fp4_e2m1, group_size=8),
        jopt.QuantSpec(F.mxfp4),
        jopt.QuantSpec(F.nvfp4),
        jopt.QuantSpec(F.uint2, symmetric=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", [False, True])
def test_every_format_lies_on_its_grid_and_beats_rounding(spec, order):
    weights, gram = make(64, 6)
    found, scale = gptq_matrix(weights, gram, spec, activation_order=order)
    again = decode(compute_codes(found, scale, spec), scale, spec)
    np.testing.assert_array_equal(found, again)
    nearest = compute_scale(*compute_range(jnp.asarray(weights), spec), spec)
    rounded = decode(compute_codes(weights, nearest, spec), nearest, spec)

    def lost(q):
        d = np.asarray(weights, np.float64) - np.asarray(q)
        return np.sum(d * (gram @ d))

    assert lost(found) < lost(rounded)


@pytest.mark.parametrize("name", ["by_range", "by_squared_error"])
def test_with_uncorrelated_inputs_it_is_rounding_to_nearest(name):
    weights, fit = draw(32, 5), getattr(jopt.scale_fits, name)
    spec = jopt.QuantSpec(F.int4, group_size=8)
    gram = np.diag(np.abs(draw(32, seed=3)) + 0.5)
    found, scale = gptq_matrix(weights, gram, spec, damping=0.0, fit=fit)
    expected = jopt.quantize(jnp.asarray(weights), spec, fit=fit)
    np.testing.assert_array_equal(found, jopt.dequantize(expected))
    np.testing.assert_array_equal(scale.scale, expected.scale)


def test_an_input_that_never_comes_is_rounded_to_nearest():
    weights, gram = make(16, 3)
    gram[5] = gram[:, 5] = 0
    spec = jopt.QuantSpec(F.int8)
    found, _ = gptq_matrix(weights, gram, spec)
    expected = jopt.dequantize(jopt.quantize(jnp.asarray(weights), spec))
    np.testing.assert_array_equal(found[5], expected[5])
    assert np.any(np.asarray(found) != expected)


def test_what_is_not_positive_definite_gives_no_number():
    gram = np.eye(8, dtype=np.float32)
    gram[3, 3] = -1
    found, _ = gptq_matrix(draw(8, 2), gram, jopt.QuantSpec(F.int4), damping=0.0)
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"damping": -0.1}, "damping must be at least 0 and finite, got -0.1"),
        ({"damping": float("nan")}, "damping must be at least 0 and finite, got nan"),
    ],
)
def test_wrong_arguments_raise(options, match):
    weights, gram = make(8, 2)
    with pytest.raises(ValueError, match=match):
        gptq_matrix(weights, gram, jopt.QuantSpec(F.int4), **options)
    with pytest.raises(ValueError, match=r"gram must have shape \(8, 8\)"):
        gptq_matrix(weights, gram[1:], jopt.QuantSpec(F.int4))


def test_the_reference_rounds_as_jopt_does():
    """So that what it says of GPTQ is not a matter of scales."""
    weights = draw(32, 4)
    for spec in SPECS:
        spec = matrix_spec(spec)
        if spec.group_size and 32 % spec.group_size:
            continue
        scale = compute_scale(*compute_range(jnp.asarray(weights), spec), spec)
        expected = compute_codes(weights, scale, spec)
        np.testing.assert_array_equal(round_by_hand(weights, spec)[1], expected)
        assert isinstance(scale, Scale)
    assert jax.config.jax_enable_x64 is False
