"""What is trained is what ships: fake-quantized and executed results are the same."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from jopt.arrays.quantized import quantize_array
from jopt.arrays.ranges import Range
from jopt.arrays.scales import compute_range, spread_groups
from jopt.trees import paths
from tests.programs import zoo

INT8 = jopt.QuantSpec(jopt.formats.int8)
RNG = np.random.default_rng(1)

# Every operation, every kind of control flow and every framework is in one of these.
MODELS = (
    "einsum",
    "gqa",
    "moe_ragged",
    "lstm_scan",
    "tied",
    "conv_transpose",
    "rnn_remat_scan_cond",
    "while",
    "shard_map_tp",
    "linen_cnn",
    "linen_transformer",
    "nnx_transformer",
    "equinox_conv_attention",
)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def power_of_two(high):
    """The next range whose int8 scale is a power of two."""
    return 127 * 2.0 ** jnp.ceil(jnp.log2(jnp.maximum(high, 1e-6) / 127))


def on_grid(params, specs):
    """Move weights to multiples of 1/512 such that every int8 scale is 1/512."""

    def move(path, w):
        if path not in specs or w.dtype != jnp.float32:
            return w
        low, high = compute_range(jnp.asarray(w), specs[path])
        largest = spread_groups(jnp.maximum(-low, high), w.shape)
        return jnp.round(w / jnp.where(largest == 0, 1, largest) * 127) / 512

    return paths.map_with_path(move, params)


def int_products(run, *args):
    text = jax.jit(run).lower(*args).as_text()
    pattern = r"(?:dot_general|convolution).*xi8>.*xi8>.*xi32>"
    return sum(bool(re.search(pattern, line)) for line in text.splitlines())


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", MODELS)
def test_executed_is_fake_quantized_bit_for_bit(name):
    """With scales that are powers of two, of weights alone and of inputs too."""
    model = zoo.ZOO[name]()
    table = jopt.sites(model.apply, model.params, *model.inputs)
    batch = [model.inputs]
    specs = dict(jopt.calibrate(model.apply, model.params, batch).weight_specs)
    params = on_grid(model.params, specs)
    packed = jopt.quantize(params, INT8, sites=table)
    want = jax.jit(model.apply)(jopt.dequantize(packed), *model.inputs)
    assert_equal(jopt.execute(model.apply)(packed, *model.inputs), want)
    assert_equal(jopt.fake_quantize(model.apply, INT8)(params, *model.inputs), want)

    measured = jopt.calibrate(model.apply, params, batch)
    calibration = dataclasses.replace(
        measured, activations=jax.tree.map(power_of_two, measured.activations)
    )
    run = jopt.execute(model.apply, activations=calibration)
    qat = jopt.fake_quantize(model.apply, INT8, calibration=calibration)
    assert_equal(run(packed, *model.inputs), qat(params, *model.inputs))


def swapped(packed, params):
    """Store the codes in the order of views that swap the last two axes."""
    w, spec = params["w"], packed["w"].spec
    return {"w": quantize_array(w, spec, order="nk")}


def dot(params, x):
    return x @ params["w"]


FORMATS = jopt.formats
SPECS = [
    (INT8, INT8),
    (jopt.QuantSpec(FORMATS.int4), INT8),
    (jopt.QuantSpec(FORMATS.int3), jopt.QuantSpec(FORMATS.int8, axis=())),
    (jopt.QuantSpec(FORMATS.int8, symmetric=False), INT8),
    (INT8, jopt.QuantSpec(FORMATS.uint8, symmetric=False)),
    (
        jopt.QuantSpec(FORMATS.uint4, symmetric=False),
        jopt.QuantSpec(FORMATS.int8, symmetric=False, axis=()),
    ),
    (jopt.QuantSpec(FORMATS.int4, group_size=16), INT8),
    (jopt.QuantSpec(FORMATS.int8, group_size=16),) * 2,
    (jopt.QuantSpec(FORMATS.fp8_e4m3),) * 2,
    (jopt.QuantSpec(FORMATS.fp8_e4m3), jopt.QuantSpec(FORMATS.fp8_e5m2)),
    (jopt.QuantSpec(FORMATS.nf4), INT8),
    (jopt.QuantSpec(FORMATS.ternary), INT8),
    (jopt.QuantSpec(FORMATS.mxfp8),) * 2,
    (jopt.QuantSpec(FORMATS.nvfp4),) * 2,
    (jopt.QuantSpec(FORMATS.mxfp4),) * 2,
    (INT8, jopt.QuantSpec(FORMATS.int8, axis=-1)),
]


@pytest.mark.parametrize("spec, activations", SPECS, ids=repr)
@pytest.mark.parametrize("rows, order", [(1, "kn"), (6, "kn"), (6, "nk")])
def test_every_format_multiplies_to_what_was_trained(spec, activations, rows, order):
    """To the rounding of one float32 product of 64 terms."""
    params, x = {"w": normal(64, 5)}, normal(rows, 64)
    table = jopt.sites(dot, params, x)
    packed = jopt.quantize(params, spec, sites=table)
    packed = swapped(packed, params) if order == "nk" else packed
    assert packed["w"].order == order
    want = jopt.fake_quantize(dot, spec, activations=activations)(params, x)
    got = jopt.execute(dot, activations=activations)(packed, x)
    scale = jnp.abs(x) @ jnp.abs(params["w"])
    assert float(jnp.max(jnp.abs(got - want) / scale)) < 64 * 2.0**-24
    assert jnp.abs(got - dot(params, x)).max() > 0


@pytest.mark.parametrize("spec, activations", SPECS[:8], ids=repr)
def test_integers_meet_integers(spec, activations):
    params, x = {"w": normal(64, 5)}, normal(6, 64)
    packed = jopt.quantize(params, spec, sites=jopt.sites(dot, params, x))
    assert int_products(jopt.execute(dot, activations=activations), packed, x) == 1


@pytest.mark.parametrize("name, count", [("linen_cnn", 6), ("linen_transformer", 6)])
def test_all_products_of_a_model_are_integers(name, count):
    """All but the depthwise convolution, and the table that is stored for lookups."""
    model = zoo.ZOO[name]()
    calibration = jopt.calibrate(model.apply, model.params, [model.inputs])
    packed = jopt.quantize(model.params, calibration)
    run = jopt.execute(model.apply, activations=calibration)
    assert int_products(run, packed, *model.inputs) >= count


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_products_of_any_dimension_numbers(data):
    """Contracted, batch and free axes in any order, on either side."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
    batch, free, inner = sizes
    lhs = data.draw(st.permutations(["b", "m", "k", "l"]))
    rhs = data.draw(st.permutations(["b", "n", "k", "l"]))
    size = {"b": batch, "m": free, "n": 4, "k": inner, "l": 2}
    weight_first = data.draw(st.booleans())
    subscripts = "".join(lhs), "".join(rhs)
    x, w = (normal(*[size[c] for c in s]) for s in subscripts)
    out = "".join(data.draw(st.permutations(["b", "m", "n"])))

    def apply(params, x):
        operands = (params["w"], x) if weight_first else (x, params["w"])
        order = subscripts[::-1] if weight_first else subscripts
        return jnp.einsum(f"{order[0]},{order[1]}->{out}", *operands)

    params = {"w": w}
    table = jopt.sites(apply, params, x)
    calibration = jopt.calibrate(apply, params, [x])
    packed = jopt.quantize(params, INT8, sites=table)
    packed = swapped(packed, params) if data.draw(st.booleans()) else packed
    for activations in (INT8, calibration):
        want = jopt.fake_quantize(apply, INT8, activations=activations)(params, x)
        got = jopt.execute(apply, activations=activations)(packed, x)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_unreached_sites_stay_float_and_are_listed():
    def apply(params, x, flag):
        return lax.cond(flag, lambda: x @ params["a"], lambda: x @ params["b"])

    params, x = {"a": normal(4, 4), "b": normal(4, 4)}, normal(2, 4)
    calibration = jopt.calibrate(apply, params, [(x, True)])
    assert calibration.unreached == ("b",)
    assert "never ran, or saw only zeros, and stay float: b" in str(calibration)
    packed = jopt.quantize(params, calibration)
    run = jopt.execute(apply, activations=calibration)
    want = x @ jopt.dequantize(packed["b"])
    np.testing.assert_allclose(run(packed, x, False), want, rtol=1e-6)
    assert jnp.abs(run(packed, x, True) - x @ params["a"]).max() > 0


def test_sharded_batches_give_the_same_ranges_and_results():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params, x = {"w": normal(6, 3)}, normal(16, 6)
    alone = jopt.calibrate(dot, params, [x])
    spread = jopt.calibrate(dot, params, [jax.device_put(x, sharding)])
    assert_equal(alone.activations, spread.activations)
    packed = jopt.quantize(params, alone)
    run = jopt.execute(dot, activations=alone)
    y = run(packed, jax.device_put(x, sharding))
    np.testing.assert_array_equal(y, run(packed, x))


def test_calibrations_of_another_function_are_refused():
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    calibration = jopt.calibrate(dot, params, [x])
    other = lambda params, x: x @ params["v"]  # noqa: E731
    with pytest.raises(ValueError, match="calibrated on this function"):
        jopt.execute(other, activations=calibration)({"v": params["w"]}, x)
    with pytest.raises(ValueError, match="calibration must be of these params"):
        jopt.quantize({"v": params["w"]}, calibration)
    with pytest.raises(TypeError, match=r"activations must be a jopt\.QuantSpec"):
        jopt.execute(dot, activations=8)(params, x)


def test_float_params_run_with_rounded_inputs():
    """Nothing is quantized that was not asked for, and what was asked for is."""
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    want = jopt.fake_quantize(dot, None, activations=INT8)(params, x)
    got = jopt.execute(dot, activations=INT8)(params, x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(jopt.execute(dot)(params, x), jax.jit(dot)(params, x))


def test_a_calibration_is_a_tree_of_range_ends():
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    calibration = jopt.calibrate(dot, params, [x])
    assert calibration.activations["w"] == (
        Range(calibration.activations["w"][0].high),
        None,
    )
    assert [leaf.shape for leaf in jax.tree.leaves(calibration)] == [()]


def test_a_calibration_ships_beside_the_params(tmp_path):
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    spec = jopt.QuantSpec(FORMATS.uint8, symmetric=False)
    calibration = jopt.calibrate(dot, params, [x], activations=spec)
    tree = {"params": jopt.quantize(params, calibration), "calibration": calibration}
    jopt.save(tmp_path / "model", tree)
    restored = jopt.restore(tmp_path / "model")
    assert isinstance(restored["calibration"], jopt.Calibration)
    run = jopt.execute(dot, activations=restored["calibration"])
    want = jopt.execute(dot, activations=calibration)(tree["params"], x)
    np.testing.assert_array_equal(run(restored["params"], x), want)


@pytest.mark.parametrize("is_static", [True, False])
def test_nan_stays_nan(is_static):
    """In the rows that hold some, and in no other; in the images, of a convolution."""

    def conv(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    cases = [(dot, (16, 4), (3, 16)), (conv, (3, 3, 8, 24), (3, 4, 4, 8))]
    for apply, weights, inputs in cases:
        params, x = {"w": normal(*weights)}, normal(*inputs)
        activations = INT8
        if is_static:
            activations = jopt.calibrate(apply, params, [x], progress=False)
        packed = jopt.quantize(params, INT8, sites=jopt.sites(apply, params, x))
        run = jopt.execute(apply, activations=activations)
        bad = x.at[(1,) * x.ndim].set(jnp.nan)
        want = run(packed, x).at[1].set(jnp.nan)
        np.testing.assert_array_equal(run(packed, bad), want)


@pytest.mark.parametrize("dtype, unit", [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
@pytest.mark.parametrize("rows, terms", [(1, 64), (64, 2), (8, 1024)])
def test_narrow_floats_are_rounded_where_codes_are_not(dtype, unit, rows, terms):
    """Each operand once, and both results: four roundings to the dtype."""
    params, x = {"w": normal(terms, 33).astype(dtype)}, normal(rows, terms)
    x = x.astype(dtype)
    packed = jopt.quantize(params, INT8, sites=jopt.sites(dot, params, x))
    got = jopt.execute(dot, activations=INT8)(packed, x)
    want = jopt.fake_quantize(dot, INT8, activations=INT8)(params, x)
    assert got.dtype == want.dtype == jnp.dtype(dtype)
    size = jnp.abs(x.astype(jnp.float32)) @ jnp.abs(params["w"].astype(jnp.float32))
    error = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)) / size
    assert unit / 64 < float(error.max()) < 4 * unit


def gates(params, xs):
    """An LSTM that joins the kernels of its gates, as Flax's does."""

    def step(carry, x):
        c, h = carry
        both = [
            jnp.concatenate([params[side][g] for g in "ifgo"], axis=-1)
            for side in ("input", "hidden")
        ]
        i, f, g, o = jnp.split(x @ both[0] + h @ both[1], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), h

    start = jnp.zeros((xs.shape[1], 8))
    return lax.scan(step, (start, start), xs)[1]


@pytest.mark.parametrize("format", [FORMATS.int8, FORMATS.int4, FORMATS.nf4])
def test_joined_leaves_are_quantized_each_and_multiplied_together(format):
    params = {
        "input": {g: normal(4, 8) for g in "ifgo"},
        "hidden": {g: normal(8, 8) for g in "ifgo"},
    }
    xs, spec = normal(5, 2, 4), jopt.QuantSpec(format)
    table = jopt.sites(gates, params, xs)
    packed = jopt.quantize(params, spec, sites=table)
    assert {q.scale.shape for _, q in paths.leaves_with_path(packed)} == {(1, 8)}
    want = jax.jit(gates)(jopt.dequantize(packed), xs)
    np.testing.assert_array_equal(jopt.execute(gates)(packed, xs), want)
    np.testing.assert_array_equal(jopt.fake_quantize(gates, spec)(params, xs), want)
    run = jopt.execute(gates, activations=INT8)
    qat = jopt.fake_quantize(gates, spec, activations=INT8)
    np.testing.assert_allclose(run(packed, xs), qat(params, xs), atol=1e-5)
    assert int_products(run, packed, xs) == (0 if format == FORMATS.nf4 else 2)
