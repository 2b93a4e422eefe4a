"""Codes multiply on the way forward; on the way back, what they stand for does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jopt

F = jopt.formats
INT8 = jopt.QuantSpec(F.int8)
GROUPS = jopt.QuantSpec(F.int8, group_size=16)
FP8 = jopt.QuantSpec(F.fp8_e4m3)
MXFP8 = jopt.QuantSpec(F.mxfp8)
RNG = np.random.default_rng(7)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dot(params, x):
    return x @ params["w"]


def conv(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=numbers
    )


def layers(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


CASES = {
    "dynamic": (dot, (64, 5), (6, 64), INT8, INT8),
    "static": (dot, (64, 5), (6, 64), INT8, None),
    "grouped": (dot, (64, 5), (6, 64), GROUPS, GROUPS),
    "fp8": (dot, (64, 5), (6, 64), FP8, FP8),
    "mxfp8": (dot, (64, 5), (6, 64), MXFP8, MXFP8),
    "conv": (conv, (3, 3, 8, 24), (2, 5, 5, 8), INT8, INT8),
    "conv of few outputs": (conv, (3, 3, 8, 4), (2, 5, 5, 8), INT8, None),
    "scan": (layers, (3, 8, 8), (4, 8), INT8, INT8),
    "static scan": (layers, (3, 8, 8), (4, 8), INT8, None),
}


def both(name):
    """Return the executed and the fake-quantized function, params and input."""
    apply, weights, inputs, spec, activations = CASES[name]
    params, x = {"w": normal(*weights)}, normal(*inputs)
    if activations is None:  # static, and some inputs are clipped
        activations = jopt.calibrate(apply, params, [x / 2], progress=False)
    packed = jopt.quantize(params, spec, sites=jopt.sites(apply, params, x))
    run = jopt.execute(apply, activations=activations)
    rounded = jopt.fake_quantize(apply, None, activations=activations)
    return run, rounded, packed, x


def weighted(run):
    """Sum the results with weights, so that gradients differ."""

    def loss(params, x):
        y = run(params, x)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

    return loss


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_scales_get_the_gradients_of_rounded_floats(name):
    """Those of the fake-quantized function on what the packed weights stand for."""
    run, rounded, packed, x = both(name)
    decoded = lambda packed, x: rounded(jopt.dequantize(packed), x)  # noqa: E731
    got, want = (
        jax.jit(jax.grad(weighted(f), argnums=(0, 1), allow_int=True))(packed, x)
        for f in (run, decoded)
    )
    assert jnp.abs(got[1]).max() > 0.1
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)
    assert got[0]["w"].codes.dtype in (jax.dtypes.float0, packed["w"].codes.dtype)
    if name != "mxfp8":  # whose scales are powers of two, and none between
        scales = got[0]["w"].scale.astype(jnp.float32)
        assert jnp.abs(scales).max() > 0.1
        close = want[0]["w"].scale.astype(jnp.float32)
        np.testing.assert_allclose(scales, close, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["dynamic", "static", "conv", "scan"])
def test_no_float_product_without_a_gradient(name):
    run, _, packed, x = both(name)
    text = jax.jit(run).lower(packed, x).as_text()
    assert not re.search(r"(?:dot_general|convolution).*xf32>.*-> .*xf32>", text)
    assert re.search(r"(?:dot_general|convolution).*xi8>.*-> .*xi32>", text)


@pytest.mark.parametrize("name", ["dynamic", "static", "scan"])
def test_under_vmap_and_forwards(name):
    run, rounded, packed, x = both(name)
    xs = jnp.stack([x, x[::-1], -x])
    params = jopt.dequantize(packed)
    got = jax.vmap(jax.grad(weighted(run), argnums=1), (None, 0))(packed, xs)
    want = jax.vmap(jax.grad(weighted(rounded), argnums=1), (None, 0))(params, xs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    got = jax.jvp(lambda x: run(packed, x), (x,), (xs[1],))
    want = jax.jvp(lambda x: rounded(params, x), (x,), (xs[1],))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    """Of a sum of squares of what is linear: twice the squares of the first ones."""
    run, _, packed, x = both("dynamic")
    curvature = jax.hessian(lambda t: jnp.sum(run(packed, t * x) ** 2))(1.0)
    _, slope = jax.jvp(lambda t: run(packed, t * x), (1.0,), (1.0,))
    np.testing.assert_allclose(curvature, 2 * jnp.sum(slope**2), rtol=1e-4)


def test_gradients_inside_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    data = PartitionSpec("x")
    apply = jax.shard_map(
        dot, mesh=mesh, in_specs=({"w": PartitionSpec()}, data), out_specs=data
    )
    params, x = {"w": normal(16, 4)}, normal(8, 16)
    packed = jopt.quantize(params, INT8, sites=jopt.sites(apply, params, x))
    run = jopt.execute(apply, activations=INT8)
    got = jax.grad(lambda x: weighted(run)(packed, x))(x)
    want = jax.grad(lambda x: weighted(dot)(jopt.dequantize(packed), x))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_static", [True, False])
def test_adapters_train_over_a_packed_base(is_static):
    """Below them too: the gradient passes two integer products of the base."""

    def apply(params, x):
        base, adapter = params
        for i in range(2):
            w, (a, b) = base[f"w{i}"], adapter[i]
            x = jnp.tanh(x @ w + (x @ a) @ b)
        return x

    base = {f"w{i}": normal(16, 16) / 4 for i in range(2)}
    adapter = [(normal(16, 2), jnp.zeros((2, 16))) for _ in range(2)]
    x, target = normal(32, 16), jnp.tanh(normal(32, 16))
    activations = {"0/.*": INT8}
    if is_static:
        activations = jopt.calibrate(
            apply, (base, adapter), [x], activations=activations, progress=False
        )
    table = jopt.sites(apply, (base, adapter), x)
    rules = {"0/.*": INT8, "1/.*": None}
    packed, _ = jopt.quantize((base, adapter), rules, sites=table)
    run = jopt.execute(apply, activations=activations)
    rounded = jopt.fake_quantize(apply, rules, activations=activations)
    optimizer = optax.adam(1e-2)

    def loss(run, base, adapter):
        return jnp.mean((run((base, adapter), x) - target) ** 2)

    got = jax.grad(lambda a: loss(run, packed, a))(adapter)
    want = jax.grad(lambda a: loss(rounded, base, a))(adapter)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)

    @jax.jit
    def step(adapter, state):
        value, grads = jax.value_and_grad(lambda a: loss(run, packed, a))(adapter)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapter, updates), state, value

    state, losses = optimizer.init(adapter), []
    for _ in range(30):
        adapter, state, value = step(adapter, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
