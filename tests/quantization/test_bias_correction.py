"""Bias correction: mean shifts are gone afterwards, and errors fall."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jopt


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def model(params, x):
    x = lax.conv_general_dilated(
        x,
        params["conv"],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )
    x = jax.nn.relu(x + params["shift"][None, None])

    def layer(x, p):
        h = jnp.einsum("btd,dhk->bthk", x, p["w"]) + p["b"][None, None]
        return x + jnp.einsum("bthk,hkd->btd", jax.nn.relu(h), p["out"]), None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"].T + params["last"][None, None]


@functools.cache
def corrected():
    rng = np.random.default_rng(0)
    stacked = {"w": (2, 6, 2, 4), "b": (2, 2, 4), "out": (2, 2, 4, 6)}
    params = {"layers": {n: normal(rng, *s) / 2 for n, s in stacked.items()}}
    params |= {"conv": normal(rng, 3, 2, 6), "shift": normal(rng, 6)}
    params |= {"head": normal(rng, 5, 6), "last": normal(rng, 5)}
    batches = [jnp.abs(normal(rng, 4, 7, 4)) for _ in range(2)]
    spec = jopt.QuantSpec(jopt.formats.int3)
    table = jopt.sites(model, params, batches[0])
    packed = jopt.quantize(params, spec, sites=table)
    fixed, report = jopt.correct_bias(model, params, packed, batches)
    return params, packed, fixed, report, batches


def results(params, batches):
    """The sums of what every product gives, with its bias, and the results."""
    floats = jopt.dequantize(params)
    return jnp.concatenate([model(floats, x) for x in batches])


def test_the_mean_of_what_comes_out_is_that_of_the_floats():
    params, packed, fixed, report, batches = corrected()
    want, before, after = (results(p, batches) for p in (params, packed, fixed))
    shifts = [np.abs((y - want).mean(axis=(0, 1))).max() for y in (before, after)]
    assert shifts[1] < 1e-4 < 0.05 < shifts[0]
    errors = [jnp.linalg.norm(y - want) for y in (before, after)]
    assert errors[1] < 0.9 * errors[0]
    names = [(row.name, row.bias) for row in report]
    assert names == [
        ("conv", "shift"),
        ("layers/w[0]", "layers/b"),
        ("layers/w[1]", "layers/b"),
        ("head", "last"),
    ]
    assert set(report.left_alone) == {"layers/out"}
    for name in ("conv", "head"):
        assert fixed[name] is packed[name]


def test_the_first_layer_is_the_formula():
    params, packed, fixed, report, batches = corrected()
    x = np.concatenate(batches)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    lost = np.asarray(params["conv"] - jopt.dequantize(packed["conv"]))
    want = np.zeros(6)
    for out in range(6):
        for place in range(3):
            group = padded[:, place : place + 7, 2 * (out // 3) : 2 * (out // 3) + 2]
            want[out] += (group @ lost[place, :, out]).mean()
    got = np.asarray(fixed["shift"] - params["shift"])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    norm = np.sqrt(np.mean(want**2))
    np.testing.assert_allclose(report["conv"].shift, norm, rtol=1e-3)


def test_layers_that_no_row_reaches_are_listed():
    params, packed, _, report, batches = corrected()
    fixed, empty = jopt.correct_bias(model, params, packed, [batches[0][:0]])
    names = {row.name for row in report}
    assert not empty.rows
    assert {n for n, why in empty.left_alone.items() if "no input" in why} == names
    for a, b in zip(jax.tree.leaves(fixed), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_biases_that_are_not_there_or_shared_are_listed():
    rng = np.random.default_rng(1)
    params = {"a": normal(rng, 4, 4), "b": normal(rng, 4, 4), "bias": normal(rng, 4)}
    x = normal(rng, 8, 4)
    packed = jopt.quantize(params, jopt.QuantSpec(jopt.formats.int4))

    def without(p, x):
        return jax.nn.relu(x @ p["a"]) + p["bias"][None]

    with pytest.raises(ValueError, match="max comes before anything is added"):
        jopt.correct_bias(without, params, packed, [x])

    def shared(p, x):
        x = jax.nn.relu(x @ p["a"] + p["bias"][None])
        return x @ p["b"] + p["bias"][None]

    with pytest.raises(ValueError, match="'bias' is added elsewhere too"):
        jopt.correct_bias(shared, params, packed, [x])

    def residual(p, x):
        return x + (x @ p["a"] + p["bias"][None]) @ p["b"]

    _, report = jopt.correct_bias(residual, params, packed, [x])
    assert [row.name for row in report] == ["a"]
    assert report.left_alone["b"] == "add joins it with what is no leaf"
    with pytest.raises(ValueError, match="packed must have the leaves of params"):
        jopt.correct_bias(residual, params, {"a": x}, [x])


def test_what_is_not_finite_or_does_not_fit_raises():
    def apply(p, x):
        x = jnp.tanh(x @ p["a"] + p["c"][None])
        return x @ p["b"] + p["d"][None]

    rng = np.random.default_rng(2)
    shapes = {"a": (4, 4), "c": (4,), "b": (4, 3), "d": (3,)}
    params = {n: normal(rng, *s) for n, s in shapes.items()}
    x = normal(rng, 8, 4)
    packed = jopt.quantize(params, jopt.QuantSpec(jopt.formats.int4))
    with pytest.raises(ValueError, match="infinity at 'a'; look at the batches"):
        jopt.correct_bias(apply, params, packed, [x, x.at[0, 0].set(jnp.inf)])
    broken = {**params, "b": params["b"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="infinity at 'b'; look at 'b' of the params"):
        jopt.correct_bias(apply, broken, packed, [x])
    grid = {**params, "a": params["a"].at[0, 0].set(jnp.inf)}
    with pytest.raises(ValueError, match="packed must give finite means"):
        jopt.correct_bias(apply, params, grid, [x])
    with pytest.raises(ValueError, match="the floats, got QuantizedArray at 'a'"):
        jopt.correct_bias(apply, packed, params, [x])
    wrong = {**packed, "d": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"shapes of params, got \(2,\) for \(3,\)"):
        jopt.correct_bias(apply, params, wrong, [x])
