"""Ranges and scales: what the definitions say, and no group lost in between."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.arrays import formats
from jopt.arrays.quantized import dequantize, fake_quantize, quantize_array
from jopt.arrays.scales import (
    Scale,
    compute_range,
    compute_scale,
    effective_scale,
    sum_groups,
)
from jopt.arrays.specs import QuantSpec
from tests.arrays.test_formats import KINDS, every_format, every_kind, same_bits

ranges = jax.jit(compute_range, static_argnames="spec")
scales = jax.jit(
    lambda w, spec: compute_scale(*compute_range(w, spec), spec), static_argnames="spec"
)
round_trip = jax.jit(
    lambda w, spec: dequantize(quantize_array(w, spec)), static_argnames="spec"
)
RNG = np.random.default_rng(0)
W = RNG.normal(size=(64, 6)).astype(np.float32)


def spec_of(format, **options):
    if format.group_size is None:
        options = {"group_size": 16} | options
    return QuantSpec(format, symmetric=format.signed, **options)


def groups(w, size):
    """(groups, size, outputs) of a (inputs, outputs) matrix."""
    return np.asarray(w, np.float64).reshape(-1, size, w.shape[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_range_holds_zero_and_every_element(dtype):
    w = jnp.asarray(W + 1.0, dtype)
    low, high = ranges(w, QuantSpec(formats.int4, group_size=16))
    split = groups(w, 16)
    assert low.dtype == high.dtype == jnp.float32 and low.shape == (4, 6)
    np.testing.assert_array_equal(low, np.minimum(split.min(1), 0))
    np.testing.assert_array_equal(high, split.max(1))
    low, _ = ranges(jnp.abs(w), QuantSpec(formats.int4, group_size=16))
    np.testing.assert_array_equal(low, 0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float32])
def test_a_symmetric_scale_takes_the_largest_to_the_last_level(bits, scale_dtype):
    spec = QuantSpec(
        getattr(formats, f"int{bits}"), group_size=16, scale_dtype=scale_dtype
    )
    expected = np.abs(groups(W, 16)).max(1).astype(np.float32)
    expected = (expected / np.float32(2 ** (bits - 1) - 1)).astype(scale_dtype)
    same_bits(scales(W, spec).scale, expected)


@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4", "uint2"])
@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float32])
def test_an_asymmetric_range_fits_the_grid(name, scale_dtype):
    """Zero is a level, and every element is within half a step of its own."""
    format = getattr(formats, name)
    spec = QuantSpec(format, group_size=16, symmetric=False, scale_dtype=scale_dtype)
    w = W + np.float32([[-3, -1, 0, 1, 3, 9]])
    scale, zero_point, outer_scale = scales(w, spec)
    assert scale.dtype == scale_dtype and zero_point.dtype == format.code_dtype
    assert zero_point.shape == scale.shape == (4, 6) and outer_scale is None
    split = groups(w, 16)
    width = np.maximum(split.max(1), 0) - np.minimum(split.min(1), 0)
    exact = width / (2**format.bits - 1)
    step = np.float64(scale)
    assert (step >= exact * (1 - 1e-6)).all() and (step <= exact * (1 + 2**-7)).all()
    error = groups(round_trip(w, spec) - w, 16)
    assert (np.abs(error) <= step[:, None] * 0.5001).all()
    w[5] = 0.0
    np.testing.assert_array_equal(round_trip(w, spec)[5], 0.0)


def test_mean_formats_take_the_mean_magnitude():
    expected = np.abs(groups(W, 16)).mean(1)
    for format in (formats.ternary, formats.binary):
        scale = scales(W, QuantSpec(format, group_size=16)).scale
        np.testing.assert_allclose(np.float64(scale), expected, rtol=2**-8)
    for magnitude in (1e-37, 1e38):  # a sum would leave float32
        w = np.full((1000, 1), magnitude, np.float32)
        scale = scales(w, QuantSpec(formats.binary, scale_dtype=jnp.float32)).scale
        np.testing.assert_allclose(scale, magnitude, rtol=1e-6)


def test_what_is_ternary_keeps_its_scale():
    w = np.float32([[0.75, 0.0, 0.0, -0.75, 0.0, 0.0]]).T
    same_bits(round_trip(w, QuantSpec(formats.ternary)), w)
    one = np.zeros((100, 1), np.float32)
    one[7] = 3.0
    same_bits(round_trip(one, QuantSpec(formats.ternary)), one)


def microscaling(w, dtype, largest_exponent):
    """OCP MX 1.0, section 6.3, on (inputs, outputs) in groups of 32."""
    split = np.float64(w).reshape(-1, 32, w.shape[-1])
    exponent = np.floor(np.log2(np.abs(split).max(1))) - largest_exponent
    scale = np.exp2(exponent)
    top = float(ml_dtypes.finfo(dtype).max)
    codes = (split / scale[:, None]).clip(-top, top).astype(np.float32).astype(dtype)
    values = codes.astype(np.float64) * scale[:, None]
    return scale, values.reshape(w.shape)


@pytest.mark.parametrize(
    ("format", "dtype", "largest_exponent"),
    [
        (formats.mxfp8, ml_dtypes.float8_e4m3fn, 8),
        (formats.mxfp4, ml_dtypes.float4_e2m1fn, 2),
    ],
)
def test_microscaling_follows_the_ocp_rules(format, dtype, largest_exponent):
    w = W * np.float32(2.0) ** RNG.integers(-60, 60, (2, 1, 6)).repeat(32, 1).reshape(
        W.shape
    )
    expected_scale, expected = microscaling(w, dtype, largest_exponent)
    scale = scales(w, QuantSpec(format)).scale
    same_bits(scale, expected_scale.astype(ml_dtypes.float8_e8m0fnu))
    same_bits(round_trip(w, QuantSpec(format)), expected.astype(np.float32))


def test_e8m0_scales_are_the_powers_of_two():
    exponents = np.arange(-126 + 9, 128 - 9)  # the mxfp8 scales of normal numbers
    w = np.exp2(exponents + 8.0).astype(np.float32) * np.ones((32, 1), np.float32)
    scale = scales(w, QuantSpec(formats.mxfp8)).scale
    np.testing.assert_array_equal(
        np.asarray(scale).view(np.uint8), (exponents + 127)[None].astype(np.uint8)
    )


def test_nvfp4_has_a_scale_per_group_and_one_per_matrix():
    spec = QuantSpec(formats.nvfp4)
    scale, zero_point, outer_scale = scales(W, spec)
    largest = np.abs(W).max()
    expected_outer = (largest / np.float32(6 * 448)).astype(ml_dtypes.bfloat16)
    same_bits(outer_scale, expected_outer.astype(np.float32).reshape(1, 1))
    split = np.float32(W).reshape(4, 16, 6)
    expected = np.abs(split).max(1) / np.float32(outer_scale) / np.float32(6)
    same_bits(scale, expected.clip(2**-6, 448).astype(ml_dtypes.float8_e4m3fn))
    step = np.float32(scale)[:, None] * np.float32(outer_scale)
    codes = (split / step).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    expected_values = (codes.astype(np.float32) * step).reshape(W.shape)
    same_bits(round_trip(W, spec), expected_values)
    assert zero_point is None


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((32, 4), None, (1, 1)),
        ((32,), None, (1,)),
        ((3, 32, 4), None, (3, 1, 1)),
        ((3, 32, 4), (0, 2), (3, 1, 1)),
        ((4, 32), 0, (1, 1)),
        ((32, 4, 2), (1, 2), (1, 1, 1)),
        ((3, 32, 4, 2), (0, 2, 3), (3, 1, 1, 1)),
    ],
)
def test_stacked_matrices_keep_outer_scales_of_their_own(shape, axis, expected):
    w = RNG.normal(size=shape).astype(np.float32)
    scale = scales(w, QuantSpec(formats.nvfp4, axis=axis))
    assert scale.outer_scale.shape == expected
    assert effective_scale(scale).shape == scale.scale.shape


@every_format
def test_a_group_of_zeros_has_scale_one_and_stays_zero(format):
    w = W.copy()
    w[:32, :3] = 0.0
    spec = spec_of(format)
    scale = np.float32(scales(w, spec).scale)
    zero_groups = 32 // spec.group_size
    expected = 0.0 if format.scale_rule == "mean" else 1.0
    assert (scale[:zero_groups, :3] == expected).all()
    for quantized in (round_trip(w, spec), fake_quantize(w, spec)):
        np.testing.assert_array_equal(quantized[:32, :3], 0.0)
        assert (np.asarray(quantized)[32:] != 0).any()
    np.testing.assert_array_equal(round_trip(np.zeros_like(w), spec), 0.0)


# Groups of 32 elements, the exponent of the largest of each; below, elements of a
# group.
EXPONENTS = st.lists(st.floats(-37, 38), min_size=8, max_size=8)


@every_format
@settings(max_examples=15, deadline=None, derandomize=True)
@given(exponents=EXPONENTS, spread=st.floats(0, 30), seed=st.integers(0, 99))
def test_no_group_is_mapped_to_zeros(format, exponents, spread, seed):
    rng = np.random.default_rng(seed)
    if format is formats.nvfp4:  # whose groups must be within 2^19 of the largest
        exponents = np.clip(exponents, max(exponents) - 5.7, None)
    largest = np.maximum(10.0 ** np.array(exponents), 1.2e-38)
    share = rng.choice([-1, 1], (32, 8)) * 10.0 ** -rng.uniform(
        0, spread + 1e-9, (32, 8)
    )
    share[rng.integers(0, 32, 8), np.arange(8)] = rng.choice([-1, 1], 8)
    w = (share * largest).astype(np.float32)
    quantized = np.asarray(round_trip(w, spec_of(format, group_size=None)))
    assert np.isfinite(quantized).all()
    by_group = quantized.reshape(-1, format.group_size or 32, 8)
    has_largest = (np.abs(w) >= 1.2e-38).reshape(by_group.shape).any(1)
    if format is formats.nvfp4:
        tops = np.abs(w).reshape(by_group.shape).max(1)
        has_largest = tops > np.abs(w).max() * 2.0**-19
    assert (by_group != 0).any(1)[has_largest].all()


@every_format
@pytest.mark.parametrize("magnitude", [1e-37, 1e-20, 1.0, 1e20, 1e38])
def test_a_lone_magnitude_survives(format, magnitude):
    w = np.full((64, 2), magnitude, np.float32) * np.float32([[1, -1]])
    quantized = np.asarray(round_trip(w, spec_of(format)))
    np.testing.assert_allclose(quantized, w, rtol=0.26)  # mxfp4 clips 7.9 to 6


@pytest.mark.parametrize("format", [f for f in KINDS if f.signed], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_number_of_a_dtype_stays_finite(format, dtype):
    largest = float(jnp.finfo(dtype).max)
    w = jnp.full((32, 1), largest, dtype)
    quantized = round_trip(w, spec_of(format, group_size=None))
    assert quantized.dtype == dtype and bool(jnp.isfinite(quantized).all())
    assert float(quantized[0, 0]) > 0.7 * largest


@every_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_with_a_number_that_is_none_reads_nan(format, bad):
    w = W.copy()
    w[3, 2] = bad
    spec = spec_of(format)
    poisoned = np.isnan(round_trip(w, spec))
    same_bits(np.isnan(fake_quantize(w, spec)), poisoned)
    if format is formats.nvfp4:  # the whole matrix shares the outer scale
        assert poisoned.all()
    else:
        assert poisoned[: spec.group_size, 2].all()
        assert poisoned.sum() == spec.group_size


def test_traced_bits_are_the_widths_of_the_formats():
    low, high = ranges(W, QuantSpec(formats.int8))
    by_width = jax.jit(
        lambda bits, spec: compute_scale(low, high, spec, bits=bits),
        static_argnames="spec",
    )
    for bits in range(2, 9):
        narrow = QuantSpec(getattr(formats, f"int{bits}"))
        expected = compute_scale(low, high, narrow).scale
        for width in (bits, float(bits), jnp.float32(bits)):
            same_bits(by_width(width, QuantSpec(formats.int8)).scale, expected)
        uint = QuantSpec(getattr(formats, f"uint{bits}"), symmetric=False)
        expected = compute_scale(low, high, uint)
        actual = by_width(bits, QuantSpec(formats.uint8, symmetric=False))
        same_bits(actual.scale, expected.scale)
        same_bits(actual.zero_point, expected.zero_point)


def test_bits_that_do_not_fit_are_refused():
    low, high = -jnp.ones((1, 1)), jnp.ones((1, 1))
    int8 = QuantSpec(formats.int8)
    for bits in (1, 17, 0.5):
        with pytest.raises(ValueError, match=f"bits must be in 2 to 16.*got {bits}"):
            compute_scale(low, high, int8, bits=bits)
    with pytest.raises(ValueError, match="bits must be in 2 to 8"):
        compute_scale(low, high, QuantSpec(formats.int8, symmetric=False), bits=9)
    with pytest.raises(ValueError, match="bits must be None for nf4"):
        compute_scale(low, high, QuantSpec(formats.nf4), bits=4)


def test_scales_map_over_layers():
    stacked = RNG.normal(size=(3, 64, 6)).astype(np.float32)
    spec = QuantSpec(formats.nvfp4)
    together = jax.vmap(functools.partial(scales, spec=spec))(stacked)
    for i, layer in enumerate(stacked):
        alone = scales(layer, spec)
        same_bits(together.scale[i], alone.scale)
        same_bits(together.outer_scale[i], alone.outer_scale)


def test_sums_are_over_groups_in_float32():
    w = jnp.full((4096, 2), 1.0, jnp.bfloat16)
    summed = sum_groups(w, (2, 1))
    same_bits(summed, np.full((2, 1), 4096.0, np.float32))
    assert Scale(summed).zero_point is None
