"""Methods from papers against their formulas: DoReFa, BitNet b1.58, LSQ+."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt.arrays.ranges import Range, learned_fake_quantize
from tests import contract

F = jopt.formats
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# DoReFa-Net, arXiv:1606.06160


@pytest.mark.parametrize("bits", [1, 2, 3, 7])
def test_dorefa_weights_and_gradients(bits):
    """Equations 7 to 9 and the chain rule, in float64."""
    tx = jopt.dorefa(optax.sgd(1.0), bits)
    params = {"kernel": normal(6, 5), "bias": jnp.ones(5)}
    state, w = tx.init(params), np.asarray(params["kernel"], np.float64)
    for step in range(3):
        g = np.asarray(normal(6, 5), np.float64) / 10
        if bits == 1 or step == 0:
            move = g
        else:
            t, i = np.tanh(w), np.unravel_index(np.abs(np.tanh(w)).argmax(), w.shape)
            m = np.abs(t[i])
            move = g * (1 - t**2) / m
            # The largest one is also in the denominator of all.
            move[i] -= np.sign(t[i]) * (1 - t[i] ** 2) * (g * t).sum() / m**2
        w = w - move
        grads = {"kernel": jnp.asarray(g, jnp.float32), "bias": jnp.zeros(5)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(state.latent["kernel"], w, atol=1e-5)
        if bits == 1:
            want = np.sign(w) * np.abs(w).mean()
        else:
            n = 2**bits - 1
            r = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
            want = 2 * np.round(n * r) / n - 1
        np.testing.assert_allclose(params["kernel"], want, atol=2e-6)
    assert isinstance(state.latent["bias"], optax.MaskedNode)


@pytest.mark.parametrize("bits", [1, 3])
def test_dorefa_of_stacked_layers_is_that_of_each(bits):
    sizes = jnp.array([1.0, 5.0, 0.2])[:, None, None]
    stacked, g = {"w": sizes * normal(3, 4, 5)}, normal(3, 4, 5)
    alone = [{"w": w} for w in stacked["w"]]
    tx = jopt.dorefa(optax.sgd(0.1), bits, stacked_axes=0)
    one = jopt.dorefa(optax.sgd(0.1), bits)
    state, states = tx.init(stacked), [one.init(w) for w in alone]
    for _ in range(3):
        updates, state = tx.update({"w": g}, state, stacked)
        stacked = optax.apply_updates(stacked, updates)
        for i in range(3):
            updates, states[i] = one.update({"w": g[i]}, states[i], alone[i])
            alone[i] = optax.apply_updates(alone[i], updates)
            np.testing.assert_array_equal(stacked["w"][i], alone[i]["w"])
    form = F.binary if bits == 1 else F.int4
    spec = jopt.QuantSpec(form, axis=0, scale_dtype=jnp.float32)
    back = jopt.dequantize(jopt.quantize(stacked, spec))
    np.testing.assert_allclose(back["w"], stacked["w"], rtol=3e-7)


@pytest.mark.parametrize(
    ("bits", "format"), [(1, F.binary), (2, F.int3), (4, F.int5), (7, F.int8)]
)
def test_dorefa_weights_are_stored_exactly(bits, format):
    tx = jopt.dorefa(optax.adam(1e-2), bits)
    params, _ = contract.train(tx, contract.make_params(), num_steps=4)
    spec = jopt.QuantSpec(format, axis=(), scale_dtype=jnp.float32)
    back = jopt.dequantize(jopt.quantize(params, spec))
    np.testing.assert_allclose(
        back["dense"]["kernel"], params["dense"]["kernel"], rtol=3e-7
    )
    with pytest.raises(ValueError, match="bits must be"):
        jopt.dorefa(optax.sgd(0.1), 8)


def test_dorefa_activations_are_a_spec_under_a_range():
    """Clip to [0, 1] and round to 2^k - 1 steps, with gradients inside alone."""
    x = jnp.linspace(-0.5, 1.5, 41)
    scale = jopt.QuantSpec(F.uint2, symmetric=False, axis=(), scale_dtype=jnp.float32)
    ends = Range(jnp.float32(1.0), jnp.float32(0.0))
    q = learned_fake_quantize(x, scale, ends, "pact", 1)
    want = np.round(3 * np.clip(np.asarray(x, np.float64), 0, 1)) / 3
    np.testing.assert_allclose(q, want, atol=1e-6)
    grad = jax.grad(lambda x: learned_fake_quantize(x, scale, ends, "pact", 1).sum())
    inside = (np.asarray(x) >= 0) & (np.asarray(x) <= 1)
    np.testing.assert_array_equal(grad(x), inside.astype(np.float32))


# BitNet b1.58, arXiv:2402.17764


def test_bitnet_weights_and_activations():
    """Equations 1 to 3, and 127 / max |x| per token."""
    w, x = np.asarray(normal(16, 8)), np.asarray(normal(5, 16))
    ternary = jopt.QuantSpec(F.ternary, axis=(), scale_dtype=jnp.float32)
    int8 = jopt.QuantSpec(F.int8, scale_dtype=jnp.float32)
    tx = jopt.quantize_weights(optax.sgd(0.0), ternary)
    params = {"w": jnp.asarray(w)}
    updates, state = tx.update({"w": 0 * params["w"]}, tx.init(params), params)
    first = optax.apply_updates(params, updates)["w"]
    gamma = np.abs(w.astype(np.float64)).mean()
    codes = np.clip(np.round(w / (gamma + 1e-8)), -1, 1)
    np.testing.assert_allclose(first, codes * gamma, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jopt.get_scales(state)["w"].scale, [[gamma]], rtol=1e-6)
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    y = jopt.fake_quantize(apply, None, activations=int8)({"w": first}, x)
    top = np.abs(x.astype(np.float64)).max(1, keepdims=True)
    x_q = np.clip(np.round(x * (127 / top)), -128, 127)
    np.testing.assert_allclose(y, (x_q @ codes) * gamma * top / 127, rtol=1e-5,
                               atol=1e-6)  # fmt: skip
    packed = jopt.quantize({"w": first}, ternary)
    assert packed["w"].codes.nbytes == w.size // 4
    got = jopt.execute(apply, activations=int8)(packed, x)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("format", [F.ternary, F.binary])
def test_what_was_trained_ternary_ships_with_its_scales(format, dtype):
    """Weights that change sides in the last update land some ulps off the grid."""
    spec = jopt.QuantSpec(format, axis=(), scale_dtype=jnp.float32)
    tx = jopt.quantize_weights(optax.sgd(1.0), spec)
    params = {"w": normal(32, 16).astype(dtype)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": normal(32, 16).astype(dtype)}, state, params)
        params = optax.apply_updates(params, updates)
        back = jopt.dequantize(jopt.quantize(params, spec))["w"]
        tolerance = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.float32(back), np.float32(params["w"]), rtol=tolerance
        )


# LSQ+, arXiv:2004.09576


def lsq_plus(x, g, s, beta, n, p):
    """Equations 2, 3, 5 and 6: the quantized x, and the gradients of s and beta."""
    ratio = (x - beta) / s
    x_q = np.round(np.clip(ratio, n, p)) * s + beta
    inside = (ratio > n) & (ratio < p)
    outside = np.where(ratio <= n, n, p)
    d_s = (g * np.where(inside, np.round(ratio) - ratio, outside)).sum()
    return x_q, d_s, (g * ~inside).sum()


def test_learned_ranges_of_asymmetric_specs_are_lsq_plus():
    """low = beta and high = beta + 15 s: the same step by the chain rule.

    s = (high - low) / 15 and beta = low, so d high = ds / 15, d low = dbeta - ds / 15.
    """
    s, beta = 0.25, -0.75  # beta is a level: a zero point is a whole number
    spec = jopt.QuantSpec(F.uint4, symmetric=False, axis=())
    x, g = normal(200) * 2, normal(200)
    x_q, d_s, d_beta = lsq_plus(
        np.asarray(x, np.float64), np.asarray(g, np.float64), s, beta, 0, 15
    )
    ends = Range(jnp.float32(beta + 15 * s), jnp.float32(beta))
    features = 100
    value, pull = jax.vjp(
        lambda ends: learned_fake_quantize(x, spec, ends, "learned", features), ends
    )
    np.testing.assert_array_equal(value, x_q.astype(np.float32))
    (grads,) = pull(g)
    weight = 15.0**2 / np.sqrt(features * 15.0)  # LSQ's, for a range and not a step
    np.testing.assert_allclose(grads.high, weight * d_s / 15, rtol=1e-4)
    np.testing.assert_allclose(grads.low, weight * (d_beta - d_s / 15), rtol=1e-4)


def test_asymmetric_ranges_start_at_the_least_squared_error():
    """LSQ+, section 3.2, by a search over shrunk ranges of the numbers themselves."""
    x = np.append(np.random.default_rng(0).exponential(size=16383), 20).astype("f")
    x = x.reshape(256, 64) - np.float32(0.5)

    def error(high, low):
        s = (high - low) / 15
        zero = np.round(-low / s)
        q = (np.clip(np.round(x / s) + zero, 0, 15) - zero) * s
        return np.mean((q - x) ** 2)

    ends = float(x.max()), float(x.min())
    least = min(error(*(c / 200 * end for end in ends)) for c in range(1, 201))
    spec = jopt.QuantSpec(F.uint4, symmetric=False, axis=())
    _, init = jopt.fake_quantize(
        lambda p, x: x @ p["w"], None, activations=spec, ranges="learned"
    )
    (found,) = jax.tree.leaves(
        init({"w": jnp.ones((64, 2))}, x), is_leaf=lambda n: isinstance(n, Range)
    )
    assert error(float(found.high), float(found.low)) < 1.1 * least < 0.6 * error(*ends)


def test_learned_ranges_find_the_offset_of_swish():
    """A negative end that symmetric ranges waste levels on, and unsigned ones clip."""
    x = normal(256, 8)
    apply = lambda p, x: jax.nn.silu(2 * x) @ p["w"]  # noqa: E731
    params, errors = {"w": normal(8, 4)}, {}
    specs = {
        "lsq": jopt.QuantSpec(F.int3, axis=()),
        "lsq+": jopt.QuantSpec(F.uint3, axis=(), symmetric=False),
    }
    for name, spec in specs.items():
        qat, init = jopt.fake_quantize(apply, None, activations=spec, ranges="learned")
        want = apply(params, x)
        tx = optax.adam(2e-2)
        ranges = init(params, x)

        @jax.jit
        def step(ranges, state, qat=qat, want=want, tx=tx):
            loss, grads = jax.value_and_grad(
                lambda r: jnp.mean((qat(params, x, ranges=r) - want) ** 2)
            )(ranges)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(ranges, updates), state, loss

        state = tx.init(ranges)
        for _ in range(150):
            ranges, state, loss = step(ranges, state)
        errors[name] = float(loss)
    assert errors["lsq+"] < 0.7 * errors["lsq"]


# Masks under every format


FORMATS = {
    "int8": (jopt.QuantSpec(F.int8), {}),
    "int2": (jopt.QuantSpec(F.int2), {}),
    "int4 groups": (jopt.QuantSpec(F.int4, group_size=4), {}),
    "uint8": (jopt.QuantSpec(F.uint8, symmetric=False), {}),
    "uint2": (jopt.QuantSpec(F.uint2, symmetric=False), {}),
    "int4 asymmetric": (jopt.QuantSpec(F.int4, symmetric=False, axis=()), {}),
    "uint4 static": (jopt.QuantSpec(F.uint4, symmetric=False), {"scales": "static"}),
    "uint4 moving": (jopt.QuantSpec(F.uint4, symmetric=False), {"scales": "moving"}),
    "int4 learned": (jopt.QuantSpec(F.int4), {"scales": "learned"}),
    "ternary learned": (jopt.QuantSpec(F.ternary), {"scales": "learned"}),
    "ternary": (jopt.QuantSpec(F.ternary, axis=()), {}),
    "nf4": (jopt.QuantSpec(F.nf4), {}),
    "fp8_e4m3": (jopt.QuantSpec(F.fp8_e4m3), {}),
    "fp8_e5m2": (jopt.QuantSpec(F.fp8_e5m2), {}),
    "fp4": (jopt.QuantSpec(F.fp4_e2m1), {}),
    "stochastic": (
        jopt.QuantSpec(F.uint4, symmetric=False),
        {"rounding": jopt.rounding.stochastic, "key": jax.random.key(0)},
    ),
    "parq": (jopt.QuantSpec(F.int3), {"projection": jopt.projections.parq(0.3)}),
    "relax": (
        jopt.QuantSpec(F.uint3, symmetric=False),
        {"projection": jopt.projections.binary_relax(0.3)},
    ),
    "damped": (jopt.QuantSpec(F.uint3, symmetric=False), {"damping": 0.1}),
    "oscillations": (
        jopt.QuantSpec(F.uint3, symmetric=False),
        {"projection": jopt.projections.freeze_oscillations(0.2, momentum=0.5)},
    ),
    "mxfp4": (jopt.QuantSpec(F.mxfp4, axis=0), {}),
    "nvfp4": (jopt.QuantSpec(F.nvfp4, axis=0), {}),
}
SPARSE = {
    "prune": lambda inner: jopt.prune(inner, sparsity=0.5),
    "static_sparse": lambda inner: jopt.static_sparse(inner, sparsity=0.5),
}


QUICK = ["uint8", "uint4 moving", "int4 learned", "ternary", "fp4", "stochastic"]


@pytest.mark.parametrize(
    ("name", "sparse"),
    [
        pytest.param(
            name,
            sparse,
            marks=() if sparse == "prune" and name in QUICK else pytest.mark.exhaustive,
        )
        for name in FORMATS
        for sparse in SPARSE
    ],
)
def test_zeros_of_masks_stay_zeros(name, sparse):
    """Zero is a point of every grid but binary, and stays one while scales move."""
    spec, options = FORMATS[name]
    tx = jopt.quantize_weights(SPARSE[sparse](optax.adam(1e-2)), spec, **options)
    key = jax.random.key(1)
    params = {"kernel": jax.random.normal(key, (32, 32)) + 0.3}
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for step in range(4):
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
        mask = np.asarray(jopt.get_masks(state)["kernel"])
        assert int(mask.sum()) == 512
        assert not np.any(np.asarray(params["kernel"])[~mask]), step
    if "projection" not in options or "oscillations" in name:
        packed = jopt.quantize(params, spec, scales=jopt.get_scales(state))
        shipped = np.asarray(jopt.dequantize(packed)["kernel"])
        assert not np.any(shipped[~mask]) and np.any(shipped[mask])


def test_binary_has_no_zero_and_says_so():
    for sparse in SPARSE.values():
        tx = jopt.quantize_weights(sparse(optax.sgd(0.1)), jopt.QuantSpec(F.binary))
        with pytest.raises(ValueError, match=r"'dense/kernel'.*has no zero"):
            tx.init(contract.make_params())
        with pytest.raises(ValueError, match="dorefa needs weights without masks"):
            jopt.dorefa(sparse(optax.sgd(0.1)), 2).init(contract.make_params())
    rules = {"dense/.*": jopt.QuantSpec(F.ternary), "head/.*": jopt.QuantSpec(F.binary)}
    dense_only = jopt.prune(
        optax.sgd(0.1), sparsity=0.5, select=jopt.matching("dense/kernel")
    )
    jopt.quantize_weights(dense_only, rules).init(contract.make_params())
