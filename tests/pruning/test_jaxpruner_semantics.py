"""JaxPruner's own semantics, said again in NumPy: equal where they are sound.

Deviations are listed in docs/semantics.md, each with its reason.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt


def ranked(scores, sparsity):
    """Keep round((1 - sparsity) * size) of the largest scores."""
    flat = np.asarray(scores).ravel()
    kept = int(np.round(flat.size * (1 - sparsity)))
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:kept]] = True
    return mask.reshape(np.shape(scores))


SCORES = np.asarray(jax.random.normal(jax.random.key(0), (16, 24)))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_unstructured(sparsity):
    mask = jopt.make_mask(SCORES, sparsity=sparsity)
    np.testing.assert_array_equal(mask, ranked(SCORES, sparsity))


@pytest.mark.parametrize(("reduce", "pool"), [("mean", np.mean), ("max", np.max)])
@pytest.mark.parametrize("shape", [(4, 4), (2, 8), (1, 24)])
def test_blocks_of_mean_and_max(shape, reduce, pool):
    height, width = shape
    tiles = SCORES.reshape(16 // height, height, 24 // width, width)
    blocks = ranked(pool(tiles, axis=(1, 3)), 0.5)
    expected = np.kron(blocks, np.ones(shape, bool))
    mask = jopt.make_mask(SCORES, sparsity=0.5, pattern=jopt.Block(shape, reduce))
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (3, 4)])
def test_n_of_m_along_an_axis(n, m, axis):
    groups = np.moveaxis(SCORES, axis, -1).reshape(-1, m)
    order = np.argsort(-groups, axis=-1)[:, :n]
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, order, True, -1)
    shape = np.moveaxis(SCORES, axis, -1).shape
    expected = np.moveaxis(kept.reshape(shape), -1, axis)
    mask = jopt.make_mask(SCORES, pattern=jopt.NM(n, m, axis=axis))
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("axis", [0, -1])
def test_channels_by_their_mean_magnitude(axis):
    magnitudes = np.abs(SCORES)
    means = magnitudes.mean(axis=1 if axis == 0 else 0)
    kept = ranked(means, 0.25)
    expected = np.broadcast_to(kept[:, None] if axis == 0 else kept, SCORES.shape)
    mask = jopt.make_mask(magnitudes, sparsity=0.25, pattern=jopt.Channel(axis))
    np.testing.assert_array_equal(mask, expected)


def test_erdos_renyi_kernel_to_a_unit():
    """Their densities rounded for each leaf; ours add up to the whole budget."""
    shapes = {"a": (3, 3, 4, 16), "b": (3, 3, 16, 32), "c": (64, 10), "d": (8, 8)}
    keys = jax.random.split(jax.random.key(1), len(shapes))
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    budget = 0.1 * sum(sizes.values())
    dense: set[str] = set()
    while True:
        rest = budget - sum(sizes[name] for name in dense)
        scale = rest / sum(raw[n] * sizes[n] for n in shapes if n not in dense)
        over = {n for n in shapes if n not in dense and scale * raw[n] > 1}
        if not over:
            break
        dense |= {max(over, key=raw.get)}
    masks = jopt.make_masks(params, sparsity=0.9, allocation=jopt.allocation.erk)
    for name in shapes:
        density = 1.0 if name in dense else scale * raw[name]
        assert abs(int(masks[name].sum()) - density * sizes[name]) <= 1
    total = sum(int(mask.sum()) for mask in masks.values())
    assert total == sum(sizes.values()) - round(0.9 * sum(sizes.values()))


def test_a_sparsity_for_each_leaf():
    params = {"a": jnp.asarray(SCORES), "b": jnp.asarray(SCORES)}
    masks = jopt.make_masks(params, sparsity={"a": 0.5, "b": 0.75})
    for name, sparsity in (("a", 0.5), ("b", 0.75)):
        expected = ranked(np.abs(SCORES), sparsity)
        np.testing.assert_array_equal(masks[name], expected)


def test_the_polynomial_schedule_of_power_three():
    schedule = jopt.schedules.cubic_sparsity(0.0, 0.8, begin_step=10, end_step=50)
    for step in range(0, 70, 5):
        done = min(max((step - 10) / 40, 0.0), 1.0)
        expected = 0.8 * (1 - (1 - done) ** 3)
        np.testing.assert_allclose(schedule(step), expected, atol=1e-6)


def test_global_ranking_of_scores_normalised_by_leaf():
    params = {"a": jnp.asarray(SCORES), "b": jnp.asarray(100 * SCORES[:8] ** 3)}
    masks = jopt.make_masks(
        params,
        sparsity=0.7,
        scores=jopt.scores.normalized(jopt.scores.magnitude),
        allocation=jopt.allocation.global_ranking,
    )
    both = [np.abs(np.asarray(w)) / np.linalg.norm(w) for w in params.values()]
    expected = ranked(np.concatenate([x.ravel() for x in both]), 0.7)
    found = np.concatenate([np.asarray(m).ravel() for m in masks.values()])
    np.testing.assert_array_equal(found, expected)
