"""Ranges that are given: learned, measured, of nothing, and of what does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jopt
from tests.programs import zoo

FORMATS = jopt.formats
INT8, INT4 = jopt.QuantSpec(FORMATS.int8), jopt.QuantSpec(FORMATS.int4)
Packed = jopt.QuantizedArray
UINT8 = jopt.QuantSpec(FORMATS.uint8, symmetric=False)
RNG = np.random.default_rng(7)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dot(params, x):
    return x @ params["w"]


def power_of_two(high):
    return 127 * 2.0 ** jnp.round(jnp.log2(high / 127))


# What was trained is what is evaluated and what ships.


@pytest.mark.parametrize("mode", ["learned", "pact"])
def test_trained_ranges_are_the_same_in_every_use(mode):
    """With half the range of the weights, which shows where it is not used."""
    params, x = {"w": normal(6, 3)}, normal(5, 6)
    qat, init_ranges = jopt.fake_quantize(dot, INT8, activations=INT8, ranges="learned")
    start = init_ranges(params, x)
    ranges = jax.tree.map(lambda high: power_of_two(0.5 * high), start)
    want = qat(params, x, ranges=ranges)
    uses = {
        "spec": jopt.fake_quantize(dot, ranges),
        "calibration": jopt.fake_quantize(dot, INT8, calibration=ranges),
        "both": jopt.fake_quantize(dot, ranges, calibration=ranges),
    }
    for name, use in uses.items():
        np.testing.assert_array_equal(use(params, x), want, err_msg=name)
    packed = jopt.quantize(params, ranges)
    run = jopt.execute(dot, activations=ranges)
    np.testing.assert_array_equal(run(packed, x), want)
    # They go on to be trained from where they are, or stay in PACT, which has none.
    again, init_again = jopt.fake_quantize(dot, ranges, ranges=mode)
    restart = init_again(params, x)
    np.testing.assert_array_equal(again(params, x, ranges=restart), want)
    grad = jax.grad(lambda r: again(params, x, ranges=r).sum())(restart)
    is_learned = bool(jnp.any(grad.weights["w"].high != 0))
    assert is_learned == (mode == "learned")


def test_given_ranges_get_no_gradient():
    params, x = {"w": normal(6, 3)}, normal(5, 6)
    _, init_ranges = jopt.fake_quantize(dot, INT8, activations=INT8, ranges="learned")
    ranges = init_ranges(params, x)
    grad = jax.grad(lambda r: jopt.fake_quantize(dot, r)(params, x).sum())(ranges)
    assert not any(jnp.any(g != 0) for g in jax.tree.leaves(grad))


def test_learned_ranges_of_another_spec_are_refused():
    params, x = {"w": normal(6, 3)}, normal(5, 6)
    _, init_ranges = jopt.fake_quantize(dot, INT8, ranges="learned")
    ranges = init_ranges(params, x)
    whole = jopt.QuantSpec(FORMATS.int8, axis=())
    with pytest.raises(ValueError, match=r"ranges of 'w'.*\(1, 3\) where.*\(1, 1\)"):
        jopt.fake_quantize(dot, whole, calibration=ranges)(params, x)


# Ranges on their way through zero.


@pytest.mark.parametrize("mode", ["learned", "pact"])
@pytest.mark.parametrize("spec", [INT8, UINT8], ids=repr)
@pytest.mark.parametrize("end", [0.0, -1e-3, -1.0, 1e-40])
def test_ranges_come_back_from_zero_and_below(mode, spec, end):
    """Nothing stays unrounded, and training widens what clips all."""
    params, x = {"w": jnp.eye(6)}, 20 * normal(64, 6)
    qat, init_ranges = jopt.fake_quantize(dot, None, activations=spec, ranges=mode)
    start = init_ranges(params, x)
    ranges = jax.tree.map(lambda leaf: jnp.full_like(leaf, end), start)

    def loss(ranges):
        return jnp.mean((qat(params, x, ranges=ranges) - x) ** 2)

    y = qat(params, x, ranges=ranges)
    np.testing.assert_allclose(jnp.abs(y).max(), abs(end), rtol=0.02, atol=1e-30)
    assert all(
        jnp.isfinite(g) & (g != 0) for g in jax.tree.leaves(jax.grad(loss)(ranges))
    )
    before, tx = loss(ranges), optax.adam(0.5)
    state = tx.init(ranges)
    step = jax.jit(lambda r, s: tx.update(jax.grad(loss)(r), s, r))
    for _ in range(100):
        updates, state = step(ranges, state)
        ranges = optax.apply_updates(ranges, updates)
    assert loss(ranges) < 0.2 * before
    fixed = jopt.fake_quantize(dot, None, calibration=ranges)
    np.testing.assert_array_equal(fixed(params, x), qat(params, x, ranges=ranges))


def test_a_site_that_saw_only_zeros_stays_float_and_is_listed():
    def apply(params, x, y):
        return x @ params["seen"] + y @ params["zeros"]

    params = {"seen": normal(4, 4), "zeros": normal(4, 4)}
    x, y = normal(2, 4), normal(2, 4)
    calibration = jopt.calibrate(apply, params, [(x, 0 * y)])
    assert calibration.unreached == ("zeros",)
    assert "never ran, or saw only zeros, and stay float: zeros" in str(calibration)
    run = jopt.fake_quantize(apply, None, calibration=calibration)
    np.testing.assert_allclose(run(params, 0 * x, y), y @ params["zeros"], rtol=1e-6)


def test_an_index_that_saw_only_zeros_is_clipped_to_zero():
    """And is not rounded to whole numbers, as a scale of one would."""
    params, x = {"w": jnp.eye(3)}, normal(5, 3).at[:, 1].set(0)
    columns = jopt.QuantSpec(FORMATS.int8, axis=-1)
    calibration = jopt.calibrate(dot, params, [x], activations=columns)
    run = jopt.fake_quantize(dot, None, calibration=calibration)
    y = run(params, x.at[:, 1].set(3.3))
    np.testing.assert_allclose(y, x, atol=0.02)


# Nothing found.


def _inside(params, x):
    @jax.custom_vjp
    def times(x, w):
        return x @ w

    times.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    return times(x, params["w"])


NOTHING = {
    "no product": (lambda params, x: x + params["w"], r"'w': used by add"),
    "custom_vjp": (_inside, r"'w': dot_general: inside.*custom_vjp"),
}


@pytest.mark.parametrize("apply, why", NOTHING.values(), ids=NOTHING)
def test_nothing_found_is_an_error(apply, why):
    params, x = {"w": normal(4, 4)}, normal(4, 4)
    table = jopt.sites(apply, params, x)
    weights = rf"spec must have at least one leaf.*{why}.*print\(jopt\.sites"
    inputs = rf"activations must have at least one site.*{why}.*pass None as"
    wanted = [
        (weights, lambda: jopt.fake_quantize(apply, INT8)(params, x)),
        (weights, lambda: jopt.quantize(params, INT8, sites=table)),
        (weights, lambda: jopt.calibrate(apply, params, [x], activations=None)),
        (inputs, lambda: jopt.fake_quantize(apply, None, activations=INT8)(params, x)),
        (inputs, lambda: jopt.execute(apply, activations=INT8)(params, x)),
        (inputs, lambda: jopt.calibrate(apply, params, [x])),
    ]
    if apply is _inside:  # a leaf is rounded before what cannot be entered
        assert isinstance(jopt.quantize(params, INT8, sites=table)["w"], Packed)
        wanted = wanted[3:]
    for error, run in wanted:
        with pytest.raises(ValueError, match=error) as caught:
            run()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    if apply is not _inside:
        with pytest.raises(ValueError, match=inputs):
            jopt.execute(apply, activations={".*": INT8})(params, x)


def test_nothing_asked_for_is_none():
    params, x = {"w": normal(4, 4)}, normal(4, 4)
    apply = NOTHING["no product"][0]
    want = apply(params, x)
    np.testing.assert_array_equal(jopt.fake_quantize(apply, None)(params, x), want)
    np.testing.assert_array_equal(jopt.execute(apply)(params, x), want)
    assert jopt.quantize({}, INT8) == {}
    calibration = jopt.calibrate(apply, params, [x], spec=None, activations=None)
    assert not calibration.activations


def test_weights_that_are_packed_or_computed_are_found():
    params, x = {"w": normal(4, 4)}, normal(4, 4)
    packed = jopt.quantize(params, INT8, sites=jopt.sites(dot, params, x))
    assert jopt.calibrate(dot, packed, [x]).activations
    assert jopt.quantize(packed, INT8, sites=jopt.sites(dot, params, x)) == packed
    model = zoo.ZOO["weight_norm"]()
    assert jopt.calibrate(model.apply, model.params, [model.inputs]).activations


def test_many_reasons_are_shortened():
    params = {f"a_very_long_name_{i}": normal(4) for i in range(50)}
    apply = lambda params, x: sum(params.values(), x)  # noqa: E731
    with pytest.raises(ValueError, match="and 47 more") as caught:
        jopt.fake_quantize(apply, INT8)(params, normal(4))
    assert len(str(caught.value)) < 500


# Rules that do nothing.


def _biased(params, x):
    return x @ params["w"] + params["b"][None]


def test_rules_for_what_is_left_alone_are_errors():
    params, x = {"w": normal(4, 4), "b": normal(4)}, normal(2, 4)
    table = jopt.sites(_biased, params, x)
    used = r"got 'b' for 'b' \(used by [a-z_]+\), left alone by default; choose with"
    vector = r"got 'b' for 'b' \(of shape \(4,\), without two axes"
    rules = {"b": INT8, "w": INT4}
    tx = jopt.quantize_weights(optax.sgd(0.1), rules)
    for error, run in (
        (used, lambda: jopt.fake_quantize(_biased, rules)(params, x)),
        (used, lambda: jopt.quantize(params, rules, sites=table)),
        (used, lambda: jopt.calibrate(_biased, params, [x], spec=rules)),
        (vector, lambda: jopt.quantize(params, rules)),
        (vector, lambda: tx.init(params)),
    ):
        with pytest.raises(ValueError, match=error):
            run()
    for fine in ({".*": INT8}, {"b": None, ".*": INT8}, [("w", INT4), (".*", INT8)]):
        jopt.quantize(params, fine)
        jopt.fake_quantize(_biased, fine)(params, x)
    chosen = jopt.quantize(params, rules, select=jopt.matching("b"))
    assert isinstance(chosen["b"], Packed)
    assert not isinstance(chosen["w"], Packed)
    whole = {"n": jnp.arange(4).reshape(2, 2), "w": params["w"]}
    with pytest.raises(ValueError, match=r"got 'n' for 'n' \(int32\)"):
        jopt.quantize(whole, {"n": INT8, "w": INT8})


# Groups and sizes.


@pytest.mark.parametrize(
    "spec", [jopt.QuantSpec(FORMATS.int8, group_size=2), jopt.QuantSpec(FORMATS.mxfp8)]
)
@pytest.mark.parametrize(
    "rules", [lambda s: s, lambda s: {"w": s}, lambda s: [("w", s)]]
)
def test_given_ranges_have_no_groups(spec, rules):
    calibration = jopt.calibrate(dot, {"w": normal(6, 3)}, [normal(5, 6)])
    for options in (
        {"ranges": "learned"},
        {"ranges": "pact"},
        {"calibration": calibration},
    ):
        with pytest.raises(ValueError, match="activations must have no groups"):
            jopt.fake_quantize(dot, None, activations=rules(spec), **options)


@pytest.mark.parametrize("spec", [INT8, UINT8], ids=repr)
def test_learned_ranges_per_index(spec):
    """Each starts where it would start alone."""
    params, x = {"w": normal(6, 3)}, normal(5, 6) * jnp.arange(1.0, 7.0)[None]
    spec = dataclasses.replace(spec, axis=-1)
    qat, init_ranges = jopt.fake_quantize(dot, None, activations=spec, ranges="learned")
    ranges = init_ranges(params, x)
    assert ranges.activations["w"][0].high.shape == (1, 6)
    if spec.symmetric:
        high = np.abs(x).max(0)
        start = np.minimum(high, 2 * np.abs(x).mean(0) * np.sqrt(127))
        np.testing.assert_allclose(ranges.activations["w"][0].high[0], start, rtol=1e-6)
    error = jnp.abs(qat(params, x, ranges=ranges) - dot(params, x)).max()
    assert 0 < error < 0.2
    grad = jax.grad(lambda r: qat(params, x, ranges=r).sum())(ranges)
    assert all(jnp.all(g != 0) for g in jax.tree.leaves(grad))


def test_ranges_per_index_belong_to_one_size():
    params, x = {"w": normal(6, 3)}, normal(5, 6)
    rows = jopt.QuantSpec(FORMATS.int8, axis=0)
    calibration = jopt.calibrate(dot, params, [x], activations=rows)
    for run in (
        jopt.fake_quantize(dot, None, calibration=calibration),
        jopt.execute(dot, activations=calibration),
    ):
        with pytest.raises(
            ValueError, match=r"\(5, 1\) for the input of 'w'.*\(7, 6\)"
        ):
            run(params, normal(7, 6))
    with pytest.raises(ValueError, match="batches must give statistics of one shape"):
        jopt.calibrate(dot, params, [x, x[:3]], activations=rows)


def test_ranges_are_float32_where_float64_is_on():
    def apply(params, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ params["w"], lambda: x * 2)

    found = [
        jopt.observers.absmax(),
        jopt.observers.moving_average(),
        jopt.observers.percentile(),
        jopt.observers.importance_weighted(),
    ]
    with jax.enable_x64(True):
        params = {"w": jnp.eye(3, dtype=jnp.float32)}
        x = jnp.ones((3, 3), jnp.float32)
        for observer in found:
            calibration = jopt.calibrate(apply, params, [x, -x], observer=observer)
            (leaf,) = jax.tree.leaves(calibration)
            assert leaf == 1 and leaf.dtype == jnp.float32
        qat, init_ranges = jopt.fake_quantize(
            apply, INT8, activations=INT8, ranges="learned"
        )
        ranges = init_ranges(params, x)
        assert {r.dtype for r in jax.tree.leaves(ranges)} == {jnp.dtype("float32")}
        assert qat(params, x, ranges=ranges).dtype == jnp.float32


# Keywords that the function has too.


def test_step_and_ranges_of_the_function_itself():
    def apply(params, x, *, step=0, ranges=1.0):
        return (x @ params["w"]) * ranges + step

    params, x = {"w": normal(6, 3)}, normal(5, 6)
    y = jopt.fake_quantize(dot, INT8)(params, x)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    qat = jopt.fake_quantize(apply, INT8)
    close(qat(params, x, step=3, ranges=2.0), 2 * y + 3)
    late = jopt.fake_quantize(apply, INT8, begin_step=2)
    close(late(params, x, step=2, ranges=2.0), 2 * y + 2)
    close(late(params, x, step=1), dot(params, x) + 1)
    positional = lambda params, x, step: x @ params["w"] + step  # noqa: E731
    late = jopt.fake_quantize(positional, INT8, begin_step=2)
    close(late(params, x, 5, step=1), dot(params, x) + 5)
    with pytest.raises(ValueError, match="apply with an argument `ranges` of its own"):
        jopt.fake_quantize(apply, INT8, ranges="learned")
    qat = jopt.fake_quantize(dot, INT8)
    with pytest.raises(ValueError, match="step must be left out where neither begin_"):
        qat(params, x, step=3)
    with pytest.raises(ValueError, match="ranges must be left out where neither range"):
        qat(params, x, ranges=3)
    close(qat(params, x, step=None), y)


# One sentence for what is no argument.


def test_arguments_of_a_wrong_kind():
    params, x = {"w": normal(6, 3)}, normal(5, 6)
    kinds = {
        "calibration": dict(calibration=INT8),
        "begin_step": dict(begin_step=-1),
        "ranges='pact' must have activations": dict(ranges="pact"),
    }
    for name, options in kinds.items():
        with pytest.raises((TypeError, ValueError), match=name):
            jopt.fake_quantize(dot, INT8, **options)
    with pytest.raises(ValueError, match="must have spec or activations to learn"):
        jopt.fake_quantize(dot, None, ranges="learned")
    for begin_step in (-1, 1.5, True, "2", jnp.arange(2)):
        with pytest.raises(ValueError, match="begin_step must be a count of steps"):
            jopt.fake_quantize(dot, INT8, begin_step=begin_step)
    late = jopt.fake_quantize(dot, INT8, begin_step=2)
    for step in (jnp.arange(2), "2", 1.5, True, [1]):
        with pytest.raises(ValueError, match="step must be a count of steps"):
            late(params, x, step=step)
    late(params, x, step=np.int64(3))
    qat, _ = jopt.fake_quantize(dot, INT8, activations=INT8, ranges="learned")
    with pytest.raises(
        TypeError, match=r"ranges must be a jopt\.Calibration, got a dict"
    ):
        qat(params, x, ranges={"w": 1.0})
    with pytest.raises(
        TypeError, match=r"spec must be a jopt\.QuantSpec for a bare arr"
    ):
        jopt.fake_quantize(x, {"a": INT8})
    for observer in (jopt.observers.absmax, jopt.statistics.absmax(), "absmax"):
        with pytest.raises(
            TypeError, match=r"observer must be one that jopt\.observers"
        ):
            jopt.calibrate(dot, params, [x], observer=observer)
    for batches in (5, {"x": x}):
        with pytest.raises(TypeError, match="batches must be an iterable"):
            jopt.calibrate(dot, params, batches)
    with pytest.raises(TypeError, match="got a list of 1; pass tuple"):
        jopt.calibrate(dot, params, [[x]])
    for p in ("a", None, [1]):
        with pytest.raises(ValueError, match=r"p must be in \(0, 100\], got"):
            jopt.observers.percentile(p)
