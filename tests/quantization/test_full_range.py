"""Symmetric integers with all codes: the lowest is that of the largest magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import jopt

RNG = np.random.default_rng(0)
W = RNG.normal(size=(64, 6)).astype(np.float32)
X = RNG.normal(size=(3, 32, 64)).astype(np.float32)


def spec_of(bits, **options):
    options = {"group_size": 16, "narrow_range": False} | options
    return jopt.QuantSpec(getattr(jopt.formats, f"int{bits}"), **options)


def by_hand(w, bits, size):
    """Return levels and scales of groups of the first axis, in float64."""
    groups = w.astype(np.float64).reshape(-1, size, w.shape[-1])
    largest = np.take_along_axis(
        groups, np.abs(groups).argmax(axis=1, keepdims=True), axis=1
    )
    scale = np.where(largest == 0, 1.0, -largest / 2 ** (bits - 1))
    levels = np.clip(np.round(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return levels.reshape(w.shape), scale[:, 0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_scales_are_those_of_the_definition(bits):
    q = jopt.quantize({"w": W}, spec_of(bits, scale_dtype=jnp.float32))["w"]
    levels, scale = by_hand(W, bits, 16)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    assert (scale < 0).any() and (scale > 0).any()
    values = jopt.dequantize(q)
    wide = np.repeat(scale, 16, axis=0)
    np.testing.assert_array_equal(np.round(values / wide), levels)
    assert levels.min() == -(2 ** (bits - 1))


@settings(max_examples=25)
@given(
    arrays.arrays(
        np.float32,
        (16, 2),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    ),
    st.sampled_from([2, 4, 8]),
)
def test_what_is_on_the_grid_stays(w, bits):
    spec = spec_of(bits)
    once = jopt.quantize({"w": w}, spec)["w"]
    values = jopt.dequantize(once)
    twice = jopt.quantize({"w": values}, spec)["w"]
    np.testing.assert_array_equal(values, jopt.dequantize(twice))
    np.testing.assert_array_equal(values, jopt.fake_quantize(jnp.array(w), spec))
    step = np.abs(np.repeat(np.asarray(once.scale, np.float64), 16, axis=0))
    assert (np.abs(values - w) <= step * (spec.max_error + 2.0**-7)).all()


@pytest.mark.parametrize(
    ("bits", "share"), [(2, 0.31), (3, 0.58), (4, 0.77), (8, 0.985)]
)
def test_share_of_the_narrow_error(bits, share):
    w = {"w": np.random.default_rng(1).normal(size=(1024, 64)).astype(np.float32)}
    error = [
        np.mean(
            (jopt.dequantize(jopt.quantize(w, spec))["w"] - w["w"]) ** 2, dtype=float
        )
        for spec in (
            spec_of(bits, group_size=128),
            spec_of(bits, group_size=128, narrow_range=True),
        )
    ]
    assert error[0] / error[1] == pytest.approx(share, rel=0.05)


def apply(params, x):
    return x @ params["w"]


METHODS = {
    "rtn": lambda spec: jopt.rtn(apply, {"w": W}, list(X), spec),
    "gptq": lambda spec: jopt.gptq(apply, {"w": W}, list(X), spec),
    "gptq in activation order": lambda spec: jopt.gptq(
        apply, {"w": W}, list(X), spec, activation_order=True
    ),
    "gptq by least error": lambda spec: jopt.gptq(
        apply, {"w": W}, list(X), spec, fit=jopt.scale_fits.least_error()
    ),
    "rtn by half quadratic": lambda spec: jopt.rtn(
        apply, {"w": W}, list(X), spec, fit=jopt.scale_fits.half_quadratic()
    ),
    "awq": lambda spec: jopt.awq(apply, {"w": W}, list(X), spec),
    "adaround": lambda spec: jopt.adaround(apply, {"w": W}, list(X), spec),
    "autoround": lambda spec: jopt.autoround(apply, {"w": W}, list(X), spec),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gains_by_it(method):
    errors = []
    for narrow_range in (False, True):
        spec = spec_of(3, narrow_range=narrow_range)
        packed, report = METHODS[method](spec)
        assert not packed["w"].spec.narrow_range or narrow_range
        values = jopt.dequantize(packed)["w"]
        difference = X.reshape(-1, 64) @ (np.asarray(values) - W)
        errors.append(np.sum(difference**2) / np.sum((X.reshape(-1, 64) @ W) ** 2))
        assert report.rows[0].error == pytest.approx(errors[-1], rel=1e-3)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_default_where_codes_are_chosen_once(method):
    run = METHODS[method]
    chosen, _ = run(spec_of(3, narrow_range=None))
    asked, _ = run(spec_of(3))
    assert chosen["w"].spec == asked["w"].spec
    assert chosen["w"].spec.narrow_range is False
    for a, b in zip(*map(jax.tree.leaves, (chosen, asked)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_the_default_without_data_and_by_rules():
    params, open_ = {"a": W, "b": W}, spec_of(4, narrow_range=None)
    both = [("a", open_), ("b", spec_of(4, narrow_range=True))]
    batches = [{"a": X[0], "b": X[1]}]
    product = lambda p, x: (x["a"] @ p["a"], x["b"] @ p["b"])  # noqa: E731
    for rules in (both, tuple(both), dict(both)):
        for packed in (
            jopt.hqq(params, rules),
            jopt.gptq(product, params, batches, rules, progress=False)[0],
        ):
            assert packed["a"].spec.narrow_range is False
            assert packed["b"].spec.narrow_range is True
    for format, options in (("uint4", {"symmetric": False}), ("nf4", {})):
        spec = jopt.QuantSpec(getattr(jopt.formats, format), **options)
        assert jopt.hqq({"w": W}, spec)["w"].spec == spec


def test_elsewhere_the_default_is_narrow():
    spec, narrow = (spec_of(4, narrow_range=value) for value in (None, True))
    assert spec.is_narrow and spec != narrow
    packed, same = (jopt.quantize({"w": W}, s)["w"] for s in (spec, narrow))
    np.testing.assert_array_equal(packed.codes, same.codes)
    np.testing.assert_array_equal(packed.to_array(), jopt.fake_quantize(W, spec))
    assert packed.spec == spec


def on_narrow_grid(bits, dtype=np.float32, seed=0):
    """Codes times powers of two, each group with its largest level."""
    rng, top = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    codes = rng.integers(-top, top + 1, (4, 16, 6))
    codes[:, 3] = top * rng.choice([-1, 1], (4, 6))
    scale = 2.0 ** rng.integers(-6, 3, (4, 1, 6))
    return (codes * scale).reshape(64, 6).astype(dtype)


@pytest.mark.parametrize("method", METHODS)
def test_powers_of_two_pass_every_method(method, monkeypatch):
    w, spec = on_narrow_grid(3), spec_of(3, narrow_range=None)
    monkeypatch.setitem(globals(), "W", w)
    packed, report = METHODS[method](spec)
    np.testing.assert_array_equal(jopt.dequantize(packed)["w"], w)
    assert report["w"].error == 0
    assert packed["w"].spec.is_narrow


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_what_is_on_the_narrow_grid_keeps_it(bits, dtype, scale_dtype):
    options = {"scale_dtype": jnp.dtype(scale_dtype)}
    spec, narrow = (spec_of(bits, narrow_range=v, **options) for v in (None, True))
    first = jopt.quantize({"w": W.astype(dtype)}, spec)
    trained, x = jopt.dequantize(first), X[0].astype(dtype)
    for method in (
        lambda spec: jopt.hqq(trained, spec),
        lambda spec: jopt.gptq(apply, trained, [x], spec, progress=False)[0],
    ):
        packed, want = method(spec)["w"], method(narrow)["w"]
        assert packed.spec.narrow_range is None
        np.testing.assert_array_equal(packed.codes, want.codes)
        np.testing.assert_array_equal(packed.scale, want.scale)
    # A third of a level off, where a level is large beside the number.
    moved = np.array(trained["w"], np.float32)
    at = np.unravel_index(np.abs(moved).argmin(), moved.shape)
    moved[at] += np.abs(np.asarray(first["w"].scale, np.float32)).min() / 3
    other = jopt.hqq({"w": jnp.asarray(moved, dtype)}, spec)
    assert not other["w"].spec.is_narrow


def test_inside_jit_nothing_is_known_to_be_on_a_grid():
    spec = spec_of(3, narrow_range=None)
    packed = jax.jit(lambda w: jopt.hqq({"w": w}, spec))(on_narrow_grid(3))
    assert packed["w"].spec.narrow_range is False
    assert jopt.hqq({"w": on_narrow_grid(3)}, spec)["w"].spec == spec


def test_huge_and_nan_weights():
    top = float(jnp.finfo(jnp.bfloat16).max)
    for w in (jnp.full((4, 4), top, jnp.bfloat16), jnp.array([[3e38], [0.0]])):
        values = jopt.hqq({"w": w}, jopt.QuantSpec(jopt.formats.int2))["w"].to_array()
        assert np.isfinite(np.asarray(values, np.float32)).all()
    w = jnp.array([[1.0, jnp.nan], [0.3, 1.0]])
    q = jopt.hqq({"w": w}, jopt.QuantSpec(jopt.formats.int4))["w"]
    assert not q.spec.is_narrow


def test_it_leaves_and_returns_as_compressed_tensors(tmp_path):
    packed, _ = METHODS["gptq"](spec_of(4, narrow_range=None))
    narrow = jopt.quantize(jnp.asarray(W), spec_of(4, narrow_range=True))
    tree = {"a": packed["w"], "b": narrow}
    jopt.write_compressed_tensors(tmp_path, tree)
    back, _ = jopt.read_compressed_tensors(tmp_path, transposed=jopt.matching(".*"))
    found = {key.partition(".")[0]: leaf for key, leaf in back.items()}
    assert found["a"].spec.narrow_range is False
    assert found["b"].spec.is_narrow
    for key in "ab":
        np.testing.assert_array_equal(found[key].to_array(), tree[key].to_array())


def usual_gptq(w, gram, bits, size):
    """Static scales of the largest magnitude over 7.5 in int4, as peers have them."""
    h = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(w))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w, q, half = w.astype(np.float64).copy(), np.zeros(w.shape), 2 ** (bits - 1)
    scale = np.abs(w.reshape(-1, size, w.shape[1])).max(axis=1) / (half - 0.5)
    scale = np.repeat(scale, size, axis=0)
    for i in range(len(w)):
        q[i] = np.clip(np.rint(w[i] / scale[i]), -half, half - 1) * scale[i]
        w[i:] -= np.outer(upper[i, i:], (w[i] - q[i]) / upper[i, i])
    return q


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_loses_less_than_on_the_grid_of_peers(bits):
    rng = np.random.default_rng(3)
    w = rng.normal(size=(256, 64)).astype(np.float32)
    x = (rng.normal(size=(1024, 256)) @ rng.normal(size=(256, 256)) / 16).astype("f4")
    spec = spec_of(bits, group_size=128, narrow_range=None)
    packed, _ = jopt.gptq(apply, {"w": w}, [x], spec, progress=False)
    gram = x.T.astype(np.float64) @ x
    lost = [
        np.sum(d * (gram @ d))
        for q in (jopt.dequantize(packed)["w"], usual_gptq(w, gram, bits, 128))
        for d in [w - np.asarray(q, np.float64)]
    ]
    assert lost[0] < 0.95 * lost[1]


def test_execution_is_exact_on_powers_of_two():
    spec = spec_of(8, group_size=None)
    w = RNG.integers(-127, 128, (64, 6)).astype(np.float32)
    w[0] = [128, -128, 128, 128, -128, -128]
    x = RNG.integers(-127, 128, (5, 64)).astype(np.float32)
    x[:, 0] = 127
    packed = jopt.quantize({"w": w}, spec)
    np.testing.assert_array_equal(np.sign(packed["w"].scale[0]), -np.sign(w[0]))
    inputs = jopt.QuantSpec(jopt.formats.int8, axis=())
    fake = jopt.fake_quantize(apply, None, activations=inputs)
    executed = jopt.execute(apply, activations=inputs)
    values = jopt.dequantize(packed)
    np.testing.assert_array_equal(executed(packed, x), fake(values, x))
    clipped = np.where(w == np.where(w[0] > 0, -128, 128), -np.sign(w[0]) * 127, w)
    np.testing.assert_array_equal(values["w"], clipped)
    np.testing.assert_array_equal(executed(packed, x), x @ clipped)


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_files_keep_it(tmp_path, suffix):
    values = (False, True, None)
    packed = {
        str(value): jopt.quantize({"w": W}, spec_of(4, narrow_range=value))["w"]
        for value in values
    }
    packed["w"] = packed["False"]
    path = tmp_path / f"model{suffix}"
    jopt.save(path, packed)
    back = jopt.restore(path)
    assert [back[str(v)].spec.narrow_range for v in values] == list(values)
    assert all(back[key].spec == packed[key].spec for key in packed)
    np.testing.assert_array_equal(
        jopt.dequantize(back)["w"], jopt.dequantize(packed)["w"]
    )


@pytest.mark.parametrize("scales", ["current", "static", "moving"])
def test_training_lands_on_it(scales):
    tx = jopt.quantize_weights(optax.sgd(0.1), spec_of(4), scales=scales)
    params = {"w": jnp.asarray(W)}
    state = tx.init(params)
    for step in range(3):
        grads = {"w": jnp.asarray(np.roll(W, step, axis=0))}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    given = None if scales == "current" else jopt.get_scales(state)
    again = jopt.quantize(params, spec_of(4), scales=given)
    np.testing.assert_array_equal(jopt.dequantize(again)["w"], params["w"])


def test_cache_stays_within_its_bound():
    cache = jopt.init_cache((1, 8, 2, 16), spec_of(3, group_size=None))
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 16))
    cache = cache.append(x, x)
    keys, bound = cache.read().keys, cache.error_bounds()[0]
    assert (jnp.abs(keys - x) <= bound * (1 + 1e-2)).all()
    assert (bound > 0).all()


def test_bits_schedules_keep_it():
    values = jopt.fake_quantize(jnp.array(W), spec_of(8), bits=3)
    want = jopt.fake_quantize(jnp.array(W), spec_of(3))
    np.testing.assert_array_equal(values, want)


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("uint4", {"symmetric": False}, "asymmetric uint4"),
        ("int4", {"symmetric": False}, "asymmetric int4"),
        ("nf4", {}, "symmetric nf4"),
        ("fp8_e4m3", {}, "symmetric fp8_e4m3"),
    ],
)
def test_other_formats_refuse_it(format, options, words):
    with pytest.raises(ValueError, match=f"narrow_range must be left out for {words}"):
        jopt.QuantSpec(getattr(jopt.formats, format), narrow_range=False, **options)
    with pytest.raises(TypeError, match="narrow_range must be True, False or None"):
        jopt.QuantSpec(jopt.formats.int4, narrow_range=0)


def test_learned_scales_and_known_ranges_refuse_it():
    spec = spec_of(4, group_size=None)
    with pytest.raises(ValueError, match="positive scales"):
        jopt.quantize_weights(optax.sgd(0.1), spec, scales="learned").init({"w": W})
    with pytest.raises(ValueError, match="narrow_range=True"):
        jopt.calibrate(apply, {"w": W}, list(X), activations=spec)


def test_nan_and_zeros():
    w = np.zeros((32, 2), np.float32)
    w[20, 1] = np.nan
    q = jopt.quantize({"w": w}, spec_of(4))["w"]
    np.testing.assert_array_equal(
        np.asarray(q.scale, np.float32), [[1, 1], [1, np.nan]]
    )
