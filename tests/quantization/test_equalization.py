"""Equalization against its closed form, in chains, convolutions and stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jopt


def normal(rng, *shape):
    sizes = np.exp(rng.normal(size=shape[-1]))
    return jnp.asarray(rng.normal(size=shape) * sizes, jnp.float32)


def chain(params, x):
    x = jax.nn.relu(x @ params["a"] + params["bias"][None])
    x = jax.nn.leaky_relu(x @ params["b"])
    return x @ params["c"]


def make_chain():
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 7), "bias": (7,), "b": (7, 6), "c": (6, 3)}
    return {n: normal(rng, *s) for n, s in shapes.items()}, normal(rng, 4, 5)


def test_two_layers_are_the_closed_form():
    params, x = make_chain()

    def two(p, x):
        return jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]

    equal, report = jopt.equalize(two, params, x)
    params = jax.tree.map(np.asarray, params)
    r1 = np.abs(params["a"]).max(axis=0)
    r2 = np.abs(params["b"]).max(axis=1)
    s = np.sqrt(r1 * r2) / r2
    np.testing.assert_allclose(equal["a"], params["a"] / s, rtol=1e-5)
    np.testing.assert_allclose(equal["bias"], params["bias"] / s, rtol=1e-5)
    np.testing.assert_allclose(equal["b"], params["b"] * s[:, None], rtol=1e-5)
    np.testing.assert_array_equal(equal["c"], params["c"])
    assert report["a"].next == "b"
    np.testing.assert_allclose(report["a"].after, 1, rtol=1e-5)
    assert "returns" in report.left_alone["b"]


def test_chains_converge_and_compute_the_same():
    params, x = make_chain()
    equal, report = jopt.equalize(chain, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_allclose(chain(equal, x), chain(params, x), rtol=1e-4, atol=1e-4)
    assert [row.name for row in report] == ["a", "b"]
    for w, v in (("a", "b"), ("b", "c")):
        ends = np.abs(equal[w]).max(axis=0), np.abs(equal[v]).max(axis=1)
        np.testing.assert_allclose(*ends, rtol=1e-3)
    assert max(row.after for row in report) < 1.001 < min(row.before for row in report)
    int8 = jopt.QuantSpec(jopt.formats.int4, axis=())
    errors = []
    for tree in (params, equal):
        table = jopt.sites(chain, tree, x)
        packed = jopt.quantize(tree, int8, sites=table)
        found = chain(jopt.dequantize(packed), x)
        errors.append(np.linalg.norm(found - chain(params, x)))
    assert errors[1] < 0.8 * errors[0]


def test_float64_is_not_rounded_to_float32():
    with jax.enable_x64(True):
        params, x = make_chain()
        params = {n: jnp.pi * w.astype(jnp.float64) for n, w in params.items()}
        x = x.astype(jnp.float64)
        equal, _ = jopt.equalize(chain, params, x)
        got, want = chain(equal, x), chain(params, x)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_convolutions_depthwise_flattened_stacked_gated_and_attention():
    rng = np.random.default_rng(1)

    def apply(params, x):
        def conv(x, w, groups):
            return lax.conv_general_dilated(
                x,
                w,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        x = jax.nn.relu(conv(x, params["conv"], 1) + params["bias"][None, None, None])
        x = jax.nn.relu(conv(x, params["depthwise"], 4))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = x.reshape(x.shape[0], 4, -1) @ params["dense"]

        def layer(x, p):
            values = jnp.einsum("btd,dhk->bthk", x, p["v"]) + p["bias"][None, None]
            weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x))
            mixed = jnp.einsum("bts,bshk->bthk", weights, values)
            x = x + jnp.einsum("bthk,hkd->btd", mixed, p["out"])
            return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

        return lax.scan(jax.checkpoint(layer), x, params["layers"])[0]

    shapes = {"conv": (3, 3, 3, 4), "bias": (4,), "depthwise": (3, 3, 1, 8)}
    stacked = {"v": (2, 6, 2, 3), "bias": (2, 2, 3), "out": (2, 2, 3, 6)}
    stacked |= {"gate": (2, 6, 5), "up": (2, 6, 5), "down": (2, 5, 6)}
    params = {n: normal(rng, *s) / 3 for n, s in shapes.items()}
    params["dense"] = normal(rng, 8, 6)
    params["layers"] = {n: normal(rng, *s) / 3 for n, s in stacked.items()}
    x = normal(rng, 2, 4, 4, 3)
    equal, report = jopt.equalize(apply, params, x)
    pairs = {row.name: (row.next, row.channels) for row in report}
    assert pairs == {
        "conv": ("depthwise", 4),
        "depthwise": ("dense", 8),
        "layers/v": ("layers/out", 12),
        "layers/up": ("layers/down", 10),
    }
    assert "logistic" in report.left_alone["layers/gate"]
    want, got = apply(params, x), apply(equal, x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    ends = (
        np.abs(equal["layers"]["v"]).max(axis=1),
        np.abs(equal["layers"]["out"]).max(axis=3),
    )
    np.testing.assert_allclose(*ends, rtol=1e-3)
    depthwise = np.abs(equal["depthwise"]).max(axis=(0, 1, 2)).reshape(4, 2).max(axis=1)
    conv = np.abs(equal["conv"]).max(axis=(0, 1, 2))
    np.testing.assert_allclose(conv, depthwise, rtol=1e-3)


def test_ranges_whose_product_overflows_become_one():
    w, v = [1e30, 1.0, 1e30, 1e-20], [1e20, 1e-30, 1e-20, 1e30]
    params = {"w": jnp.array([w]), "v": jnp.array(v)[:, None]}
    equal, _ = jopt.equalize(
        lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], params, jnp.ones((1, 1))
    )
    expected = [1e25, 1e-15, 1e5, 1e5]
    np.testing.assert_allclose(equal["w"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(equal["v"][:, 0], expected, rtol=1e-5)


def test_zeros_stay_and_what_is_used_twice_is_left_alone():
    params, x = make_chain()
    params["b"] = params["b"].at[2].set(0.0)
    equal, _ = jopt.equalize(chain, params, x)
    assert np.isfinite(np.concatenate([w.ravel() for w in equal.values()])).all()
    np.testing.assert_array_equal(equal["a"][:, 2], params["a"][:, 2])

    def twice(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"] + (x**2 @ p["a"]) @ p["b"]

    tied, _ = jopt.equalize(twice, params, x)
    np.testing.assert_allclose(twice(tied, x), twice(params, x), rtol=1e-4, atol=1e-3)

    def other(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"], x[:, :4] @ p["b"][:4]

    with pytest.raises(ValueError, match="'b' multiplies something else too"):
        jopt.equalize(other, params, x)
    for name, value in (("a", jnp.inf), ("b", jnp.nan)):
        broken = {**params, name: params[name].at[0, 0].set(value)}
        with pytest.raises(ValueError, match=f"NaN or infinity in '{name}'; repair it"):
            jopt.equalize(chain, broken, x)
    packed = jopt.quantize(params, jopt.QuantSpec(jopt.formats.int8))
    with pytest.raises(ValueError, match="plain arrays, got QuantizedArray at 'a'"):
        jopt.equalize(chain, packed, x)
