"""SmoothQuant: closed form, functions that stay the same, integer products."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jopt

INT8 = jopt.QuantSpec(jopt.formats.int8)
TENSOR = jopt.QuantSpec(jopt.formats.int8, axis=())


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def norm(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def outlier_model(params, x):
    """A norm before two products, one after a gate that passes no factor on."""
    x = norm(x) * params["scale"][None]
    hidden = jnp.tanh(x @ params["q"]) * (x @ params["k"])
    return jnp.exp(-jnp.abs(hidden)) @ params["weird name"]


@functools.cache
def outliers():
    rng = np.random.default_rng(0)
    params = {
        "scale": normal(rng, 16).at[3].set(60.0),
        "q": normal(rng, 16, 8) / 4,
        "k": normal(rng, 16, 8) / 4,
        "weird name": normal(rng, 8, 4).at[2].set(20.0),
    }
    return params, normal(rng, 64, 16)


def quantized(apply, params, x, batches):
    """W8A8, one range per tensor of inputs, with its program."""
    calibration = jopt.calibrate(apply, params, batches, activations=TENSOR)
    table = jopt.sites(apply, params, x)
    packed = jopt.quantize(params, INT8, sites=table)
    run = jax.jit(jopt.execute(apply, activations=calibration))
    text = run.lower(packed, x).as_text()
    fake = jopt.fake_quantize(apply, calibration)(params, x)
    return run(packed, x), fake, len(re.findall(r"dot_general.*xi8>.*xi32>", text))


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_factors_are_those_of_the_paper_and_shared_by_readers(alpha):
    params, x = outliers()
    smooth_apply, smoothed = jopt.smooth(outlier_model, params, [x], alpha=alpha)
    seen = np.abs(norm(x) * params["scale"][None]).max(axis=0)
    weights = [np.abs(params[n]).max(axis=1) for n in ("q", "k")]
    s = seen**alpha / np.maximum(*weights) ** (1 - alpha)
    new = smoothed["params"]
    np.testing.assert_allclose(new["scale"], params["scale"] / s, rtol=1e-4)
    for name in ("q", "k"):
        want = np.asarray(params[name]) * s[:, None]
        np.testing.assert_allclose(new[name], want, rtol=1e-4)
    assert set(smoothed["input_scales"]) == {"weird name"}
    rows = {row.name: (row.into, row.leaves) for row in smooth_apply.report}
    assert rows == {
        "q": ("folded", "scale"),
        "k": ("folded", "scale"),
        "weird name": ("kept", ""),
    }
    want = outlier_model(params, x)
    got = smooth_apply(smoothed, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def unsmoothed(smoothed, params):
    """What the same program takes to be the function as it was."""
    ones = jax.tree.map(jnp.ones_like, smoothed["input_scales"])
    return {"params": params, "input_scales": ones}


def test_powers_of_two_change_no_bit():
    # In another program XLA may add up in another order.
    params, x = outliers()
    for fold in (True, False):
        smooth_apply, smoothed = jopt.smooth(
            outlier_model, params, [x], powers_of_two=True, fold=fold
        )
        run = jax.jit(smooth_apply)
        want = run(unsmoothed(smoothed, params), x)
        np.testing.assert_array_equal(run(smoothed, x), want)
        np.testing.assert_allclose(want, outlier_model(params, x), rtol=1e-5, atol=1e-5)
    assert set(smoothed["input_scales"]) == {"q", "k", "weird name"}


@pytest.mark.parametrize("fold", [True, False])
def test_float64_is_not_rounded_to_float32(fold):
    with jax.enable_x64(True):
        params, x = outliers()
        params = {n: jnp.pi * w.astype(jnp.float64) for n, w in params.items()}
        x = jnp.asarray(x, jnp.float64)
        want = outlier_model(params, x)
        for powers_of_two in (True, False):
            smooth_apply, smoothed = jopt.smooth(
                outlier_model, params, [x], powers_of_two=powers_of_two, fold=fold
            )
            run = jax.jit(smooth_apply)
            got = run(smoothed, x)
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
            if powers_of_two:
                np.testing.assert_array_equal(got, run(unsmoothed(smoothed, params), x))


def test_int8_products_really_run_and_are_much_better():
    params, x = outliers()
    exact = outlier_model(params, x)
    plain, _, count = quantized(outlier_model, params, x, [x])
    assert count == 3
    for fold in (True, False):
        smooth_apply, smoothed = jopt.smooth(outlier_model, params, [x], fold=fold)
        real, fake, count = quantized(smooth_apply, smoothed, x, [x])
        assert count == 3
        np.testing.assert_allclose(real, fake, rtol=1e-3, atol=1e-3)
        before, after = (jnp.linalg.norm(y - exact) for y in (plain, real))
        assert after < 0.4 * before
        dynamic = jopt.execute(smooth_apply, activations=TENSOR)
        table = jopt.sites(smooth_apply, smoothed, x)
        assert set(table.names) == {"params/q", "params/k", "params/weird name"}
        packed = jopt.quantize(smoothed, INT8, sites=table)
        assert jnp.linalg.norm(dynamic(packed, x) - exact) < 0.4 * before


def test_stacked_layers_convolutions_and_kernels_of_many_axes():
    rng = np.random.default_rng(1)

    def apply(params, x):
        x = lax.conv_general_dilated(
            jnp.tanh(x),
            params["conv"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )

        def layer(x, p):
            h = norm(x) * p["scale"][None, None]
            v = jnp.einsum("btd,dhk->bthk", h, p["v"])
            gate = jax.nn.sigmoid(jnp.einsum("btd,dhk->bthk", x, p["gate"]))
            return x + jnp.einsum("bthk,hkd->btd", jnp.sin(v) * gate, p["out"]), None

        x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
        return jnp.einsum("ebd,edf->ebf", jnp.stack([x[:, 0]] * 2), params["experts"])

    stacked = {"scale": (2, 6), "v": (2, 6, 2, 3), "gate": (2, 6, 2, 3)}
    stacked["out"] = (2, 2, 3, 6)
    params = {"layers": {n: normal(rng, *s) / 2 for n, s in stacked.items()}}
    params["conv"] = normal(rng, 3, 2, 6)
    params["experts"] = normal(rng, 2, 6, 3)
    x = normal(rng, 3, 5, 4).at[..., 1].mul(20.0)
    smooth_apply, smoothed = jopt.smooth(apply, params, [x, x / 2])
    into = {row.name: row.into for row in smooth_apply.report}
    assert into == {
        "conv": "kept",
        "layers/v": "folded",
        "layers/gate": "kept",
        "layers/out": "kept",
        "experts": "kept",
    }
    scales = smoothed["input_scales"]
    assert scales["layers/out"].shape == (2, 1, 6)
    assert scales["conv"].shape == (2, 6)  # the same in all places of the window
    places = scales["conv"].reshape(2, 3, 2)
    np.testing.assert_array_equal(places[:, 0], places[:, 2])
    assert not np.array_equal(scales["layers/gate"][0], scales["layers/gate"][1])
    want, got = apply(params, x), smooth_apply(smoothed, x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    qat = jopt.fake_quantize(smooth_apply, INT8, activations=INT8)
    grads = jax.jit(jax.grad(lambda p: qat(p, x).sum()))(smoothed)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_folded_whole_it_is_the_function_itself():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(x)
            return nn.Dense(3)(nn.relu(nn.Dense(5)(x)))

    rng = np.random.default_rng(2)
    model, x = Model(), normal(rng, 7, 4)
    params = model.init(jax.random.key(0), x)
    smooth_apply, smoothed = jopt.smooth(model.apply, params, [x])
    assert smoothed["input_scales"] == {}
    assert [row.into for row in smooth_apply.report] == ["folded"] * 2
    want = model.apply(params, x)
    np.testing.assert_allclose(
        model.apply(smoothed["params"], x), want, rtol=1e-4, atol=1e-5
    )
    assert "Dense_0" in str(smooth_apply.report)


def test_layers_that_no_row_reaches_are_listed():
    params, x = outliers()
    for batches in ([x[:0]], [x[:0], x]):
        smooth_apply, smoothed = jopt.smooth(outlier_model, params, batches)
        assert [row.into for row in smooth_apply.report] == ["folded", "folded", "kept"]
        reasons = set(smooth_apply.report.left_alone.values())
        if len(batches) == 1:
            assert reasons == {"no input but zeros reached it"}
            assert all(r.smallest == r.largest == 1 for r in smooth_apply.report)
    assert not reasons
    _, want = jopt.smooth(outlier_model, params, [x])
    for a, b in zip(jax.tree.leaves(smoothed), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_is_said():
    params, x = outliers()
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        jopt.smooth(outlier_model, params, [x], alpha=2)
    with pytest.raises(ValueError, match="finite, got NaN or infinity at 'k'"):
        jopt.smooth(outlier_model, params, [x * jnp.nan])
    with pytest.raises(TypeError, match="alpha must be a number, got 'x'"):
        jopt.smooth(outlier_model, params, [x], alpha="x")
    for name, value in (("q", jnp.nan), ("weird name", jnp.inf)):
        broken = {**params, name: params[name].at[0, 0].set(value)}
        with pytest.raises(ValueError, match=f"NaN or infinity in '{name}'; repair it"):
            jopt.smooth(outlier_model, broken, [x])
    broken = {**params, "scale": params["scale"].at[0].set(jnp.nan)}
    with pytest.raises(ValueError, match="at 'k'; look at 'scale' of the params"):
        jopt.smooth(outlier_model, broken, [x])
    packed = jopt.quantize(params, INT8)
    with pytest.raises(ValueError, match="plain arrays, got QuantizedArray"):
        jopt.smooth(outlier_model, packed, [x])
    only = jopt.matching("weird name")
    smooth_apply, smoothed = jopt.smooth(outlier_model, params, [x], select=only)
    np.testing.assert_array_equal(smoothed["params"]["q"], params["q"])
    assert [row.name for row in smooth_apply.report] == ["weird name"]
