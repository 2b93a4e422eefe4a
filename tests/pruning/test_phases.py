"""AC/DC and rewinding against NumPy: phases, masks, moments, and what goes back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import contract
from tests.pruning.test_straight_through import SHAPE, Adam, kernel_params, top_mask


def is_dense(tx, params, num_steps):
    """Whether masks keep everything after each step."""
    state, update = tx.init(params), jax.jit(tx.update)
    found = []
    for step in range(num_steps):
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
        found.append(bool(jopt.get_masks(state)["kernel"].all()))
    return found


def test_ac_dc_follows_its_definition_step_by_step():
    """Masks, params and Adam's moments, which start anew where weights return."""
    tx = jopt.ac_dc(
        optax.adam(0.1),
        sparsity=0.75,
        compressed_steps=2,
        dense_steps=2,
        begin_step=1,
        end_step=9,
    )
    params = kernel_params()
    state, oracle, update = tx.init(params), Adam(), jax.jit(tx.update)
    w, mask = np.asarray(params["kernel"], np.float64), np.ones(SHAPE, bool)
    for step in range(11):
        grads = contract.make_grads(params, step)
        if step in (1, 5, 9):
            mask = top_mask(np.abs(w), 0.75)
        if step in (3, 7):
            oracle.mu[~mask], oracle.nu[~mask] = 0, 0
            mask = np.ones(SHAPE, bool)
        g = np.where(mask, np.asarray(grads["kernel"], np.float64), 0)
        w = np.where(mask, w + oracle.step(g), 0)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], mask)
        np.testing.assert_allclose(params["kernel"], w, rtol=5e-4, atol=1e-5)
        assert not np.any(np.asarray(params["kernel"])[~mask])


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"end_step": 7}, "CCDCCDCCC"),
        ({"end_step": 6, "begin_step": 2}, "DDCCDCCCC"),
        ({"end_step": 5}, "CCDCCCCCC"),
        ({"end_step": 8, "final_dense_steps": 4}, "CCDCDDDDC"),
        ({"end_step": 4, "final_dense_steps": 9}, "DDDDCCCCC"),
        ({"end_step": 0}, "CCCCCCCCC"),
    ],
)
def test_phases(options, phases):
    tx = jopt.ac_dc(
        optax.sgd(0.1), sparsity=0.5, compressed_steps=2, dense_steps=1, **options
    )
    expected = [phase == "D" for phase in phases]
    assert is_dense(tx, kernel_params(), len(expected)) == expected


@pytest.mark.parametrize(
    "pattern",
    [jopt.NM(2, 4), jopt.NM(1, 4, axis=-1), jopt.Block((4, 4)), jopt.Channel()],
)
def test_ac_dc_keeps_patterns(pattern):
    sparsity = None if isinstance(pattern, jopt.NM) else 0.5
    tx = jopt.ac_dc(
        optax.sgd(0.1),
        sparsity=sparsity,
        pattern=pattern,
        compressed_steps=1,
        dense_steps=1,
        end_step=4,
    )
    before, state = contract.train(tx, kernel_params(), num_steps=4)
    assert bool(jopt.get_masks(state)["kernel"].all())
    scores = jnp.abs(before["kernel"])
    params, state = contract.train(tx, before, num_steps=1, state=state, begin=4)
    expected = jopt.make_mask(scores, sparsity=sparsity, pattern=pattern)
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], expected)
    np.testing.assert_array_equal(params["kernel"] != 0, expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compressed_steps": 0}, "compressed_steps must be"),
        ({"dense_steps": 0}, "dense_steps must be"),
        ({"final_dense_steps": -1}, "final_dense_steps must be"),
        ({"end_step": 2, "begin_step": 3}, "end_step must be"),
        ({"sparsity": None}, "sparsity must be given"),
        ({"scores": jopt.scores.random()}, "key must be given"),
    ],
)
def test_ac_dc_refuses_wrong_arguments(options, match):
    good = {"sparsity": 0.5, "compressed_steps": 1, "dense_steps": 1, "end_step": 9}
    with pytest.raises(ValueError, match=match):
        jopt.ac_dc(optax.sgd(0.1), **(good | options))


def ticket(inner=None, **options):
    rounds = {"every_steps": 3, "begin_step": 3}
    ramp = jopt.schedules.geometric_sparsity(0.5, **rounds)
    pruned = jopt.prune(
        optax.adam(0.1) if inner is None else inner, sparsity=ramp, **rounds
    )
    return jopt.rewind(pruned, **options)


@pytest.mark.parametrize("rewind_step", [0, 2])
def test_rewind_follows_its_definition_step_by_step(rewind_step):
    """Three rounds: weights and biases go back, Adam and its count start anew."""
    tx = ticket(rewind_step=rewind_step)
    params = {"bias": jnp.ones(SHAPE[1]), **kernel_params()}
    state, update = tx.init(params), jax.jit(tx.update)
    fresh = optax.adam(0.1)
    plain, mask = fresh.init(params), np.ones(SHAPE, bool)
    expected = params
    for step in range(11):
        if step == rewind_step:
            early = expected
        grads = contract.make_grads(params, step)
        if step in (3, 6, 9):
            mask = top_mask(np.abs(expected["kernel"]), 1 - 0.5 ** (step // 3))
            expected = {**early, "kernel": jnp.where(mask, early["kernel"], 0)}
            plain = fresh.init(expected)
        else:
            steps, plain = fresh.update(grads, plain, expected)
            expected = optax.apply_updates(expected, steps)
            expected["kernel"] = jnp.where(mask, expected["kernel"], 0)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], mask)
        for name in params:
            np.testing.assert_allclose(
                params[name], expected[name], rtol=1e-4, atol=1e-6
            )
        assert not np.any(np.asarray(params["kernel"])[~mask])
        adam = state.inner_state.inner_state
        assert int(adam[0].count) == int(plain[0].count)
        np.testing.assert_allclose(
            adam[0].nu["bias"], plain[0].nu["bias"], rtol=1e-5, atol=1e-12
        )
    assert int(state.inner_state.count) == 11  # the ramp goes on


def test_masks_that_change_early_do_not_rewind():
    plain = jopt.prune(optax.adam(0.1), sparsity=0.5, end_step=0)
    expected, _ = contract.train(plain, contract.make_params())
    params, state = contract.train(
        jopt.rewind(plain, rewind_step=3), contract.make_params()
    )
    contract.assert_same(params, expected)
    assert int(optax.tree.get(state, "mu")["dense"]["kernel"].shape[0]) == 8


def test_rewind_notices_masks_that_the_host_makes():
    options = {"sparsity": 0.5, "begin_step": 2, "end_step": 2}
    inside = jopt.rewind(jopt.prune(optax.sgd(0.1), **options))
    expected, _ = contract.train(inside, contract.make_params(), num_steps=4)
    pruned = jopt.prune(optax.sgd(0.1), **options, update="host")
    tx = jopt.rewind(pruned)
    params, update = contract.make_params(), jax.jit(tx.update)
    state = tx.init(params)
    for step in range(4):
        state = jopt.update_masks(pruned, state, params)
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    contract.assert_same(params, expected)


def test_rewind_around_a_chain_starts_all_of_it_anew():
    pruned = optax.chain(
        optax.trace(0.9), jopt.prune(optax.adam(0.1), sparsity=0.5, begin_step=2)
    )
    _, state = contract.train(jopt.rewind(pruned), contract.make_params(), num_steps=3)
    trace = optax.tree.get(state, "trace")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(trace))
    assert [int(s) for s in (state.count, state.inner_state[1].count)] == [3, 3]
    assert int(state.inner_state[1].inner_state[0].count) == 0


def test_rewind_inside_quantize_weights_sends_latents_back():
    spec = contract.INT8
    pruned = jopt.prune(optax.sgd(0.1), sparsity=0.5, begin_step=2)
    tx = jopt.quantize_weights(jopt.rewind(pruned), spec)
    params, state = contract.train(tx, kernel_params(), num_steps=3)
    mask = jopt.get_masks(state)["kernel"]
    early = jnp.where(mask, kernel_params()["kernel"], 0)
    np.testing.assert_allclose(state.latent["kernel"], early, rtol=1e-6, atol=1e-6)
    assert not np.any(np.asarray(params["kernel"])[~np.asarray(mask)])


def test_rewind_refuses_what_it_cannot_send_back():
    params = contract.make_params()
    with pytest.raises(ValueError, match="must hold masks"):
        jopt.rewind(optax.adam(0.1)).init(params)
    with pytest.raises(ValueError, match="must not keep latents"):
        jopt.rewind(jopt.ste(optax.adam(0.1), sparsity=0.5)).init(params)
    with pytest.raises(TypeError, match="inner must be an Optax"):
        jopt.rewind(3)
    with pytest.raises(ValueError, match="rewind_step must be"):
        ticket(rewind_step=-1)
