"""Top-KAST against NumPy: a sparse forward pass inside a wider backward one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt.arrays import packing
from tests import contract
from tests.pruning.test_straight_through import (
    SHAPE,
    Adam,
    Sgd,
    kernel_params,
    nm_mask,
    top_mask,
)


def backward_masks(state):
    return packing.unpack_mask(state.projection_state.backward_masks["kernel"])


@pytest.mark.parametrize("optimizer", [Sgd, Adam])
def test_follows_its_definition_step_by_step(optimizer):
    tx = jopt.top_kast(
        optimizer.inner,
        sparsity=0.75,
        backward_sparsity=0.5,
        penalty=0.2,
        every_steps=2,
        begin_step=1,
        end_step=6,
    )
    params = kernel_params()
    state, oracle, update = tx.init(params), optimizer(), jax.jit(tx.update)
    latent = np.asarray(params["kernel"], np.float64)
    a, b = (top_mask(np.abs(latent), s) for s in (0.75, 0.5))
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], a)
    for step in range(9):
        grads = contract.make_grads(params, step)
        strength = np.where(a, 0.2, 0.2 / 0.25)
        g = np.asarray(grads["kernel"], np.float64) + strength * latent
        d = oracle.step(np.where(b, g, 0))
        before = np.asarray(state.latent["kernel"])
        rests, latent = ~b, latent + np.where(b, d, 0)
        if step in (1, 3, 5, 6):
            a, b = (top_mask(np.abs(latent), s) for s in (0.75, 0.5))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(
            np.asarray(state.latent["kernel"])[rests], before[rests]
        )
        np.testing.assert_allclose(state.latent["kernel"], latent, rtol=2e-4, atol=1e-5)
        np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], a)
        np.testing.assert_array_equal(backward_masks(state), b)
        np.testing.assert_array_equal(np.asarray(params["kernel"]) != 0, a)


def test_weights_outside_of_b_have_no_moments():
    tx = jopt.top_kast(
        optax.adamw(0.1, weight_decay=0.5),
        sparsity=0.75,
        backward_sparsity=0.5,
        begin_step=9,
    )
    start = kernel_params()
    _, state = contract.train(tx, start)
    b = np.asarray(backward_masks(state))
    mu = np.asarray(optax.tree.get(state, "mu")["kernel"])
    np.testing.assert_array_equal(mu != 0, b)
    np.testing.assert_array_equal(
        np.asarray(state.latent["kernel"])[~b], np.asarray(start["kernel"])[~b]
    )


@pytest.mark.parametrize("pattern", [jopt.NM(1, 4), jopt.Block((4, 4)), jopt.Channel()])
def test_patterns_are_nested(pattern):
    sparsity = None if isinstance(pattern, jopt.NM) else 0.75
    tx = jopt.top_kast(
        optax.sgd(0.1), sparsity=sparsity, backward_sparsity=0.5, pattern=pattern
    )
    params, state = contract.train(tx, kernel_params(), num_steps=3)
    scores = jnp.abs(state.latent["kernel"])
    a = jopt.make_mask(scores, sparsity=sparsity, pattern=pattern)
    if isinstance(pattern, jopt.NM):
        b = nm_mask(scores, 2, 4)
    else:
        b = jopt.make_mask(scores, sparsity=0.5, pattern=pattern)
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], a)
    np.testing.assert_array_equal(backward_masks(state), b)
    np.testing.assert_array_equal(params["kernel"] != 0, a)


def test_rules_schedules_and_stacked_layers():
    layers = jnp.stack([kernel_params(i)["kernel"] * 10.0**i for i in range(3)])
    params = {"a": layers, "b": kernel_params(5)["kernel"]}
    tx = jopt.top_kast(
        optax.sgd(0.0),
        sparsity=jopt.schedules.one_shot_sparsity(0.75, step=1),
        backward_sparsity={"a": lambda count: 0.5},
        allocation=jopt.allocation.uniform,
        stacked_axes={"a": 0},
    )
    state = tx.init(params)
    assert all(bool(m.all()) for m in jax.tree.leaves(jopt.get_masks(state)))
    params, state = contract.train(tx, params, num_steps=2)
    for i in range(3):
        np.testing.assert_array_equal(
            jopt.get_masks(state)["a"][i], top_mask(np.abs(layers[i]), 0.75)
        )
    held = jax.tree.map(packing.unpack_mask, state.projection_state.backward_masks)
    assert int(held["a"].sum()) == 3 * 64 and int(held["b"].sum()) == 128


def test_b_holds_a_whatever_the_allocation():
    def odd(units, sparsity):
        return jopt.allocation.uniform(units, 1.0 - jnp.asarray(sparsity))

    tx = jopt.top_kast(
        optax.sgd(0.1), sparsity=0.75, backward_sparsity=0.5, allocation=odd
    )
    _, state = contract.train(tx, kernel_params(), num_steps=2)
    a, b = np.asarray(jopt.get_masks(state)["kernel"]), backward_masks(state)
    assert a.shape == SHAPE and not np.any(a & ~np.asarray(b))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 0.5, "backward_sparsity": 0.75}, "at most sparsity=0.5"),
        ({"sparsity": 0.5, "backward_sparsity": 1.5}, "fraction in"),
        ({"sparsity": 0.5, "backward_sparsity": None}, "must be given"),
        ({"backward_sparsity": 0.5}, "sparsity must be given"),
        (
            {"sparsity": 0.5, "backward_sparsity": 0.25, "penalty": -1.0},
            "penalty must be",
        ),
    ],
)
def test_wrong_arguments_raise_at_construction(options, match):
    with pytest.raises(ValueError, match=match):
        jopt.top_kast(optax.sgd(1.0), **options)


@pytest.mark.parametrize("backward_sparsity", [0.3, 0.75])
def test_b_of_a_group_is_a_whole_number(backward_sparsity):
    tx = jopt.top_kast(
        optax.sgd(1.0), backward_sparsity=backward_sparsity, pattern=jopt.NM(2, 4)
    )
    with pytest.raises(ValueError, match=r"whole number of every 4.*'kernel'"):
        tx.init(kernel_params())
