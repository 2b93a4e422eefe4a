"""Generation with a cache is the model itself, and with few bits near it as stated."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from experiments import data, generate, models

TEXT = data.descriptions(length=32)
SIZE = models.ModelConfig("gpt", depth=2, width=32, heads=2)
APPLY, PARAMS = models.build(SIZE, TEXT, seed=1)
ROWS = 2
TOKENS = jnp.asarray(TEXT.train["x"][: ROWS * 32].reshape(ROWS, 32))


def caches(name="float32", rows=ROWS, length=32):
    return generate.make_caches(SIZE, (rows, length), *generate.CACHES[name])


@pytest.fixture(scope="module")
def full():
    return jax.jit(APPLY)(PARAMS, TOKENS)


def test_logits_by_characters_are_those_of_the_whole_text(full):
    """One by one, in portions, and in one go: float32 rounding apart, the same."""
    logits, filled = generate.replay(APPLY, PARAMS, TOKENS, caches())
    np.testing.assert_allclose(logits, full, atol=2e-5)
    assert all((c.length == 32).all() for c in filled)
    at_once, _ = jax.jit(APPLY)(PARAMS, TOKENS, caches())
    np.testing.assert_allclose(at_once, full, atol=2e-5)
    held, parts = caches(), []
    for start in (0, 16):
        part, held = jax.jit(APPLY)(PARAMS, TOKENS[:, start : start + 16], held)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), full, atol=2e-5)


def test_caches_of_few_bits_stay_within_the_bound(full):
    reference = np.asarray(generate.replay(APPLY, PARAMS, TOKENS, caches())[0])
    errors = {}
    for name in generate.CACHES:
        logits, filled = generate.replay(APPLY, PARAMS, TOKENS, caches(name))
        error = np.abs(np.asarray(logits) - reference)
        errors[name] = float(error.max())
        bound = generate.logit_bound(
            APPLY, PARAMS, TOKENS[:1], jax.tree.map(lambda x: x[:1], filled)
        )
        error = error[0, -1]
        bound = np.asarray(bound)
        assert bound.shape == (TEXT.num_classes,)
        if name == "float32":
            assert not bound.any() and not error.any()
            continue
        assert (error <= bound).all(), name
        # Worst cases add up in a bound; what happens is a few hundredths of it.
        assert (error > bound / 1000).any(), name
    assert errors["int8"] < errors["fp8_e4m3"] < errors["int4"]
    assert errors["int8"] < 0.1 * float(np.std(full))
    assert errors["int4, keys per channel"] < 1.5 * errors["int4"]


def test_a_bound_is_the_sum_of_slopes_times_errors():
    """Against finite differences in each direction of a tiny model."""
    size = models.ModelConfig("gpt", depth=1, width=4, heads=1)
    apply, params = models.build(size, TEXT, seed=0)
    tokens = TOKENS[:1, :3]
    spec = jopt.QuantSpec(jopt.formats.int4)
    empty = generate.make_caches(size, (1, 16), spec, spec)
    _, held = generate.replay(apply, params, tokens, empty)
    bound = generate.logit_bound(apply, params, tokens, held)
    zeros = np.zeros((1, 3, 1, 4), np.float32)
    shape = (2, *zeros.shape)
    unit, step = np.eye(24, dtype=np.float32).reshape(24, *shape), 1e-2

    @jax.jit
    @jax.vmap
    def logits(error):
        disturbed = generate.Disturbed(error[0], error[1], jnp.zeros(1, jnp.int32))
        return apply(params, tokens, [disturbed])[0][0, -1]

    slopes = (logits(step * unit) - logits(-step * unit)) / (2 * step)
    e = np.stack([np.broadcast_to(e, (1, 16, 1, 4)) for e in held[0].error_bounds()])
    expected = np.abs(slopes).T @ e[:, :, :3].reshape(24)
    np.testing.assert_allclose(bound, expected, rtol=1e-2, atol=1e-4)


def test_generation_compiles_once_and_is_the_greedy_continuation():
    prompt = TOKENS[:, :8]
    traces = []

    def counted(params, *inputs):
        traces.append(1)
        return APPLY(params, *inputs)

    def run(temperature, seed=0, name="float32"):
        return generate.generate(
            counted,
            PARAMS,
            prompt,
            caches(name),
            jax.random.key(seed),
            num_tokens=6,
            temperature=temperature,
        )

    tokens, logits, held = run(0.0)
    count = len(traces)
    warm = run(1.0)[0]
    assert len(traces) == count, "it was traced again"
    again, other = run(1.0)[0], run(1.0, seed=1)[0]
    np.testing.assert_array_equal(warm, again)
    assert not np.array_equal(warm, other)
    assert held[0].length.tolist() == [13, 13]
    tokens, logits, text = np.asarray(tokens), np.asarray(logits), np.asarray(prompt)
    for i in range(6):  # the slow way: the whole text each time
        padded = np.pad(text, ((0, 0), (0, 32 - text.shape[1])))
        last = np.asarray(jax.jit(APPLY)(PARAMS, padded))[:, text.shape[1] - 1]
        np.testing.assert_allclose(logits[:, i], last, atol=2e-5)
        np.testing.assert_array_equal(tokens[:, i], last.argmax(-1))
        text = np.concatenate([text, tokens[:, i : i + 1]], 1)


@pytest.mark.exhaustive
def test_the_job(tmp_path, capsys):
    options = {"steps": 3, "width": 32, "depth": 1, "heads": 1, "length": 32}
    options |= {"batch_size": 8, "num_tokens": 8, "rows": 2}
    generate.main(generate.Config(out=tmp_path, **options))
    printed = capsys.readouterr().out
    assert printed.count("The ") >= 2 and "| int8 |" in printed
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert [row["cache"] for row in rows] == list(generate.CACHES)
    assert rows[1]["bits_per_number"] <= 8.5 + 8 * 8 / (2 * 2 * 32 * 32)
    assert all(row["is_within_bound"] for row in rows)
    with pytest.raises(ValueError, match="prompt must be"):
        generate.main(generate.Config(out=tmp_path, prompt="\x00", **options))
    with pytest.raises(ValueError, match="num_tokens must be"):
        generate.main(generate.Config(out=tmp_path, **options | {"num_tokens": 99}))
