"""Learned and fitted rounding: AdaRound and AutoRound on Gram matrices, HQQ on none."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt.arrays.codes import compute_codes, decode
from jopt.arrays.scales import compute_range, compute_scale
from jopt.quantization import learned_rounding
from tests.quantization.by_hand import all_codes, scale_by_hand

F = jopt.formats
ADAM = optax.adam(1e-2)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gram_of(size, seed=1):
    x = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return (x.T @ x).astype(np.float32)


def lost(weights, values, gram):
    d = np.asarray(weights, np.float64) - np.asarray(values)
    return np.sum(d * (gram @ d), axis=0)


def nearest(weights, spec):
    return jopt.dequantize(jopt.quantize(jnp.asarray(weights), spec))


@pytest.mark.parametrize(
    "spec",
    [
        jopt.QuantSpec(F.int4),
        jopt.QuantSpec(F.uint3, symmetric=False, group_size=4),
        jopt.QuantSpec(F.nf4),
        jopt.QuantSpec(F.fp4_e2m1),
    ],
    ids=str,
)
def test_neighbours_enclose_each_weight_on_the_grid(spec):
    w = jnp.asarray(draw(16, 5))
    scale = compute_scale(*compute_range(w, spec), spec)
    below, above = learned_rounding.neighbours(w, scale, spec)
    rounded = nearest(w, spec)
    assert bool(((rounded == below) | (rounded == above)).all())
    inside = (w >= below) & (w <= above)
    ends = below == above
    assert bool((inside | ends).all())
    # On the grid: rounding does not move them.
    for side in (below, above):
        again = jopt.dequantize(jopt.quantize(side, spec, scales=scale))
        np.testing.assert_array_equal(again, side)


def test_adaround_comes_near_the_best_of_all_roundings():
    """All 2^8 roundings of eight inputs are tried, for each output."""
    spec = jopt.QuantSpec(F.int4)
    w, gram = draw(8, 6), gram_of(8)
    scale = compute_scale(*compute_range(jnp.asarray(w), spec), spec)
    found = learned_rounding.learn_up_or_down(
        w, gram, None, scale, spec, optimizer=ADAM, num_steps=1000, strength=4.0
    ).values
    below, above = map(np.asarray, learned_rounding.neighbours(w, scale, spec))
    sides = np.array(list(itertools.product([False, True], repeat=8)))
    every = np.where(sides[:, :, None], above, below)
    best = np.min([lost(w, q, gram) for q in every], axis=0)
    mine, simple = lost(w, found, gram), lost(w, nearest(w, spec), gram)
    assert np.all(mine >= best * (1 - 1e-4))
    assert mine.sum() < 1.5 * best.sum() < simple.sum()


@pytest.mark.parametrize("spec", [jopt.QuantSpec(F.int3), jopt.QuantSpec(F.nf4)])
def test_adaround_with_one_step_is_never_worse_than_rounding(spec):
    w, gram = draw(16, 4), gram_of(16)
    scale = compute_scale(*compute_range(jnp.asarray(w), spec), spec)
    found = learned_rounding.learn_up_or_down(
        w, gram, None, scale, spec, optimizer=ADAM, num_steps=1, strength=4.0
    ).values
    simple = lost(w, nearest(w, spec), gram)
    assert np.all(lost(w, found, gram) <= simple * (1 + 1e-5))


def test_adaround_descends_along_the_gradient_of_its_loss():
    """By finite differences of the published loss, after the warm-up."""
    spec = jopt.QuantSpec(F.int4, scale_dtype=jnp.float32)
    w, gram = draw(5, 3), gram_of(5)
    scale = compute_scale(*compute_range(jnp.asarray(w), spec), spec)
    below, above = (
        np.asarray(x, np.float64) for x in learned_rounding.neighbours(w, scale, spec)
    )
    unit = lost(w, nearest(w, spec), gram)
    seen = []

    def update(slope, state, v=None):
        jax.debug.callback(lambda *x: seen.append([np.asarray(a) for a in x]), v, slope)
        return 0.1 * jnp.ones_like(v), state

    spy = optax.GradientTransformation(lambda v: optax.EmptyState(), update)
    learned_rounding.learn_up_or_down(
        w, gram, None, scale, spec, optimizer=spy, num_steps=4, strength=3.0
    )
    jax.effects_barrier()
    steps = sorted(seen, key=lambda pair: float(pair[0].sum()))
    beta = 2 + 9 * (1 + np.cos(np.pi * (0.5 - 0.2) / 0.8))

    def loss(v):
        h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
        term = np.mean(1 - np.abs(2 * h - 1) ** beta, axis=0)
        q = below + h * (above - below)
        return np.sum(lost(w, q, gram) / unit + 3.0 * term)

    v, slope = (x.astype(np.float64) for x in steps[2])
    for i in np.ndindex(v.shape):
        more, less = v.copy(), v.copy()
        more[i] += 1e-5
        less[i] -= 1e-5
        expected = (loss(more) - loss(less)) / 2e-5
        np.testing.assert_allclose(slope[i], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("format", ["nf4", "mxfp4", "nvfp4", "ternary"])
def test_autoround_takes_every_format_and_no_output_is_worse(format):
    spec = jopt.QuantSpec(getattr(F, format))
    w, gram = draw(32, 4), gram_of(32)
    scale = compute_scale(*compute_range(jnp.asarray(w), spec), spec)
    rate = optax.linear_schedule(1 / 50, 0.0, 50)
    found = learned_rounding.learn_offsets(
        w, gram, None, scale, spec, optimizer=optax.sign_sgd(rate), num_steps=50
    )
    again = decode(compute_codes(found.values, found.scale, spec), found.scale, spec)
    np.testing.assert_array_equal(again, found.values)
    mine, simple = lost(w, found.values, gram), lost(w, nearest(w, spec), gram)
    assert np.all(mine <= simple * (1 + 1e-5))
    assert mine.sum() < 0.9 * simple.sum()


@pytest.mark.parametrize(
    "spec",
    [
        jopt.QuantSpec(F.int3, scale_dtype=jnp.float32),
        jopt.QuantSpec(F.uint4, symmetric=False, group_size=8),
    ],
    ids=str,
)
def test_autoround_lies_on_its_grid_and_keeps_the_best_it_met(spec):
    w, gram = draw(16, 4), gram_of(16)
    scale = compute_scale(*compute_range(jnp.asarray(w), spec), spec)
    errors = []
    for steps in (1, 20, 200):
        rate = optax.linear_schedule(1 / steps, 0.0, steps)
        found = learned_rounding.learn_offsets(
            w, gram, None, scale, spec, optimizer=optax.sign_sgd(rate), num_steps=steps
        )
        again = jopt.quantize(found.values, spec, scales=found.scale)
        np.testing.assert_allclose(jopt.dequantize(again), found.values, rtol=1e-6)
        step = np.asarray(found.scale.scale, np.float32)
        assert np.all(step <= np.asarray(scale.scale, np.float32))
        errors.append(lost(w, found.values, gram).sum())
    simple = lost(w, nearest(w, spec), gram).sum()
    assert errors[0] <= simple * (1 + 1e-5)
    assert errors[2] < simple


def test_autoround_descends_along_the_gradient_of_the_rounded_loss():
    """One small step moves rounding offsets against 2 s G (Q - W)."""
    spec = jopt.QuantSpec(F.int4, scale_dtype=jnp.float32)
    w, gram = draw(6, 3), gram_of(6)
    scale = compute_scale(*compute_range(jnp.asarray(w), spec), spec)
    seen = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), updates["offset"])
        return jax.tree.map(jnp.zeros_like, updates), state

    spy = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    learned_rounding.learn_offsets(
        w, gram, None, scale, spec, optimizer=spy, num_steps=1
    )
    jax.effects_barrier()
    d = np.asarray(nearest(w, spec)) - w
    expected = 2 * np.asarray(scale.scale) * (gram @ d)
    moves = np.abs(w) < np.abs(w).max(axis=0)  # the largest has no second neighbour
    np.testing.assert_allclose(seen[0][moves], expected[moves], rtol=1e-3, atol=1e-2)


def hqq_by_hand(w, spec, p, turns):
    """The same turns on one group of one output, in float64."""
    scale, zero_point = scale_by_hand(w[:, None], spec)
    scale, zero_point = float(scale[0]), float(zero_point[0])
    low = 0 if not spec.symmetric else -(2 ** (spec.format.bits - 1) - 1)
    high = 2**spec.format.bits - 1 if not spec.symmetric else -low

    def levels(scale, zero_point):
        return np.clip(np.rint(w / scale) + zero_point, low, high) - zero_point

    def objective(scale, zero_point):
        return np.sum(np.abs(w - levels(scale, zero_point) * scale) ** p)

    best, least, beta = (scale, zero_point), objective(scale, zero_point), 10.0
    for _ in range(turns):
        own = levels(scale, zero_point)
        error = (w - own * scale) / scale
        size = np.abs(error)
        pull = np.where(size > 0, size, 1) ** (p - 1) / beta
        target = w - np.sign(error) * np.maximum(size - pull, 0) * scale
        scale = np.sum(own * target) / np.sum(own * own)
        if not spec.symmetric:
            fitted = np.mean(own + zero_point - target / scale)
            zero_point = np.clip(np.rint(fitted), low, high)
        beta *= 1.01
        now = objective(scale, zero_point)
        if now < least:
            best, least = (scale, zero_point), now
    return best


@pytest.mark.parametrize(
    "spec",
    [
        jopt.QuantSpec(F.int3, scale_dtype=jnp.float32),
        jopt.QuantSpec(F.uint4, symmetric=False, scale_dtype=jnp.float32),
    ],
    ids=str,
)
def test_hqq_takes_the_turns_of_the_naive_version(spec):
    w = np.random.default_rng(0).standard_t(3, size=(40, 6)).astype(np.float32)
    found = jopt.scale_fits.half_quadratic(num_steps=4)(jnp.asarray(w), spec)
    for i in range(w.shape[1]):
        scale, zero_point = hqq_by_hand(w[:, i].astype(np.float64), spec, 0.7, 4)
        np.testing.assert_allclose(found.scale[0, i], scale, rtol=1e-4)
        if found.zero_point is not None:
            assert int(found.zero_point[0, i]) == zero_point


@pytest.mark.parametrize(
    "spec",
    [
        jopt.QuantSpec(F.int2, group_size=16),
        jopt.QuantSpec(F.int4),
        jopt.QuantSpec(F.uint3, symmetric=False, group_size=8),
        jopt.QuantSpec(F.int4, symmetric=False, axis=()),
    ],
    ids=str,
)
def test_hqq_is_never_worse_in_its_norm_and_better_with_outliers(spec):
    w = np.random.default_rng(1).standard_t(2, size=(3, 32, 8)).astype(np.float32)
    params = {"layers": jnp.asarray(w), "bias": jnp.ones(4)}
    packed = jopt.hqq(params, spec, stacked_axes={"layers": 0})
    simple = jopt.quantize(params, all_codes(spec), stacked_axes={"layers": 0})
    assert packed["bias"] is params["bias"]
    assert packed["layers"].spec == simple["layers"].spec
    mine, theirs = (
        np.sum(np.abs(w - np.asarray(q["layers"].to_array())) ** 0.7)
        for q in (packed, simple)
    )
    assert mine < theirs


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@pytest.mark.parametrize("method", [jopt.adaround, jopt.autoround])
def test_whole_models_lose_less_than_by_rounding(method):
    params = {"up": draw(16, 12), "down": draw(12, 4, seed=1)}
    x = draw(64, 16, seed=2) @ draw(16, 16, seed=3)
    half = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), params)
    spec = jopt.QuantSpec(F.int3)
    packed, report = method(mlp, half, [x], spec, progress=False)
    _, simple = jopt.rtn(mlp, half, [x], spec, progress=False)
    assert report["up"].error < simple["up"].error
    assert packed["up"].dtype == jnp.bfloat16
    assert [row.format for row in report] == ["int3", "int3"]


def test_wrong_arguments_raise():
    params, x = {"up": draw(4, 4), "down": draw(4, 4)}, draw(8, 4)
    spec = jopt.QuantSpec(F.int4)
    for match, call in {
        "num_steps must be an integer of at least 1, got 0": lambda: jopt.adaround(
            mlp, params, [x], spec, num_steps=0
        ),
        "strength must be at least 0 and finite, got -1": lambda: jopt.adaround(
            mlp, params, [x], spec, strength=-1.0
        ),
        "free to choose scales, got mxfp4": lambda: jopt.hqq(
            {"w": draw(32, 4)}, jopt.QuantSpec(F.mxfp4)
        ),
        r"norm must be in \(0, 1\], got 2": lambda: jopt.hqq(params, spec, norm=2),
        "num_steps must be an integer of at least 1, got 1.5": lambda: jopt.hqq(
            params, spec, num_steps=1.5
        ),
        "outputs": lambda: jopt.autoround(
            mlp, params, [x], jopt.QuantSpec(F.int4, axis=())
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
