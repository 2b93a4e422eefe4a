"""Rounded gradients against a backward pass written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jopt
from jopt.arrays.quantized import fake_quantize as fake_quantize_array

F = jopt.formats
INT8 = jopt.QuantSpec(F.int8)
INT4 = jopt.QuantSpec(F.int4)
TENSOR = jopt.QuantSpec(F.int8, axis=())
E5M2 = jopt.QuantSpec(F.fp8_e5m2)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def mlp(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def weighted(apply):
    """Sum the results with weights, so that gradients differ."""

    def loss(params, x, **kwargs):
        y = apply(params, x, **kwargs)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    return loss


def round_by(spec, axes, g):
    """Round a NumPy gradient in float64, with scales along `axes`."""
    axes = () if spec.axis == () else axes
    g = np.asarray(g, np.float64)
    others = tuple(a for a in range(g.ndim) if a not in axes)
    top = {"int8": 127.0, "int4": 7.0, "fp8_e5m2": 57344.0}[spec.format.name]
    scale = np.abs(g).max(axis=others, keepdims=True) / top
    scale = np.where(scale == 0, 1, np.asarray(scale, np.float32)).astype(np.float64)
    levels = g / scale
    if spec.format.kind == "float":
        levels = np.asarray(jnp.asarray(levels, jnp.float32).astype(jnp.float8_e5m2))
        return levels.astype(np.float64) * scale
    return np.clip(np.round(levels), -top, top) * scale


def by_hand(params, x, g, gradients):
    """The backward pass of the MLP: each product rounds its own cotangent."""
    up, down, x = (np.asarray(a, np.float64) for a in (params["up"], params["down"], x))
    h = x @ up
    r = np.maximum(h, 0)
    dr = round_by(gradients, (0,), g) @ down.T
    d_down = r.T @ round_by(gradients, (1,), g)
    dh = dr * (h > 0)
    return x.T @ round_by(gradients, (1,), dh), d_down, round_by(
        gradients, (0,), dh
    ) @ up.T  # fmt: skip


@pytest.mark.parametrize("gradients", [INT8, INT4, TENSOR, E5M2], ids=repr)
def test_is_the_backward_pass_written_by_hand(gradients):
    params, x = {"up": normal(6, 8), "down": normal(8, 3)}, normal(5, 6)
    g = jnp.cos(jnp.arange(15.0)).reshape(5, 3)
    rounded = jopt.fake_quantize(mlp, None, gradients=gradients)
    np.testing.assert_array_equal(rounded(params, x), jax.jit(mlp)(params, x))
    d_params, dx = jax.grad(weighted(rounded), argnums=(0, 1))(params, x)
    d_up, d_down, d_input = by_hand(params, x, g, gradients)
    np.testing.assert_allclose(d_params["down"], d_down, rtol=1e-5, atol=1e-5)
    # A float32 sum may fall on the other side of a tie: by one level, once.
    np.testing.assert_allclose(d_params["up"], d_up, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, d_input, rtol=1e-4, atol=1e-4)
    plain = jax.grad(weighted(mlp))(params, x)
    assert np.abs(plain["down"] - d_params["down"]).max() > 1e-4


def test_bit_for_bit_where_scales_are_powers_of_two():
    """Cotangents whose largest number is 127 or 64 steps: all products are exact."""
    spec = jopt.QuantSpec(F.int8, axis=())
    w = jnp.asarray(RNG.integers(-8, 8, (6, 4)), jnp.float32) / 4
    x = jnp.asarray(RNG.integers(-8, 8, (5, 6)), jnp.float32) / 8
    g = jnp.asarray(RNG.integers(-127, 128, (5, 4)), jnp.float32)
    g = (g.at[0, 0].set(127.0) + 0.25) / 2
    g = g.at[0, 0].set(63.5)
    rounded = jopt.fake_quantize(lambda p, x: x @ p, None, gradients=spec)
    _, pull = jax.vjp(rounded, w, x)
    dw, dx = pull(g)
    q = np.round(np.asarray(g) * 2) / 2
    np.testing.assert_array_equal(dw, np.asarray(x).T @ q)
    np.testing.assert_array_equal(dx, q @ np.asarray(w).T)
    assert np.any(q != np.asarray(g))


def test_with_rounded_weights_and_inputs_the_forward_pass_keeps_its_bits():
    params, x = {"up": normal(6, 8), "down": normal(8, 3)}, normal(5, 6)
    plain = jopt.fake_quantize(mlp, INT4, activations=INT8)
    both = jopt.fake_quantize(mlp, INT4, activations=INT8, gradients=INT8)
    np.testing.assert_array_equal(both(params, x), plain(params, x))
    d = [jax.grad(weighted(f))(params, x) for f in (plain, both)]
    ratio = [optax.tree.norm(jax.tree.map(jnp.subtract, *d)), optax.tree.norm(d[0])]
    assert 0 < ratio[0] < 0.03 * ratio[1]
    # The weights met are the rounded ones: the input of the last layer is r_q.
    w = fake_quantize_array(params["down"], INT4)
    assert jnp.any(w != params["down"])


def test_stochastic_rounding_is_right_on_average():
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    options = {"gradients": INT4, "gradient_rounding": jopt.rounding.stochastic}
    loss = weighted(jopt.fake_quantize(apply, None, **options))
    grad = jax.jit(jax.vmap(lambda k: jax.grad(loss)(params, x, key=k)["w"]))
    draws = grad(jax.random.split(jax.random.key(0), 4000))
    exact = jax.grad(weighted(apply))(params, x)["w"]
    error = np.abs(draws.mean(0) - exact)
    deviation = np.asarray(draws.std(0)) / np.sqrt(len(draws))
    assert deviation.min() > 0
    assert np.all(error < 5 * deviation + 1e-3)
    nearest = weighted(jopt.fake_quantize(apply, None, gradients=INT4))
    biased = np.abs(jax.grad(nearest)(params, x)["w"] - exact)
    assert biased.max() > 5 * error.max()
    with pytest.raises(ValueError, match="key must be given as gradients"):
        jax.grad(loss)(params, x)


def test_keys_are_passed_on_to_functions_that_name_one():
    def dropped(params, x, *, key):
        return (x * jax.random.bernoulli(key, 0.5, x.shape)) @ params["w"]

    options = {"gradients": INT8, "gradient_rounding": jopt.rounding.stochastic}
    params, x, key = {"w": normal(6, 3)}, normal(4, 6), jax.random.key(1)
    rounded = jopt.fake_quantize(dropped, None, **options)
    np.testing.assert_array_equal(
        rounded(params, x, key=key), jax.jit(dropped)(params, x, key=key)
    )


def conv(params, x):
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def scanned(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def heads(params, x):
    q = jnp.einsum("btd,dhk->bthk", x, params["w"])
    return jnp.einsum("bqhk,bthk->bhqt", q, q)


CASES = {
    "conv": (conv, (3, 3, 4, 5), (2, 6, 6, 4)),
    "scan": (scanned, (3, 6, 6), (4, 6)),
    "heads": (heads, (6, 2, 3), (2, 4, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_eight_bits_are_close_to_exact_gradients_everywhere(name):
    apply, weight, inputs = CASES[name]
    params, x = {"w": normal(*weight) / 3}, normal(*inputs)
    options = {"gradients": INT8, "gradient_rounding": jopt.rounding.stochastic}
    rounded = weighted(jopt.fake_quantize(apply, None, **options))
    grad = jax.jit(jax.grad(functools.partial(rounded, key=jax.random.key(0)), (0, 1)))
    got, exact = grad(params, x), jax.grad(weighted(apply), (0, 1))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert 0 < error < 0.03


def test_scales_are_those_that_each_product_allows():
    """dx is per token and dw per output: a huge token does not hide the others."""
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    rounded = jopt.fake_quantize(lambda p, x: x @ p["w"], None, gradients=INT8)
    _, pull = jax.vjp(rounded, params, x)
    g = normal(4, 3).at[0].mul(1e6)
    _, dx = pull(g)
    exact = g @ params["w"].T
    np.testing.assert_allclose(dx, exact, atol=0.03 * float(jnp.abs(exact[1:]).max()),
                               rtol=0.03)  # fmt: skip
    assert jnp.abs(dx[1:] - exact[1:]).max() < 0.05


def test_begin_step_rules_and_errors():
    params, x = {"up": normal(6, 8), "down": normal(8, 3)}, normal(5, 6)
    late = jopt.fake_quantize(mlp, None, gradients=INT4, begin_step=3)
    exact = jax.grad(weighted(mlp))(params, x)
    grads = [jax.grad(weighted(late))(params, x, step=s) for s in (2, 3)]
    np.testing.assert_allclose(grads[0]["down"], exact["down"], rtol=1e-6)
    assert jnp.abs(grads[1]["down"] - exact["down"]).max() > 1e-3
    one = jopt.fake_quantize(mlp, None, gradients={"down": INT4})
    got = jax.grad(weighted(one))(params, x)
    assert jnp.abs(got["down"] - exact["down"]).max() > 1e-3
    with pytest.raises(ValueError, match="near names"):
        jopt.fake_quantize(mlp, None, gradients={"dawn": INT4})(params, x)
    with pytest.raises(ValueError, match="gradients must be a spec"):
        jopt.fake_quantize(mlp, None, gradient_rounding=jopt.rounding.stochastic)
    with pytest.raises(TypeError, match="gradients must be a"):
        jopt.fake_quantize(mlp, None, gradients="int8")(params, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_dtypes(dtype):
    params = {"up": normal(6, 8).astype(dtype), "down": normal(8, 3).astype(dtype)}
    x = normal(5, 6).astype(dtype)
    rounded = jopt.fake_quantize(mlp, INT8, activations=INT8, gradients=E5M2)
    grads = jax.grad(lambda p: rounded(p, x).astype(jnp.float32).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
