"""SparseGPT and Wanda on one matrix, against NumPy in float64 and against optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt.pruning.sparsegpt import sparsegpt_matrix
from jopt.pruning.wanda import wanda_matrix


def inputs_of(size, seed=0):
    """Correlated inputs and weights, as [inputs, outputs]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * size, size)) @ rng.normal(size=(size, size))
    return x / np.sqrt(size), rng


def reference(weights, gram, *, sparsity=None, group=None, block=128, damping=0.01):
    """The published algorithm in three factorisations; the count is exact so far."""
    w, h = weights.copy(), gram.copy()
    size, outputs = w.shape
    dead = np.diag(h) == 0
    w[dead] = 0
    h[np.diag_indices(size)] += np.where(dead, 1, damping * np.mean(np.diag(gram)))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    mask, done = np.ones(w.shape, bool), 0
    for begin in range(0, size, block):
        end = min(begin + block, size)
        if group is None:
            scale = np.diag(upper)[begin:end, None]
            scores = ((w[begin:end] / scale) ** 2).ravel()
            kept = end * outputs - round(sparsity * end * outputs) - done
            done += kept
            chosen = np.zeros(scores.size, bool)
            chosen[np.argsort(-scores, kind="stable")[:kept]] = True
            mask[begin:end] = chosen.reshape(end - begin, outputs)
        for i in range(begin, end):
            if group is not None and i % group[1] == 0:
                n, m = group
                scale = np.diag(upper)[i : i + m, None]
                order = np.argsort(-((w[i : i + m] / scale) ** 2), 0, kind="stable")
                np.put_along_axis(mask[i : i + m], order[n:], False, 0)
            error = np.where(mask[i], 0, w[i]) / upper[i, i]
            w[i:] -= np.outer(upper[i, i:], error)
    return np.where(mask, w, 0), mask


@pytest.mark.parametrize("group", [None, (2, 4), (1, 3)])
@pytest.mark.parametrize(("size", "outputs", "block"), [(48, 7, 16), (156, 20, 128)])
def test_equals_the_published_algorithm(size, outputs, block, group):
    x, rng = inputs_of(size)
    x[:, 5] = 0  # an input that is always 0
    gram, weights = x.T @ x, rng.normal(size=(size, outputs))
    options = {"sparsity": 0.6} if group is None else {"pattern": jopt.NM(*group)}
    found, mask = sparsegpt_matrix(
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(gram, jnp.float32),
        block_size=block,
        **options,
    )
    if group == (1, 3):  # blocks are a multiple of the group
        block = 3 * -(-block // 3)
    right, right_mask = reference(weights, gram, sparsity=0.6, group=group, block=block)
    np.testing.assert_array_equal(mask, right_mask)
    np.testing.assert_allclose(found, right, atol=1e-4)
    assert not np.any(np.asarray(found)[~right_mask])


def test_the_count_is_exact_whatever_the_blocks():
    x, rng = inputs_of(100)
    gram = jnp.asarray(x.T @ x, jnp.float32)
    weights = jnp.asarray(rng.normal(size=(100, 7)), jnp.float32)
    for sparsity in (0.0, 0.333, 0.5, 0.87, 1.0):
        for block in (16, 33, 128):
            _, mask = sparsegpt_matrix(
                weights, gram, sparsity=sparsity, block_size=block
            )
            assert int(mask.sum()) == 700 - round(sparsity * 700)
    traced = jax.jit(lambda s: sparsegpt_matrix(weights, gram, sparsity=s)[1])
    _, mask = sparsegpt_matrix(weights, gram, sparsity=0.5)
    np.testing.assert_array_equal(traced(0.5), mask)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_what_stays_makes_up_for_what_goes(noise):
    """Half of the error of the mask alone and of magnitude; not below the optimum."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(256, 8)) @ rng.normal(size=(8, 64))
    x = shared + noise * rng.normal(size=(256, 64))
    weights = rng.normal(size=(64, 8))
    found, mask = sparsegpt_matrix(
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(x.T @ x, jnp.float32),
        sparsity=0.5,
        damping=1e-4,
    )
    found, mask = np.asarray(found, np.float64), np.asarray(mask)

    def error(w):
        return np.sum((x @ (w - weights)) ** 2)

    magnitude = np.abs(weights) >= np.median(np.abs(weights))
    assert error(found) < error(np.where(mask, weights, 0)) / 2
    assert error(found) < error(np.where(magnitude, weights, 0)) / 2
    best = np.zeros_like(weights)
    for j in range(8):  # least squares on the weights that stay
        kept = mask[:, j]
        solution = np.linalg.lstsq(x[:, kept], x @ weights[:, j], rcond=None)[0]
        best[kept, j] = solution
    assert error(best) <= error(found)


def test_low_precision_weights_keep_their_dtype():
    x, rng = inputs_of(32)
    weights = jnp.asarray(rng.normal(size=(32, 4)), jnp.bfloat16)
    found, _ = sparsegpt_matrix(weights, jnp.asarray(x.T @ x), sparsity=0.5)
    assert found.dtype == jnp.bfloat16
    found, _ = wanda_matrix(weights, jnp.ones(32), sparsity=0.5)
    assert found.dtype == jnp.bfloat16


def test_too_few_rows_without_damping_are_no_gram_matrix():
    x, rng = inputs_of(32)
    few = x[:8]
    weights = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    gram = jnp.asarray(few.T @ few, jnp.float32)
    found, _ = sparsegpt_matrix(weights, gram, sparsity=0.5, damping=0.0)
    assert bool(jnp.isnan(found).any())
    found, _ = sparsegpt_matrix(weights, gram, sparsity=0.5)
    assert bool(jnp.isfinite(found).all())
    with pytest.raises(ValueError, match="damping must make"):
        jopt.sparsegpt(
            lambda p, x: x @ p["w"],
            {"w": weights},
            [jnp.asarray(few, jnp.float32)],
            sparsity=0.5,
            damping=0.0,
        )


def test_wanda_ranks_within_each_output():
    rng = np.random.default_rng(0)
    weights, squares = rng.normal(size=(40, 90)), rng.random(40)
    found, mask = wanda_matrix(
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(squares, jnp.float32),
        sparsity=0.7,
    )
    scores = np.abs(weights) * np.sqrt(squares)[:, None]
    kept = np.argsort(-scores, axis=0, kind="stable")[: 40 - 28]
    expected = np.zeros((40, 90), bool)
    np.put_along_axis(expected, kept, True, 0)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(
        found, np.where(expected, weights, 0).astype(np.float32)
    )


@pytest.mark.parametrize("pattern", [jopt.NM(2, 4), jopt.NM(2, 4, axis=-1)])
def test_n_of_m_runs_along_the_inputs(pattern):
    weights = jax.random.normal(jax.random.key(0), (8, 6))
    for _, mask in (
        wanda_matrix(weights, jnp.ones(8), pattern=pattern),
        sparsegpt_matrix(weights, jnp.eye(8), pattern=pattern),
    ):
        assert (np.asarray(mask).reshape(2, 4, 6).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "sparsity must be given"),
        ({"sparsity": 0.5, "pattern": jopt.NM(2, 4)}, "sparsity must be None"),
        ({"sparsity": 0.5, "pattern": jopt.Channel()}, "pattern must be"),
        ({"sparsity": 0.5, "block_size": 0}, "block_size must be"),
        ({"sparsity": 0.5, "damping": -1.0}, "damping must be"),
        ({"sparsity": 1.5}, "sparsity must be in"),
        ({"pattern": jopt.NM(2, 5)}, "m=5"),
    ],
)
def test_wrong_arguments_raise(options, match):
    with pytest.raises(ValueError, match=match):
        sparsegpt_matrix(jnp.ones((8, 2)), jnp.eye(8), **options)
    with pytest.raises(ValueError, match="gram must have shape"):
        sparsegpt_matrix(jnp.ones((8, 2)), jnp.eye(4), sparsity=0.5)
