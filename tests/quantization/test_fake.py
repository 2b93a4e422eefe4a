"""Quantization-aware functions: what is rounded, at which scales and gradients."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jopt
from jopt.arrays.quantized import fake_quantize as round_array
from tests.programs import zoo

FORMATS = jopt.formats
INT8, INT4 = jopt.QuantSpec(FORMATS.int8), jopt.QuantSpec(FORMATS.int4)
PER_TENSOR = jopt.QuantSpec(FORMATS.int8, axis=())
RNG = np.random.default_rng(2)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dot(params, x):
    return x @ params["w"]


def naive(x, bits, axis):
    """Round to symmetric integers, one bfloat16 scale along the axes."""
    x = np.asarray(x, np.float64)
    top = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(axis, keepdims=True) / top
    scale = np.asarray(jnp.asarray(scale, jnp.float32).astype(jnp.bfloat16), np.float64)
    return np.clip(np.round(x / scale), -top, top) * scale


def operations(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    found = re.findall(r"^\s*(?:ROOT )?\S+ = \S+ ([\w-]+)\(", text, re.M)
    return collections.Counter(found)


@pytest.mark.parametrize(
    "spec, axis",
    [
        (INT8, 2),  # one scale per token
        (PER_TENSOR, (0, 1, 2)),
        (jopt.QuantSpec(FORMATS.int8, axis=2), (0, 1)),
        (jopt.QuantSpec(FORMATS.int8, axis=(0, -1)), 1),
    ],
    ids=repr,
)
def test_granularity_of_activations(spec, axis):
    params, x = {"w": normal(6, 3)}, normal(2, 5, 6)
    y = jopt.fake_quantize(dot, INT4, activations=spec)(params, x)
    want = naive(x, 8, axis) @ naive(params["w"], 4, 0)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_groups_of_a_token():
    spec = jopt.QuantSpec(FORMATS.int8, group_size=2)
    params, x = {"w": normal(6, 3)}, normal(5, 6)
    y = jopt.fake_quantize(dot, None, activations=spec)(params, x)
    want = naive(x.reshape(5, 3, 2), 8, 2).reshape(5, 6) @ np.asarray(params["w"])
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_images_of_a_convolution_have_a_scale_each():
    model = zoo.ZOO["conv_transpose"]()
    table = jopt.sites(model.apply, model.params, *model.inputs)
    roles = table.sites[0].operand_roles[0]
    assert roles[0] == "out" and set(roles[1:]) == {"in"}


def test_static_ranges_per_channel():
    params, x = {"w": normal(6, 3)}, normal(5, 6)
    spec = jopt.QuantSpec(FORMATS.int8, axis=-1)
    calibration = jopt.calibrate(dot, params, [x, 2 * x], activations=spec)
    assert calibration.activations["w"][0].high.shape == (1, 6)
    y = jopt.fake_quantize(dot, None, calibration=calibration)(params, 2 * x)
    want = naive(2 * x, 8, 0) @ np.asarray(params["w"])
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [INT8, INT4, jopt.QuantSpec(FORMATS.nf4)], ids=repr)
def test_weights_are_those_that_ship(spec):
    model = zoo.ZOO["vit"]()
    table = jopt.sites(model.apply, model.params, *model.inputs)
    packed = jopt.quantize(model.params, spec, sites=table)
    want = jax.jit(model.apply)(jopt.dequantize(packed), *model.inputs)
    got = jopt.fake_quantize(model.apply, spec)(model.params, *model.inputs)
    np.testing.assert_array_equal(got, want)


def test_the_compiled_program_is_the_one_written_by_hand():
    def mlp(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    def by_hand(params, x):
        weight = jopt.QuantSpec(FORMATS.int8, axis=1)
        token = jopt.QuantSpec(FORMATS.int8, axis=0)
        h = round_array(x, token) @ round_array(params["a"], weight)
        h = jax.nn.relu(h)
        return round_array(h, token) @ round_array(params["b"], weight)

    params, x = {"a": normal(6, 8), "b": normal(8, 3)}, normal(5, 6)
    qat = jopt.fake_quantize(mlp, INT8, activations=INT8)
    np.testing.assert_array_equal(qat(params, x), jax.jit(by_hand)(params, x))
    for wrap in (lambda f: f, lambda f: jax.grad(lambda p, x: f(p, x).sum())):
        assert operations(wrap(qat), params, x) == operations(wrap(by_hand), params, x)


@pytest.mark.parametrize("name", ["linen_transformer", "nnx_cnn", "shard_map_tp"])
def test_gradients_pass_straight_through(name):
    """Every leaf that gets a gradient gets one, close to that of the float model."""
    model = zoo.ZOO[name]()
    qat = jopt.fake_quantize(model.apply, INT8, activations=INT8)

    def loss(function, params):
        outputs = jax.tree.leaves(function(params, *model.inputs))
        return sum(jnp.sum(jnp.square(out)) for out in outputs)

    grads = [
        jax.jit(jax.grad(lambda p, f=f: loss(f, p)))(model.params)
        for f in (model.apply, qat)
    ]
    # What is zero but for rounding (biases of keys) is held to all the others.
    total = float(optax.tree.norm(grads[0]))
    for want, got in zip(*map(jax.tree.leaves, grads), strict=True):
        error = float(jnp.linalg.norm(want - got))
        assert error <= 0.2 * float(jnp.linalg.norm(want)) + 1e-4 * total


def test_clipped_inputs_get_no_gradient():
    params, x = {"w": jnp.eye(3)}, jnp.array([[0.5, 1.0, 4.0]])
    calibration = jopt.calibrate(dot, params, [x / 4])
    qat = jopt.fake_quantize(dot, None, calibration=calibration)
    grad = jax.grad(lambda x: qat(params, x).sum())(x)
    np.testing.assert_array_equal(grad, [[1.0, 1.0, 0.0]])


def test_begin_step_switches_inside_jit():
    params, x = {"w": normal(6, 3)}, normal(5, 6)
    qat = jopt.fake_quantize(dot, INT4, activations=INT4, begin_step=10)
    traces = []

    @jax.jit
    def run(step):
        traces.append(step)
        return qat(params, x, step=step)

    always = jopt.fake_quantize(dot, INT4, activations=INT4)(params, x)
    np.testing.assert_allclose(run(9), dot(params, x), rtol=1e-6)
    np.testing.assert_allclose(run(10), always, rtol=1e-6)
    assert len(traces) == 1
    with pytest.raises(ValueError, match="step must be given"):
        qat(params, x)


def test_rules_of_both_kinds():
    def apply(params, x):
        h = x @ params["a"]
        scores = jnp.einsum("bi,bj->bij", h, h)
        return jnp.einsum("bij,bj->bi", scores, h) @ params["b"]

    params, x = {"a": normal(4, 4), "b": normal(4, 2)}, normal(3, 4)
    table = jopt.sites(apply, params, x)
    assert len(table.activations) == 2
    run = lambda **rules: jopt.fake_quantize(apply, None, **rules)(params, x)  # noqa: E731
    y = apply(params, x)
    everywhere = run(activations=INT4)
    attention = run(activations={"activation:.*": INT4})
    both = run(activations={".*": INT4})
    assert len({float(v[0, 0]) for v in (y, everywhere, attention, both)}) == 4
    np.testing.assert_allclose(run(activations={"a": None, "b": None}), y, rtol=1e-6)
    with pytest.raises(ValueError, match="near names: 'a'"):
        run(activations={"aa": INT4})


def test_a_rule_for_a_leaf_covers_its_later_uses():
    def apply(params, x):
        return (x @ params["w"]) @ params["w"]

    params, x = {"w": normal(4, 4)}, normal(3, 4)
    by_path = jopt.fake_quantize(apply, None, activations={"w": INT4})(params, x)
    all_sites = jopt.fake_quantize(apply, None, activations=INT4)(params, x)
    np.testing.assert_array_equal(by_path, all_sites)


def test_sites_that_cannot_be_entered_are_refused_by_name():
    model = zoo.ZOO["custom_vjp"]()
    table = jopt.sites(model.apply, model.params, *model.inputs)
    (name,) = {s.name for s in table if not s.reachable}
    qat = jopt.fake_quantize(model.apply, None, activations={re.escape(name): INT8})
    with pytest.raises(ValueError, match="can be entered"):
        qat(model.params, *model.inputs)


@pytest.mark.parametrize("name", ["weight_norm", "lora", "concat"])
def test_weights_that_are_computed_are_rounded_where_they_are_used(name):
    model = zoo.ZOO[name]()
    y = jopt.fake_quantize(model.apply, INT4)(model.params, *model.inputs)
    want = model.apply(model.params, *model.inputs)
    assert (
        max(
            float(jnp.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(want), strict=True)
        )
        > 1e-3
    )


# Learned ranges.


def lsq_gradients(v, step, levels):
    """Equations 3 to 5 of arXiv:1902.08153 with Q_N = Q_P = levels, in NumPy."""
    v = np.asarray(v, np.float64) / step
    ds = np.where(v <= -levels, -levels, np.where(v >= levels, levels, np.round(v) - v))
    inside = (v > -levels) & (v < levels)
    return ds, inside, 1 / np.sqrt(v.size * levels)


@pytest.mark.parametrize("format, levels", [(FORMATS.int4, 7), (FORMATS.int8, 127)])
def test_lsq_gradients_are_those_of_the_paper(format, levels):
    """Of a step s = high / levels; a step of high by lr is one of s by lr / levels."""
    spec = jopt.QuantSpec(format, scale_dtype=jnp.float32)
    step = 0.25
    x = 0.4 * levels * step * normal(1, 40)
    x = x.at[0, :2].set(jnp.array([1.5, -1.2]) * levels * step)  # clipped
    ds, inside, scale = lsq_gradients(x, step, levels)
    w = normal(40, 1)
    qat, init_ranges = jopt.fake_quantize(dot, None, activations=spec, ranges="learned")
    ranges = init_ranges({"w": w}, x)
    ranges = jax.tree.map(lambda _: jnp.float32(levels * step), ranges)
    grads = jax.grad(lambda r, x: qat({"w": w}, x, ranges=r).sum(), (0, 1))(ranges, x)
    want = (ds * np.asarray(w, np.float64).T).sum() * scale
    (got,) = jax.tree.leaves(grads[0])
    np.testing.assert_allclose(got / levels, want, rtol=1e-4)
    np.testing.assert_allclose(grads[1], np.where(inside, w.T, 0), rtol=1e-6)


def test_lsq_gradients_of_weights_are_those_of_the_paper():
    """Each output has a step of its own, of as many weights as it has inputs."""
    spec = jopt.QuantSpec(FORMATS.int8, scale_dtype=jnp.float32)
    w, x, step = 30 * normal(40, 3), normal(1, 40), 0.5
    qat, init_ranges = jopt.fake_quantize(dot, spec, ranges="learned")
    ranges = init_ranges({"w": w}, x)
    ranges = jax.tree.map(lambda high: jnp.full_like(high, 127 * step), ranges)
    params = {"w": w}
    grads = jax.grad(lambda r, p: qat(p, x, ranges=r).sum(), (0, 1))(ranges, params)
    for i in range(3):
        ds, inside, scale = lsq_gradients(w[:, i], step, 127)
        want = (ds * np.asarray(x[0], np.float64)).sum() * scale
        got = grads[0].weights["w"].high[0, i]
        np.testing.assert_allclose(got / 127, want, rtol=1e-4)
        np.testing.assert_allclose(grads[1]["w"][:, i], np.where(inside, x[0], 0))


def test_pact_gradients_are_those_of_the_paper():
    """dq/dalpha = 1 above alpha and 0 below (arXiv:1805.06085, equation 3)."""
    params, x = {"w": jnp.ones((4, 1))}, jnp.array([[0.3, 1.1, 2.0, 5.0]])
    spec = jopt.QuantSpec(FORMATS.int4, symmetric=False)
    qat, init_ranges = jopt.fake_quantize(dot, None, activations=spec, ranges="pact")
    ranges = init_ranges(params, x)
    ranges = jax.tree.map(lambda end: jnp.minimum(end, 1.5), ranges)
    grad = jax.grad(lambda r: qat(params, x, ranges=r).sum())(ranges)
    assert grad.activations["w"][0].high == 2.0
    assert grad.activations["w"][0].low == 0.0


def test_learned_ranges_learn_and_ship():
    """A range that starts far too wide shrinks, beyond that of the largest numbers."""

    def mlp(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    x = normal(64, 8)
    params = {"a": normal(8, 16), "b": normal(16, 4)}
    y = mlp(params, x)
    spec = jopt.QuantSpec(FORMATS.int3)
    qat, init_ranges = jopt.fake_quantize(mlp, spec, activations=spec, ranges="learned")
    first = init_ranges(params, x)
    ranges = jax.tree.map(lambda high: 4 * high, first)
    tx = optax.adam(1e-1)

    @jax.jit
    def step(ranges, state):
        loss, grads = jax.value_and_grad(
            lambda r: jnp.mean((qat(params, x, ranges=r) - y) ** 2)
        )(ranges)
        updates, state = tx.update(grads, state, ranges)
        return optax.apply_updates(ranges, updates), state, loss

    state, losses = tx.init(ranges), []
    for _ in range(150):
        ranges, state, loss = step(ranges, state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert losses[-1] < jnp.mean((qat(params, x, ranges=first) - y) ** 2)
    packed = jopt.quantize(params, ranges)
    got = jopt.execute(mlp, activations=ranges)(packed, x)
    np.testing.assert_allclose(got, qat(params, x, ranges=ranges), rtol=1e-5, atol=1e-5)


def test_learned_ranges_of_scanned_layers():
    model = zoo.ZOO["stacked_scan"]()
    qat, init_ranges = jopt.fake_quantize(
        model.apply, INT8, activations=INT8, ranges="learned"
    )
    ranges = init_ranges(model.params, *model.inputs)
    grads = jax.grad(
        lambda r: sum(
            jnp.sum(out)
            for out in jax.tree.leaves(qat(model.params, *model.inputs, ranges=r))
        )
    )(ranges)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))
    shapes = {name: pair for name, pair in ranges.activations.items()}
    assert any(
        leaf.ndim == 1 for pair in shapes.values() for leaf in jax.tree.leaves(pair)
    )


def test_arguments_of_arrays_and_functions_do_not_mix():
    with pytest.raises(TypeError, match="belong to functions"):
        jopt.fake_quantize(jnp.ones(3), INT8, activations=INT8)
    with pytest.raises(TypeError, match="belong to arrays"):
        jopt.fake_quantize(dot, INT8, rounding=None)
    with pytest.raises(ValueError, match="ranges must be"):
        jopt.fake_quantize(dot, INT8, ranges="lsq")
    qat, _ = jopt.fake_quantize(dot, INT8, activations=INT8, ranges="learned")
    with pytest.raises(ValueError, match="init_ranges returns them"):
        qat({"w": normal(6, 3)}, normal(4, 6))


def test_calls_compose_with_transformations_of_jax():
    params, x = {"w": normal(6, 3)}, normal(7, 5, 6)
    qat = jopt.fake_quantize(dot, INT8, activations=INT8)
    one_by_one = jnp.stack([qat(params, row) for row in x])
    np.testing.assert_allclose(
        jax.vmap(qat, (None, 0))(params, x), one_by_one, rtol=1e-5
    )
    _, scanned = lax.scan(lambda c, row: (c, qat(params, row)), 0, x)
    np.testing.assert_allclose(scanned, one_by_one, rtol=1e-5)
    np.testing.assert_allclose(jax.checkpoint(qat)(params, x), one_by_one, rtol=1e-5)


def test_tables_must_belong_to_the_params():
    params = {"w": normal(6, 3)}
    table = jopt.sites(dot, params, normal(4, 6))
    with pytest.raises(ValueError, match="sites must be of these params"):
        jopt.quantize({"w": normal(5, 3)}, INT8, sites=table)
    with pytest.raises(TypeError, match="sites must be what"):
        jopt.quantize(params, INT8, sites=dot)


def test_rules_round_what_is_computed_from_leaves_as_one_spec_does():
    params, x = {"v": normal(6, 3), "g": normal(1, 3), "w": normal(3, 2)}, normal(4, 6)

    def apply(params, x):
        return x @ (params["v"] * params["g"]) @ params["w"]

    want = jopt.fake_quantize(apply, INT8)(params, x)
    got = jopt.fake_quantize(apply, {".*": INT8})(params, x)
    np.testing.assert_array_equal(got, want)
    leaves = jopt.fake_quantize(apply, {"v": None, ".*": INT8})(params, x)
    assert np.abs(leaves - want).max() > 0


def test_complex_weights_are_left_alone():
    params, x = (
        {"re": normal(3, 3), "im": normal(3, 3), "w": normal(3, 3)},
        normal(2, 3),
    )

    def apply(params, x):
        turn = jax.lax.complex(params["re"], params["im"])
        return jnp.abs((x @ params["w"]).astype(turn.dtype) @ turn)

    got = jopt.fake_quantize(apply, INT8, activations=INT8)(params, x)
    only = jopt.fake_quantize(apply, {"w": INT8}, activations={"w": INT8})(params, x)
    np.testing.assert_array_equal(got, only)
