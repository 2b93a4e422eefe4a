"""Masks made between steps, for leaves on a mesh and for what is rare."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 16), "b": (8, 16), "c": (16, 24), "d": (8, 16)}
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return jax.device_put({name: x.astype(np.float32) for name, x in drawn.items()})


def host_state(params, **options):
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.6, update="host", **options)
    return jopt.update_masks(tx, tx.init(params), params)


def step_state(params, **options):
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.6, **options)
    return jax.jit(tx.update)(params, tx.init(params), params)[1]


@pytest.mark.parametrize("kind", ["auto_mesh", "explicit_mesh"])
@pytest.mark.parametrize("name", ["global_ranking", "erk"])
def test_leaves_on_a_mesh_beside_leaves_of_one_device(name, kind, request):
    allocation = getattr(jopt.allocation, name)
    params = make_params()
    expected = jopt.get_masks(host_state(params, allocation=allocation))
    mesh = request.getfixturevalue(kind)
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        masks = jopt.get_masks(host_state(placed, allocation=allocation))
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_what_is_not_finite_is_counted_and_given_up_first():
    params = make_params()
    broken = np.array(params["b"])
    broken[0, :3] = [np.nan, np.inf, -np.inf]
    params["b"] = jax.device_put(broken)
    for pattern in (jopt.Unstructured(), jopt.Block((2, 2))):
        options = {"allocation": jopt.allocation.global_ranking, "pattern": pattern}
        state = host_state(params, **options)
        assert int(state.num_nonfinite) == 3
        masks = jopt.get_masks(state)
        assert not bool(masks["b"][0, :3].any())
        expected = jopt.get_masks(step_state(params, **options))
        jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_split_ties_go_to_the_earlier_leaf():
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), make_params())
    state = host_state(params, allocation=jopt.allocation.global_ranking)
    kept = [int(m.sum()) for m in jax.tree.leaves(jopt.get_masks(state))]
    assert kept == [128, 128, 51, 0]  # 307 of 768
