"""Batches that a model writes: its own distribution, and as good as real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt

SIZE = 6


def bigram(params, tokens):
    return params["next"][tokens]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def table():
    return {"next": jnp.asarray(draw(SIZE, SIZE))}


def test_transitions_are_drawn_as_the_model_says_after_greedy_ones(table):
    options = {"shape": (64, 40), "num_batches": 2, "num_greedy": 3}
    found = jopt.sample_tokens(bigram, table, jax.random.key(0), **options)
    again = jopt.sample_tokens(bigram, table, jax.random.key(0), **options)
    np.testing.assert_array_equal(found, again)
    assert np.any(found[0] != found[1]) and found[0].dtype == jnp.int32
    rows = np.concatenate(found)
    assert len(np.unique(rows[:, 0])) == SIZE
    best = np.argmax(table["next"], axis=1)
    for t in range(1, 4):
        np.testing.assert_array_equal(rows[:, t], best[rows[:, t - 1]])
    counts = np.zeros((SIZE, SIZE))
    np.add.at(counts, (rows[:, 3:-1].ravel(), rows[:, 4:].ravel()), 1)
    shares = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(shares, jax.nn.softmax(table["next"], axis=1), atol=0.05)


def test_low_temperatures_draw_the_likeliest(table):
    rows = jopt.sample_tokens(
        bigram,
        table,
        jax.random.key(1),
        shape=(8, 20),
        num_batches=1,
        num_greedy=0,
        temperature=1e-3,
    )[0]
    best = np.argmax(table["next"], axis=1)
    np.testing.assert_array_equal(rows[:, 1:], best[rows[:, :-1]])


def language_model(params, tokens):
    h = params["embed"][tokens]
    places = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)[None, :, None]
    h = h + jnp.cumsum(h, axis=1) / places  # what came before
    return jnp.tanh(h @ params["up"]) @ params["down"]


def test_gptq_needs_no_data_where_the_model_writes_it():
    """Half of what rounding loses on real rows goes, nearly as with real rows."""
    params = {"embed": draw(20, 16) * np.geomspace(3, 0.1, 16, dtype=np.float32)}
    params |= {"up": draw(16, 32, seed=1), "down": draw(32, 20, seed=2)}
    spec = jopt.QuantSpec(jopt.formats.int3)
    sample = {"shape": (16, 24), "num_batches": 3}
    made = jopt.sample_tokens(language_model, params, jax.random.key(0), **sample)
    real = jopt.sample_tokens(
        language_model, params, jax.random.key(7), num_greedy=0, **sample
    )
    right = language_model(params, real[-1])

    def lost(packed):
        y = language_model(jopt.dequantize(packed), real[-1])
        return float(jnp.sum((y - right) ** 2))

    def run(method, batches):
        return lost(method(language_model, params, batches, spec, progress=False)[0])

    rounded, own = run(jopt.rtn, made), run(jopt.gptq, made)
    assert own < 0.7 * rounded
    assert own < 1.5 * run(jopt.gptq, real[:-1])


def test_wrong_arguments_raise(table):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 'tokens'\)"):
        jopt.sample_tokens(
            lambda p, x: p["next"][x][:, 0], table, key, shape=(2, 3), num_batches=1
        )
    with pytest.raises(ValueError, match=r"above 0, got \(2, 3\), 1, 4 and 0"):
        jopt.sample_tokens(
            bigram, table, key, shape=(2, 3), num_batches=1, temperature=0
        )
    for shape in ((3,), 3, (2, 3.0)):
        with pytest.raises(TypeError, match=r"two integers \(batch, length\), got"):
            jopt.sample_tokens(bigram, table, key, shape=shape, num_batches=1)
    with pytest.raises(TypeError, match="key must be one PRNG key, got 0"):
        jopt.sample_tokens(bigram, table, 0, shape=(2, 3), num_batches=1)


def test_logits_that_are_no_distribution_raise():
    def sample(value, at=slice(None)):
        table = {"next": jnp.zeros((SIZE, SIZE)).at[:, at].set(value)}
        key = jax.random.key(0)
        return jopt.sample_tokens(bigram, table, key, shape=(2, 4), num_batches=1)

    for value in (jnp.nan, jnp.inf, -jnp.inf):
        with pytest.raises(ValueError, match="NaN, infinity or -inf for all in batch"):
            sample(value)
    with pytest.raises(ValueError, match="NaN, infinity or -inf for all in batch"):
        sample(jnp.nan, at=2)
    (rows,) = sample(-jnp.inf, at=2)  # a token that is forbidden
    assert not np.any(rows[:, 1:] == 2)
