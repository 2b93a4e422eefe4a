"""Fake quantization is quantization, with the derivative of the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays import formats
from jopt.arrays.quantized import dequantize, fake_quantize, quantize_array
from jopt.arrays.rounding import stochastic
from jopt.arrays.scales import Scale, compute_range, compute_scale
from jopt.arrays.specs import QuantSpec
from jopt.arrays.straight_through import straight_through
from tests.arrays.test_formats import KINDS, every_format, every_kind, same_bits
from tests.arrays.test_scales import W, spec_of

KEY = jax.random.key(0)


@every_format
def test_equals_quantized_and_back_bit_for_bit(format):
    w, spec = jnp.asarray(W), spec_of(format)
    expected = dequantize(quantize_array(w, spec))
    same_bits(fake_quantize(w, spec), expected)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(format, "float32") for format in KINDS]
    + [(f, d) for f in (formats.int8, formats.mxfp4) for d in ("bfloat16", "float16")],
)
def test_equals_it_in_every_dtype_and_within_a_larger_program(format, dtype):
    w, spec = jnp.asarray(W, dtype), spec_of(format)
    expected = dequantize(quantize_array(w, spec))
    assert expected.dtype == dtype

    @jax.jit
    def program(w):
        return fake_quantize(w, spec), dequantize(quantize_array(w, spec))

    for inside in program(w):
        same_bits(inside, expected)


@pytest.mark.parametrize("name", ["int8", "uint4", "nf4", "fp8_e4m3"])
@pytest.mark.parametrize("axis", [(), 0, (0, 1)])
def test_equals_it_for_every_axis_and_for_stochastic_rounding(name, axis):
    format = getattr(formats, name)
    spec = QuantSpec(format, axis=axis, symmetric=format.signed)
    options = {"rounding": stochastic, "key": KEY}
    expected = dequantize(quantize_array(W, spec, **options))
    same_bits(fake_quantize(W, spec, **options), expected)
    if axis != (0, 1):  # where every element is a level
        assert (np.asarray(fake_quantize(W, spec)) != expected).any()


@every_kind
def test_equals_it_under_vmap_and_given_scales(format):
    spec = spec_of(format)
    stacked = jnp.stack([jnp.asarray(W), 3 * jnp.asarray(W[::-1])])
    together = jax.vmap(lambda w: fake_quantize(w, spec))(stacked)
    for i in range(2):
        same_bits(together[i], fake_quantize(stacked[i], spec))
    given = compute_scale(*compute_range(stacked[0], spec), spec)
    expected = dequantize(quantize_array(stacked[1], spec, scale=given))
    same_bits(fake_quantize(stacked[1], spec, scale=given), expected)


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_derivative_is_one(format, dtype):
    w, spec = jnp.asarray(W, dtype), spec_of(format)
    slope = jnp.asarray(np.random.default_rng(3).normal(size=W.shape), dtype)

    def loss(w):
        return jnp.sum(fake_quantize(w, spec) * slope, dtype=jnp.float32)

    same_bits(jax.jit(jax.grad(loss))(w), slope)


@pytest.mark.parametrize(
    ("name", "last", "half_step"),
    [
        ("int4", 7, 0.5),
        ("int8", 127, 0.5),
        ("fp4_e2m1", 6, 1),
        ("fp8_e4m3", 448, 16),
        ("nf4", 1, (1 - 0.7229568362236023) / 2),
    ],
)
def test_given_scales_stop_gradients_of_what_is_clipped(name, last, half_step):
    spec = QuantSpec(getattr(formats, name))
    edge = last + half_step
    w = jnp.float32([0.0, last, edge * 0.999, edge * 1.001, -last, 10 * last])
    scale = jnp.full(1, 0.5)
    grad = jax.grad(lambda w: fake_quantize(w, spec, scale=scale).sum())(w / 2)
    np.testing.assert_array_equal(grad, [1, 1, 1, 0, 1, 0])


def test_an_asymmetric_range_stops_gradients_on_its_two_sides():
    spec = QuantSpec(formats.uint4, symmetric=False)
    scale = Scale(jnp.ones(1), jnp.full(1, 5, jnp.uint8))  # -5 to 10
    w = jnp.float32([-6.0, -5.4, 0.0, 10.4, 10.6])
    grad = jax.grad(lambda w: fake_quantize(w, spec, scale=scale).sum())(w)
    np.testing.assert_array_equal(grad, [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(
        fake_quantize(w, spec, scale=scale), [-5, -5, 0, 10, 10]
    )


@pytest.mark.parametrize("name", ["ternary", "binary"])
def test_a_mean_is_no_range(name):
    spec = QuantSpec(getattr(formats, name))
    w = jnp.float32([0.1, 9.0, -9.0])
    grad = jax.grad(lambda w: fake_quantize(w, spec, scale=jnp.ones(1)).sum())(w)
    np.testing.assert_array_equal(grad, 1)


def test_scales_get_no_gradient():
    spec = QuantSpec(formats.int8)
    grad = jax.grad(lambda s: fake_quantize(jnp.ones(3), spec, scale=s).sum())
    np.testing.assert_array_equal(grad(jnp.ones(1)), 0)


def test_bits_may_be_traced_and_compile_once():
    spec = QuantSpec(formats.int8, group_size=16)
    quantize = jax.jit(lambda w, bits: fake_quantize(w, spec, bits=bits))
    for bits in range(2, 9):
        narrow = QuantSpec(getattr(formats, f"int{bits}"), group_size=16)
        expected = fake_quantize(W, narrow)
        same_bits(quantize(W, jnp.float32(bits)), expected)
        same_bits(fake_quantize(W, spec, bits=bits), expected)
    assert quantize._cache_size() == 1
    wide = quantize(W, jnp.float32(16))  # wider than codes are
    assert np.abs(wide - W).max() < np.abs(fake_quantize(W, spec) - W).max() / 100
    with pytest.raises(ValueError, match="bits must be in 2 to 16"):
        fake_quantize(W, spec, bits=1)


@every_kind
def test_compiles_once_and_quantizes_in_a_scan(format):
    spec = spec_of(format)
    quantize = jax.jit(lambda w: fake_quantize(w, spec))
    for factor in (1.0, 2.0):
        quantize(jnp.asarray(W * np.float32(factor)))
    assert quantize._cache_size() == 1
    stacked = jnp.stack([jnp.asarray(W)] * 2)
    _, scanned = jax.lax.scan(lambda c, w: (c, fake_quantize(w, spec)), 0, stacked)
    same_bits(scanned[1], fake_quantize(W, spec))


def test_straight_through_has_the_value_of_one_and_the_slope_of_the_other():
    value, w = jnp.float32([0.1, 0.7]), jnp.float32([1e20, -3.0])
    inside = jnp.array([True, False])
    out, slope = jax.jvp(lambda w: straight_through(value, w, inside), (w,), (w,))
    same_bits(out, value)
    same_bits(slope, np.float32([1e20, 0.0]))


def test_the_elementwise_part_writes_nothing_but_its_result():
    """One loop over the weight per channel; ranges are read, not written out."""
    shape = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    weight_bytes = 1024 * 256 * 4
    for spec in (QuantSpec(formats.int8), QuantSpec(formats.int4, group_size=32)):
        compiled = jax.jit(lambda w, s=spec: fake_quantize(w, s)).lower(shape).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < weight_bytes / 8


@pytest.mark.parametrize("mesh_name", ["auto_mesh", "explicit_mesh"])
@pytest.mark.parametrize("partition", [("data", None), (None, "data")])
@pytest.mark.parametrize("name", ["int8", "uint4", "nvfp4"])
def test_a_sharded_array_is_quantized_where_it_lies(
    request, mesh_name, partition, name
):
    mesh = request.getfixturevalue(mesh_name)
    w = np.random.default_rng(5).normal(size=(128, 64)).astype(np.float32)
    format = getattr(formats, name)
    spec = QuantSpec(
        format,
        group_size=16 if name.endswith("int4") else None,
        symmetric=format.signed,
    )
    fake = jax.jit(lambda w: fake_quantize(w, spec))
    quantize = jax.jit(lambda w: quantize_array(w, spec))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec(*partition)))
        assert "all-gather" not in fake.lower(sharded).compile().as_text()
        assert "all-gather" not in quantize.lower(sharded).compile().as_text()
        together = jax.device_get((fake(sharded), quantize(sharded)))
    jax.tree.map(same_bits, together, jax.device_get((fake(w), quantize(w))))


def test_a_mean_over_shards_is_the_mean_to_rounding(auto_mesh):
    w = np.random.default_rng(5).normal(size=(128, 64)).astype(np.float32)
    quantize = jax.jit(lambda w: quantize_array(w, QuantSpec(formats.ternary)))
    sharded = jax.device_put(w, NamedSharding(auto_mesh, PartitionSpec("data", None)))
    together, alone = jax.device_get((quantize(sharded), quantize(w)))
    np.testing.assert_allclose(
        np.float32(together.scale), np.float32(alone.scale), rtol=2**-7
    )


def test_what_is_wrong_is_said_with_the_path():
    spec = QuantSpec(formats.int4, group_size=32)
    with pytest.raises(TypeError, match=r"w must be a float array, got int32.*'a/b'"):
        fake_quantize(jnp.ones((64, 2), jnp.int32), spec, path="a/b")
    with pytest.raises(ValueError, match="group_size must divide axis -2 of 'a/b'"):
        fake_quantize(jnp.ones((65, 2)), spec, path="a/b")
    for shape in [(1,), (3, 2), (64, 3)]:
        with pytest.raises(ValueError, match="scale must have the shape"):
            fake_quantize(jnp.ones((64, 2)), spec, scale=jnp.ones(shape), path="a/b")
    zero_point = Scale(jnp.ones((2, 2)), jnp.zeros((2, 2), jnp.int8))
    with pytest.raises(ValueError, match="scale must carry a zero point where"):
        fake_quantize(jnp.ones((64, 2)), spec, scale=zero_point)
    with pytest.raises(ValueError, match="scale must be float8_e8m0fnu for mxfp4"):
        fake_quantize(
            jnp.ones((64, 2)), QuantSpec(formats.mxfp4), scale=jnp.ones((2, 2))
        )


def test_second_derivatives_pass_straight_through():
    """The gradient of half the square of q is q, and the gradient of that is one."""
    spec = QuantSpec(formats.int8)
    w = jnp.array([0.3, -1.0, 0.8])

    def half_square(w):
        return jnp.sum(fake_quantize(w, spec) ** 2) / 2

    np.testing.assert_array_equal(jax.grad(half_square)(w), fake_quantize(w, spec))
    np.testing.assert_array_equal(jax.hessian(half_square)(w), jnp.eye(3))
