"""Proximal maps against their formulas, and training with them against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import contract
from tests.pruning.test_straight_through import SHAPE, Adam, Sgd, kernel_params


def soft(w, strength):
    return np.sign(w) * np.maximum(np.abs(w) - strength, 0)


def hard(w, strength):
    return np.where(np.abs(w) > np.sqrt(2 * strength), w, 0)


def by_channel(w, strength):
    """Group lasso over columns, one after another."""
    new = np.zeros_like(w)
    for i in range(w.shape[1]):
        norm = np.linalg.norm(w[:, i])
        new[:, i] = w[:, i] * max(0, 1 - strength * np.sqrt(len(w)) / norm)
    return new


def by_block(w, strength):
    new = np.zeros_like(w)
    for i in range(0, w.shape[0], 4):
        for j in range(0, w.shape[1], 2):
            block = w[i : i + 4, j : j + 2]
            factor = max(0, 1 - strength * np.sqrt(8) / np.linalg.norm(block))
            new[i : i + 4, j : j + 2] = block * factor
    return new


MAPS = {
    "l1": (jopt.proximal_maps.l1, soft),
    "hard_threshold": (jopt.proximal_maps.hard_threshold, hard),
    "channels": (
        lambda s: jopt.proximal_maps.group_lasso(s, jopt.Channel()),
        by_channel,
    ),
    "blocks": (
        lambda s: jopt.proximal_maps.group_lasso(s, jopt.Block((4, 2), reduce="max")),
        by_block,
    ),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9, 50.0])
def test_maps_follow_their_formulas(name, strength):
    make, oracle = MAPS[name]
    w = kernel_params()["kernel"]
    found = make(strength).prox(w, 0)
    expected = oracle(np.asarray(w, np.float64), strength)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found) == 0, expected == 0)
    assert make(strength).prox(w.astype(jnp.bfloat16), 0).dtype == jnp.float32


@pytest.mark.parametrize("name", ["l1", "channels"])
def test_maps_minimise_what_they_say(name):
    """No random neighbour has a smaller distance plus penalty."""
    make, _ = MAPS[name]
    w = np.asarray(kernel_params()["kernel"], np.float64)

    def cost(v):
        size = np.abs(v).sum()
        if name == "channels":
            size = np.sqrt(8) * np.linalg.norm(v, axis=0).sum()
        return ((v - w) ** 2).sum() / 2 + 0.8 * size

    best = np.asarray(make(0.8).prox(jnp.asarray(w, jnp.float32), 0), np.float64)
    rng = np.random.default_rng(0)
    for scale in (1e-2, 1e-1, 1.0):
        for _ in range(20):
            other = best + scale * rng.normal(size=w.shape)
            other = np.where(rng.random(w.shape) < 0.5, other, best)
            assert cost(best) <= cost(other) + 1e-4


@pytest.mark.parametrize("optimizer", [Sgd, Adam])
@pytest.mark.parametrize("name", ["l1", "blocks"])
def test_follows_its_definition_step_by_step(name, optimizer):
    """A ramped strength, a beginning, the mask of the zeros, and healing."""
    make, oracle = MAPS[name]

    def strength(count):
        return (0.1 if optimizer is Sgd else 0.05) * count

    tx = jopt.proximal(optimizer.inner, make(strength), begin_step=1, end_step=6)
    params = kernel_params()
    state, inner, update = tx.init(params), optimizer(), jax.jit(tx.update)
    w, mask = np.asarray(params["kernel"], np.float64), np.ones(SHAPE, bool)
    for step in range(9):
        grads = contract.make_grads(params, step)
        d = inner.step(np.asarray(grads["kernel"], np.float64))
        if step == 6:
            mask = w != 0
        w = np.where(mask, w + d, 0)
        if 1 <= step < 6:
            w = oracle(w, strength(step))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"], w, rtol=5e-4, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(params["kernel"]) == 0, w == 0)
        np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], mask)
    assert 0 < mask.sum() < mask.size and (w[mask] != 0).all()


def test_groups_are_kept_whole_by_the_mask():
    """A zero that is not the map's, inside a channel that lives, may train on."""
    lasso = jopt.proximal_maps.group_lasso(0.01, jopt.Channel())
    tx = jopt.proximal(optax.sgd(1.0), lasso, end_step=1)
    params = {"w": jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])}
    zero = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(zero, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(
        jopt.get_masks(state)["w"], [[True, False, True], [True, False, True]]
    )


def test_stacked_layers_and_selection():
    """A group ends with its layer, and a layer's strength is its own."""
    layers = jnp.stack([0.1 * kernel_params(0)["kernel"], kernel_params(1)["kernel"]])
    lasso = jopt.proximal_maps.group_lasso(0.3, jopt.Channel(0))
    tx = jopt.proximal(
        optax.sgd(0.0),
        lasso,
        stacked_axes={"layers": 0},
        select=jopt.matching("layers"),
    )
    params = {"layers": layers, "head": kernel_params(2)["kernel"]}
    new, state = contract.train(tx, params, num_steps=1)
    assert not np.any(new["layers"][0])
    expected = by_channel(np.asarray(layers[1], np.float64).T, 0.3).T
    np.testing.assert_allclose(new["layers"][1], expected, rtol=1e-5, atol=1e-6)
    contract.assert_same(new["head"], params["head"])
    assert isinstance(jopt.get_masks(state)["head"], optax.MaskedNode)


def test_a_map_of_your_own():
    tx = jopt.proximal(optax.sgd(0.0), lambda w, count: jnp.maximum(w, 0))
    params, _ = contract.train(tx, kernel_params(), num_steps=1)
    expected = jax.tree.map(lambda w: jnp.maximum(w, 0), kernel_params())
    contract.assert_same(params, expected)


def test_what_is_not_finite_is_not_hidden():
    w = jnp.array([[jnp.nan, 1.0], [0.0, 1.0]])
    for make, _ in list(MAPS.values())[:3]:
        assert bool(jnp.isnan(make(0.5).prox(w, 0)[0, 0]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jopt.proximal_maps.l1(-1.0), "strength must be"),
        (
            lambda: jopt.proximal_maps.group_lasso(1.0, jopt.NM(2, 4)),
            "pattern must be Block",
        ),
        (lambda: jopt.proximal(optax.sgd(1.0), 0.1), "proximal_map must be"),
        (
            lambda: jopt.proximal(
                optax.sgd(1.0), jopt.proximal_maps.l1(0.1), begin_step=5, end_step=3
            ),
            "end_step must be",
        ),
        (
            lambda: jopt.proximal(3, jopt.proximal_maps.l1(0.1)),
            "inner must be an Optax",
        ),
        (
            lambda: jopt.proximal(
                optax.sgd(1.0),
                jopt.proximal_maps.group_lasso(0.1, jopt.Block((3, 3))),
            ).init(kernel_params()),
            "'kernel'",
        ),
    ],
)
def test_wrong_arguments_raise(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()
