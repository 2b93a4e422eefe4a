"""Masks of sharded leaves are stored so that moving them gathers nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from tests import contract, hlo

NUM_ROWS = 96
STORED = {320: jnp.uint8, 40: jnp.bool_, 96: jnp.bool_}  # 40, 5 and 12 on each of 8
MAKE = {
    "prune": lambda: jopt.prune(optax.sgd(0.1), sparsity=0.75),
    "rigl": lambda: jopt.rigl(optax.sgd(0.1), sparsity=0.75, every_steps=1),
}


def make_params(width, mesh=None):
    w = np.random.default_rng(0).normal(size=(NUM_ROWS, width)).astype(np.float32)
    if mesh is None:
        return {"w": jnp.asarray(w)}
    return {"w": jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "data")))}


@pytest.mark.parametrize(
    ("name", "width"), [*(("prune", n) for n in STORED), ("rigl", 40)]
)
def test_a_mask_update_gathers_nothing(auto_mesh, name, width):
    params, tx = make_params(width, auto_mesh), MAKE[name]()
    state = tx.init(params)
    assert state.masks["w"].dtype == STORED[width]
    assert state.masks["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
    update = jax.jit(tx.update).lower(params, state, params).compile()
    gathered = [c for c in hlo.collectives(update.as_text()) if c.kind == "all-gather"]
    assert all(c.num_bytes < NUM_ROWS for c in gathered), gathered
    _, state = update(params, state, params)
    whole = make_params(width)
    _, expected = tx.update(whole, tx.init(whole), whole)
    contract.assert_same(jopt.get_masks(state), jopt.get_masks(expected))


def test_a_compiled_init_goes_by_the_whole_axis(auto_mesh):
    """It cannot see the parts: what docs/semantics.md says of it."""
    tx = MAKE["prune"]()
    params = make_params(40, auto_mesh)
    state = jax.jit(tx.init)(params)
    assert state.masks["w"].dtype == jnp.uint8
    _, state = jax.jit(tx.update)(params, state, params)
    assert int(jopt.get_masks(state)["w"].sum()) == NUM_ROWS * 10


def test_given_masks_are_stored_as_the_leaf_asks(auto_mesh):
    params = make_params(40, auto_mesh)
    whole = jopt.make_masks(make_params(40), sparsity=0.75)
    tx = jopt.static_sparse(optax.sgd(0.1), masks=whole)
    mask = tx.init(params).masks["w"]
    assert mask.dtype == jnp.bool_ and mask.sharding == params["w"].sharding
    assert tx.init(make_params(40)).masks["w"].dtype == jnp.uint8
