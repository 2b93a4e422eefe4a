"""AWQ against a search in NumPy's float64, through the layers of models, executed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jopt
from jopt.quantization.awq import awq_matrix, input_scale
from tests.quantization.by_hand import SHARES, all_codes

FINE = functools.partial(jopt.QuantSpec, scale_dtype=jnp.float32)
INT4 = FINE(jopt.formats.int4, group_size=8)
INT8 = jopt.QuantSpec(jopt.formats.int8)


def apply(params, x):
    return x @ params["w"]


def outliers(rng, *shape):
    """Rows whose columns differ in size by factors of up to a hundred."""
    sizes = np.exp(rng.uniform(-2.3, 2.3, shape[-1]))
    return (rng.normal(size=shape) * sizes).astype(np.float32)


def scaled(magnitudes, alpha):
    s = np.maximum(magnitudes / magnitudes.max(), 1e-4) ** alpha
    return s / np.sqrt(s.max() * s.min())


def rounded(w, *, group, share=1.0):
    """int4, symmetric, float64; `share` per group and output."""
    blocks = w.reshape(-1, group, w.shape[1])
    scale = np.abs(blocks).max(axis=1) * share / 7
    scale = np.where(scale == 0, 1, scale)[:, None]
    return (np.clip(np.round(blocks / scale), -7, 7) * scale).reshape(w.shape)


def fitted(w, *, group):
    """The share of each group and output with the least squared error."""
    best, share = np.inf, 1.0
    for one in SHARES:
        lost = np.square(w - rounded(w, group=group, share=one))
        lost = lost.reshape(-1, group, w.shape[1]).sum(axis=1)
        share = np.where(lost < best, one, share)
        best = np.minimum(lost, best)
    return share


def searched(w, x, *, group, clip, num_alphas=20):
    """The loss of every alpha, and of the best one when ranges may shrink."""
    w, x = w.astype(np.float64), x.astype(np.float64)
    magnitudes = np.abs(x).mean(axis=0)

    def loss(q):
        return np.square(x @ (w - q)).sum(axis=0)

    def shares(scaled):
        return fitted(scaled, group=group) if clip else 1.0

    by_alpha = []
    for i in range(num_alphas):
        s = scaled(magnitudes, i / num_alphas)[:, None]
        q = rounded(w * s, group=group, share=shares(w * s)) / s
        by_alpha.append(loss(q).sum())
    if not clip:
        return by_alpha, min(by_alpha)
    s = scaled(magnitudes, np.argmin(by_alpha) / num_alphas)[:, None]
    shape = (w.shape[0] // group, group, w.shape[1])
    first, best, share = shares(w * s), np.inf, None
    for one in (first, *(1 - np.arange(11) / 20)):
        lost = (w - rounded(w * s, group=group, share=one) / s).reshape(shape)
        seen = np.einsum("rgk,gkn->rgn", x.reshape(-1, *shape[:2]), lost)
        now = np.square(seen).sum(axis=0)
        share = np.where(now < best, one, first if share is None else share)
        best = np.minimum(best, now)
    ends = [loss(rounded(w * s, group=group, share=r) / s) for r in (share, first)]
    return by_alpha, min(np.minimum(*ends).sum(), loss(rounded(w, group=group)).sum())


@pytest.mark.parametrize("group", [8, 32])
def test_the_search_is_that_of_numpy(group):
    rng = np.random.default_rng(group)
    w, x = rng.normal(size=(32, 12)).astype(np.float32), outliers(rng, 64, 32)
    spec = FINE(jopt.formats.int4, group_size=group)
    gram, magnitudes = x.T @ x, np.abs(x).mean(axis=0)
    losses = []
    for clip in (False, True):
        by_alpha, least = searched(w, x, group=group, clip=clip)
        found = awq_matrix(w, gram, magnitudes, spec, clip=clip)
        values, s = found.values, found.input_scale
        lost = w - np.asarray(values / s[:, None], np.float64)
        losses.append(np.square(x @ lost).sum())
        want = scaled(magnitudes, np.argmin(by_alpha) / 20)
        np.testing.assert_allclose(s, want, rtol=1e-5)
        np.testing.assert_allclose(losses[-1], least, rtol=1e-4)
        assert losses[-1] < 0.75 * by_alpha[0]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("method", [jopt.awq, jopt.rtn, jopt.gptq])
def test_inputs_that_never_came_keep_their_weights(method):
    """An expert that no batch was routed to is needed all the same."""
    rng = np.random.default_rng(4)
    x, w = outliers(rng, 64, 32), rng.normal(size=(32, 12)).astype(np.float32)
    x[:, ::4] = 0
    packed, _ = method(apply, {"w": w}, [x], INT4, progress=False)
    lost = np.square(jopt.dequantize(packed)["w"] - w)[::4]
    assert lost.sum() < 0.03 * np.square(w[::4]).sum()  # 15 dB


def test_alpha_0_is_rounding_to_nearest_bit_for_bit():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(32, 12)).astype(np.float32), outliers(rng, 64, 32)
    for spec in (INT4, FINE(jopt.formats.uint4, symmetric=False), INT8):
        found = awq_matrix(
            w, x.T @ x, np.abs(x).mean(0), spec, num_alphas=1, clip=False
        )
        assert bool((found.input_scale == 1).all())
        nearest = jopt.dequantize(jopt.quantize({"w": w}, spec))["w"]
        np.testing.assert_array_equal(found.values, nearest)


def test_input_scales_are_normalised_and_silent_inputs_bounded():
    magnitudes = jnp.array([0.0, 1e-9, 1.0, 50.0])
    s = np.asarray(input_scale(magnitudes, jnp.float32(1)))
    np.testing.assert_allclose(s.max() * s.min(), 1, rtol=1e-6)
    np.testing.assert_allclose(s / s[3], [1e-4, 1e-4, 0.02, 1], rtol=1e-5)
    silent = input_scale(jnp.zeros(4), jnp.float32(0.5))
    np.testing.assert_allclose(silent, 1)


FORMATS = [
    jopt.formats.int3,
    jopt.formats.nf4,
    jopt.formats.ternary,
    jopt.formats.mxfp4,
    jopt.formats.nvfp4,
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_no_format_is_worse_than_rounding_to_nearest(format):
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(64, 6)), jnp.float32)}
    size = None if format.group_size else 32
    spec = jopt.QuantSpec(format, group_size=size)
    batches = [outliers(rng, 32, 64)]
    errors = [
        method(apply, params, batches, spec)[1]["w"].error
        for method in (jopt.awq, jopt.rtn)
    ]
    bound = 1 + 1e-5 if format == jopt.formats.ternary else 0.95
    assert errors[0] <= bound * errors[1]


def model(params, x):
    """Stacked layers, a kernel of three axes, a convolution, three readers of one."""

    def layer(x, p):
        q, k = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k"))
        x = x + jnp.einsum("bthk,hkd->btd", q * jax.nn.sigmoid(k), p["out"])
        return x, None

    x, _ = lax.scan(layer, x, params["layers"])
    x = lax.conv_general_dilated(
        x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return x @ params["head"].T


@functools.cache
def trained():
    rng = np.random.default_rng(2)
    shapes = {"q": (2, 16, 2, 8), "k": (2, 16, 2, 8), "out": (2, 2, 8, 16)}
    layers = {n: rng.normal(size=s) / 4 for n, s in shapes.items()}
    params = {
        "layers": layers,
        "conv": rng.normal(size=(3, 16, 8)) / 4,
        "head": rng.normal(size=(5, 8)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    batches = [outliers(rng, 2, 6, 16) for _ in range(3)]
    return params, batches


@functools.cache
def packed():
    params, batches = trained()
    spec = jopt.QuantSpec(jopt.formats.int4, group_size=8)
    return {
        method.__name__: method(
            model, params, batches, spec, error_propagation=False, progress=False
        )
        for method in (jopt.awq, jopt.rtn)
    }


def test_every_layer_is_at_least_as_good_as_with_rounding_to_nearest():
    (_, awq), (_, rtn) = packed().values()
    assert [row.name for row in awq] == [row.name for row in rtn]
    assert len(awq) == 8
    for mine, other in zip(awq, rtn, strict=True):
        assert mine.error <= other.error * (1 + 1e-5), mine.name
    assert sum(a.error for a in awq) < 0.8 * sum(r.error for r in rtn)


def test_what_is_packed_is_executed():
    _, batches = trained()
    found, _ = packed()["awq"]
    layers = found["layers"]
    assert layers["q"].input_scale.shape == (2, 16, 1, 1)
    assert layers["out"].input_scale.shape == (2, 2, 8, 1)
    assert found["conv"].input_scale.shape == (3, 16, 1)
    assert found["head"].input_scale.shape == (1, 8)
    floats = jopt.dequantize(found)
    want = jax.jit(model)(floats, batches[0])
    got = jopt.execute(model)(found, batches[0])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    fake = jopt.fake_quantize(model, None, activations=INT8)(floats, batches[0])
    real = jopt.execute(model, activations=INT8)(found, batches[0])
    np.testing.assert_allclose(real, fake, rtol=1e-4, atol=1e-4)


def test_layers_that_share_an_input_have_scales_of_their_own():
    found, _ = packed()["awq"]
    q, k = (found["layers"][name].input_scale for name in ("q", "k"))
    assert not np.array_equal(q[0], q[1])
    assert not np.array_equal(q, k)


@pytest.mark.parametrize("explicit", [False, True])
def test_on_a_mesh_it_is_what_it_is_on_one_device(explicit):
    rng = np.random.default_rng(3)
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("m",), axis_types=(kind,), devices=jax.devices()[:2])
    w, x = rng.normal(size=(32, 8)).astype(np.float32), outliers(rng, 16, 32)
    alone, _ = jopt.awq(apply, {"w": jnp.asarray(w)}, [x], INT4)
    place = jax.NamedSharding(mesh, jax.P(None, "m"))
    whole = jax.NamedSharding(mesh, jax.P())
    params = {"w": jax.device_put(w, place)}
    split, _ = jopt.awq(apply, params, [jax.device_put(x, whole)], INT4)
    for a, b in zip(*map(jax.tree.leaves, (alone, split)), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5
        )


def test_16_bit_params_inputs_of_zeros_and_what_cannot_be():
    rng = np.random.default_rng(4)
    w, x = jnp.asarray(rng.normal(size=(16, 4)), jnp.bfloat16), outliers(rng, 8, 16)
    found, report = jopt.awq(apply, {"w": w}, [x.astype(jnp.bfloat16)], INT4)
    assert jopt.dequantize(found)["w"].dtype == jnp.bfloat16
    assert report["w"].error < 0.02
    found, report = jopt.awq(apply, {"w": w}, [jnp.zeros_like(x)], INT4)
    nearest = jopt.dequantize(jopt.quantize({"w": w}, all_codes(INT4)))
    np.testing.assert_array_equal(jopt.dequantize(found)["w"], nearest["w"])
    assert "no input but zeros" in report.left_alone["w"]
    one = jopt.QuantSpec(jopt.formats.int8, axis=())
    with pytest.raises(ValueError, match=r"axis must keep a scale per output of 'w'"):
        jopt.awq(apply, {"w": w}, [x], one)
    with pytest.raises(ValueError, match=r"num_alphas must be an integer of .*got 0"):
        jopt.awq(apply, {"w": w}, [x], INT4, num_alphas=0)
