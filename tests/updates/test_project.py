"""`project`: where params land, what the latent does, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jopt
from jopt.updates.project import ProjectState
from jopt.updates.states import map_states
from tests import contract


def test_latent_takes_the_inner_steps_and_params_their_projection():
    inner = optax.adam(0.05)
    tx = jopt.project(inner, contract.quarter_grid)
    params, state = contract.train(tx, contract.make_params(), num_steps=5)

    # The oracle: the same gradients through the inner optimizer alone.
    latent = contract.make_params()
    inner_state = inner.init(latent)
    for step in range(5):
        grads = contract.make_grads(latent, step)
        steps, inner_state = jax.jit(inner.update)(grads, inner_state, latent)
        latent = optax.apply_updates(latent, steps)
    for a, b in zip(
        jax.tree.leaves(state.latent), jax.tree.leaves(latent), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    contract.assert_same(params, contract.quarter_grid(state.latent))


def test_begin_step_leaves_the_inner_updates_alone_until_then():
    inner = optax.sgd(0.1, momentum=0.9)
    tx = jopt.project(inner, contract.quarter_grid, begin_step=3)
    early, _ = contract.train(tx, contract.make_params(), num_steps=3)
    plain, _ = contract.train(inner, contract.make_params(), num_steps=3)
    contract.assert_same(early, plain)
    # The first move from off the grid may miss by an ulp; from the second on it lands.
    late, state = contract.train(tx, contract.make_params(), num_steps=5)
    contract.assert_same(late, contract.quarter_grid(state.latent))


def test_unselected_leaves_take_the_inner_steps_and_cost_nothing():
    inner = optax.adam(0.1)
    tx = jopt.project(inner, contract.quarter_grid, select=jopt.matching(".*/kernel"))
    params, state = contract.train(tx, contract.make_params(), num_steps=3)
    plain, _ = contract.train(inner, contract.make_params(), num_steps=3)
    assert isinstance(state.latent["dense"]["bias"], optax.MaskedNode)
    contract.assert_same(params["dense"]["bias"], plain["dense"]["bias"])


def test_integer_leaves_pass():
    tx = jopt.project(optax.sgd(0.1), contract.quarter_grid)
    params = {"w": jnp.ones((2, 2)), "table": jnp.arange(3)}
    grads = {"w": jnp.ones((2, 2)), "table": jnp.zeros(3, jnp.int32)}
    updates, _state = jax.jit(tx.update)(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["table"], [0, 1, 2])
    assert new["table"].dtype == jnp.int32


@given(st.integers(0, 2**31), st.sampled_from([-8, -3, 0, 2, 9]))
def test_moves_between_points_of_one_grid_land_exactly(seed, exponent):
    """p + (t - p) == t for small integers times one power of two or bfloat16 step."""
    rng = np.random.default_rng(seed)
    step = np.float32(jnp.bfloat16(rng.uniform(1, 2))) * np.float32(2.0**exponent)
    p, t = (rng.integers(-127, 128, 512).astype(np.float32) * step for _ in range(2))
    tx = jopt.project(optax.sgd(1.0), lambda latent: latent)
    params = {"w": jnp.asarray(p)}
    state = tx.init(params)
    updates, _ = tx.update({"w": jnp.asarray(p - t)}, state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], t)


def test_what_is_not_exact_does_not_add_up():
    """Arbitrary float32 targets may be missed by an ulp of p, and never by more."""
    rng = np.random.default_rng(0)
    scale = np.float32(0.0123456)
    tx = jopt.project(
        optax.sgd(0.01),
        lambda latent: jax.tree.map(lambda x: jnp.round(x / scale) * scale, latent),
    )
    params = {"w": jnp.asarray(rng.normal(size=4096), jnp.float32)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(50):
        grads = {
            "w": jnp.asarray(np.random.default_rng(i).normal(size=4096), jnp.float32)
        }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    target = np.round(np.asarray(state.latent["w"]) / scale) * scale
    miss = np.abs(np.asarray(params["w"]) - target)
    assert miss.max() <= 2 * np.spacing(np.abs(target).max().astype(np.float32))


def test_params_may_be_donated_beside_the_state():
    params = {"w": jnp.ones((2, 2))}
    state = jopt.project(optax.sgd(0.1), contract.quarter_grid).init(params)
    params["w"].delete()
    np.testing.assert_array_equal(state.latent["w"], 1.0)


def test_a_projection_with_memory():
    """A moving centre: the projection is told the count and keeps its own state."""
    counts = []

    def update(latent, state, count):
        counts.append(count)
        return jax.tree.map(lambda x: x * 0 + state, latent), state + 1.0

    projection = jopt.Projection(init=lambda params: jnp.zeros([]), update=update)
    tx = jopt.project(optax.sgd(0.1), projection)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for expected in (0.0, 1.0):
        updates, state = tx.update({"w": jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["w"], expected)
    assert [int(c) for c in counts] == [0, 1]


def test_states_inside_a_projected_state_see_its_latent():
    tx = jopt.project(
        jopt.project(optax.sgd(0.1), contract.quarter_grid), contract.quarter_grid
    )
    params = {"w": jnp.array([1.0])}
    state = tx.init({"w": jnp.array([0.2])})
    seen = []

    def look(state, params):
        seen.append(params["w"][0])
        return state

    map_states(look, state, ProjectState, params=params)
    np.testing.assert_allclose(seen, [0.2, 1.0])


def test_unmatched_selection_raises_with_near_names():
    tx = jopt.project(
        optax.sgd(0.1), contract.quarter_grid, select=jopt.matching("dense/kernal")
    )
    with pytest.raises(ValueError, match="dense/kernel"):
        tx.init(contract.make_params())
