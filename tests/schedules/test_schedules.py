"""Every schedule against its closed form, on Python ints and under jit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jopt
from jopt import schedules

STEPS = np.arange(0, 130)


def curve(schedule):
    """Evaluate eagerly and under jit, which must agree."""
    traced = np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(STEPS)))
    for t in (0, 7, 50, 129):
        np.testing.assert_allclose(float(schedule(t)), traced[t], rtol=1e-6, atol=1e-7)
    return traced


@pytest.mark.parametrize(
    ("make", "power"), [(schedules.linear_sparsity, 1), (schedules.cubic_sparsity, 3)]
)
@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.9), (0.25, 0.8), (0.9, 0.5)])
def test_ramps_follow_their_equation(make, power, start, stop):
    left = np.clip(1 - (STEPS - 20) / 80, 0, 1)
    expected = stop + (start - stop) * left**power
    schedule = make(start, stop, begin_step=20, end_step=100)
    np.testing.assert_allclose(curve(schedule), expected, atol=1e-6)


def test_ends_are_right_to_the_six_decimals_that_count():
    schedule = schedules.cubic_sparsity(0.1, 0.9, begin_step=5, end_step=50)
    for t, expected in ((0, 0.1), (5, 0.1), (50, 0.9), (10**6, 0.9)):
        assert round(float(schedule(t)) * 1e6) == round(expected * 1e6)


def test_one_shot_and_constant():
    expected = np.where(STEPS >= 30, 0.5, 0.0)
    np.testing.assert_array_equal(
        curve(schedules.one_shot_sparsity(0.5, step=30)), expected
    )
    assert schedules.one_shot_sparsity(0.5, step=0)(0) == 0.5
    np.testing.assert_array_equal(curve(schedules.constant_sparsity(0.25)), 0.25)


COOLDOWNS = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "1-sqrt": lambda u: 1 - math.sqrt(u),
}


@pytest.mark.parametrize("cooldown", COOLDOWNS)
@pytest.mark.parametrize("warmup", [0, 10])
def test_warmup_stable_decay(cooldown, warmup):
    schedule = schedules.warmup_stable_decay(
        2.0,
        warmup_steps=warmup,
        stable_steps=60,
        decay_steps=30,
        init_value=0.5,
        end_value=0.2,
        cooldown=cooldown,
    )

    def expected(t):
        if t < warmup:
            return 0.5 + 1.5 * t / warmup
        done = min(max((t - warmup - 60) / 30, 0), 1)
        return 0.2 + 1.8 * COOLDOWNS[cooldown](done)

    np.testing.assert_allclose(curve(schedule), [expected(t) for t in STEPS], atol=1e-6)


@given(
    bits=st.dictionaries(st.integers(1, 120), st.integers(2, 16), max_size=5),
    first=st.integers(2, 16),
)
def test_stepwise_bits(bits, first):
    bits = {**bits, 0: first}
    schedule = schedules.stepwise_bits(bits)
    for t in (0, 1, 60, 119, 125):
        assert int(schedule(t)) == bits[max(s for s in bits if s <= t)]


def test_gradual_bits_visits_every_width_once_in_order():
    values = curve(schedules.gradual_bits(8, 3, begin_step=10, end_step=110))
    assert list(dict.fromkeys(values.tolist())) == [8, 7, 6, 5, 4, 3]
    assert values[10] == 8 and values[110] == 3


def test_temperature_moves_by_a_constant_factor():
    values = curve(schedules.temperature(8.0, 0.5, begin_step=10, end_step=100))
    ratios = values[11:101] / values[10:100]
    np.testing.assert_allclose(ratios, (0.5 / 8) ** (1 / 90), rtol=1e-5)
    assert values[5] == 8.0
    np.testing.assert_allclose(values[100:], 0.5)
    warming = curve(schedules.temperature(1.0, 4.0, end_step=50))
    np.testing.assert_allclose(warming[50:], 4.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: schedules.cubic_sparsity(0, 90, end_step=5),
            "stop must be a fraction",
        ),
        (
            lambda: schedules.cubic_sparsity(-0.1, 1, end_step=5),
            "start must be a fraction",
        ),
        (lambda: schedules.linear_sparsity(0, 1, begin_step=5, end_step=5), "end_step"),
        (
            lambda: schedules.linear_sparsity(0, 1, begin_step=-1, end_step=5),
            "begin_step",
        ),
        (
            lambda: schedules.one_shot_sparsity(1.5, step=3),
            "sparsity must be a fraction",
        ),
        (lambda: schedules.one_shot_sparsity(0.5, step=-3), "step must be"),
        (
            lambda: schedules.constant_sparsity(float("nan")),
            "sparsity must be a fraction",
        ),
        (
            lambda: schedules.warmup_stable_decay(1, stable_steps=1, decay_steps=0),
            "decay_steps must be",
        ),
        (
            lambda: schedules.warmup_stable_decay(
                1, stable_steps=1, decay_steps=1, cooldown="sqrt"
            ),
            "cooldown must be one of",
        ),
        (lambda: schedules.stepwise_bits({5: 4}), "from step 0"),
        (lambda: schedules.stepwise_bits({0: 1}), r"bits_from_step\[0\]"),
        (lambda: schedules.gradual_bits(8, 4.5, end_step=4), "stop must be a whole"),
        (lambda: schedules.gradual_bits(8, 4, begin_step=4, end_step=4), "in order"),
        (lambda: schedules.temperature(0.0, 1.0, end_step=4), "start must be positive"),
    ],
)
def test_wrong_arguments_raise_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_schedules_drive_optax():
    """They are plain schedules: Optax takes them as a learning rate."""
    schedule = schedules.warmup_stable_decay(0.1, stable_steps=2, decay_steps=2)
    tx = optax.sgd(schedule)
    params = {"w": jnp.ones(2)}
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1)
    assert jopt.schedules is schedules


def test_cosine_drop_is_the_published_curve():
    schedule = jopt.schedules.cosine_drop(0.3, 10_000)
    for t in (0, 1, 2_500, 9_999, 10_000, 20_000):
        expected = 0.15 * (1 + np.cos(np.pi * min(t, 10_000) / 10_000))
        np.testing.assert_allclose(schedule(t), expected, atol=1e-6)
    with pytest.raises(ValueError, match="fraction must be in"):
        jopt.schedules.cosine_drop(1.5, 10)
    with pytest.raises(ValueError, match="num_steps must be"):
        jopt.schedules.cosine_drop(0.5, 0)


def test_geometric_sparsity_prunes_a_part_of_what_is_left():
    schedule = jopt.schedules.geometric_sparsity(
        0.2, every_steps=100, begin_step=50, stop=0.6
    )
    for t in range(0, 1000, 50):
        rounds = (t - 50) // 100 + 1 if t >= 50 else 0
        expected = min(1 - 0.8**rounds, 0.6)
        np.testing.assert_allclose(schedule(t), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(schedule)(t), expected, rtol=1e-6)
