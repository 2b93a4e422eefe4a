"""The promises on meshes: same bits, nothing gathered; pmap; checkpoints."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from tests import contract

each_mechanism = pytest.mark.parametrize(
    "name", contract.with_exhaustive(contract.WRAPPERS)
)


def make_params():
    key = jax.random.key(3)
    return {
        "kernel": jax.random.normal(key, (64, 128)),
        "wide": jax.random.normal(jax.random.fold_in(key, 1), (16, 256)),
        "bias": jnp.ones(128),
    }


SPECS = {
    "kernel": PartitionSpec("data", None),
    "wide": PartitionSpec(None, "data"),
    "bias": PartitionSpec(),
}


@pytest.mark.parametrize("kind", ["auto_mesh", "explicit_mesh"])
@each_mechanism
def test_sharded_equals_one_device(name, kind, request):
    mesh = request.getfixturevalue(kind)
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params = make_params()
    shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    sharded = jax.tree.map(jax.device_put, params, shardings)
    grads = contract.make_grads(params)
    sharded_grads = jax.tree.map(jax.device_put, grads, shardings)

    def two_steps(params, grads):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    with jax.set_mesh(mesh):
        compiled = jax.jit(two_steps).lower(sharded, sharded_grads).compile()
        together = compiled(sharded, sharded_grads)
    alone = jax.jit(two_steps)(params, grads)
    together, alone = jax.device_get(together), jax.device_get(alone)
    if name in contract.ROUNDED:
        # Sums differ by an ulp, and params land to an ulp of what they were, about 1.
        chex.assert_trees_all_close(together, alone, atol=1e-6)
    else:
        contract.assert_same(together, alone)
    if name not in contract.GATHERED:
        assert_no_weight_sized_gather(compiled.as_text(), 16 * 256)


def assert_no_weight_sized_gather(hlo, weight_size):
    """No all-gather makes an array of at least a quarter of the smallest weight."""
    for line in hlo.splitlines():
        if re.search(r"= \S+ all-gather(-start)?\(", line):
            sizes = [
                int(np.prod([int(d) for d in dims.split(",") if d] or [1]))
                for dims in re.findall(r"\w+\[([\d,]*)\]", line.split(" all-gather")[0])
            ]
            assert max(sizes) < weight_size // 4, line


@each_mechanism
def test_pmap_with_an_axis_name(name):
    if name == "prune_host":
        pytest.skip("a host call is outside of pmap")
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params = contract.make_params()

    def step(params, state, grads):
        grads = jax.lax.pmean(grads, "batch")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
    grads = jax.tree.map(lambda x: jnp.stack([x] * 8), contract.make_grads(params))
    state = jax.pmap(tx.init)(copies)
    together, _ = jax.pmap(step, axis_name="batch")(copies, state, grads)
    alone, _ = jax.jit(lambda p, s, g: step_alone(tx, p, s, g))(
        params, tx.init(params), contract.make_grads(params)
    )
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        for copy in np.asarray(a):
            np.testing.assert_allclose(copy, b, rtol=1e-6, atol=1e-7)


def step_alone(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@each_mechanism
def test_restored_state_continues_bit_for_bit(name, tmp_path):
    tx = contract.WRAPPERS[name](optax.adamw(1e-2))
    update = jax.jit(tx.update)
    params, state = contract.train(tx, contract.make_params(), 3, update=update)
    tree = {"params": params, "opt": state}
    jopt.save(tmp_path / "ckpt", tree, step=3)
    like = {"params": contract.make_params(), "opt": tx.init(contract.make_params())}
    restored = jopt.restore(tmp_path / "ckpt", like=like)
    contract.assert_same(restored, tree)
    on, _ = contract.train(tx, params, 2, state, begin=3, update=update)
    again, _ = contract.train(
        tx, restored["params"], 2, restored["opt"], begin=3, update=update
    )
    contract.assert_same(again, on)


@pytest.mark.parametrize("kind", ["auto_mesh", "explicit_mesh"])
@pytest.mark.parametrize("update", ["step", "host"])
@pytest.mark.parametrize("allocation", ["uniform", "global_ranking"])
def test_leaves_of_one_shape_and_layers_spread_over_devices(
    kind, update, allocation, request
):
    """Column and row parallel kernels of one shape, and a stack split by layer."""
    mesh = request.getfixturevalue(kind)
    key = jax.random.key(5)
    params = {
        "out": jax.random.normal(key, (64, 128)),
        "query": jax.random.normal(jax.random.fold_in(key, 1), (64, 128)),
        "stack": jax.random.normal(jax.random.fold_in(key, 2), (8, 32, 64)),
    }
    specs = {"out": ("data", None), "query": (None, "data"), "stack": ("data",)}
    shardings = {k: NamedSharding(mesh, PartitionSpec(*s)) for k, s in specs.items()}
    sharded = jax.tree.map(jax.device_put, params, shardings)
    tx = jopt.prune(
        optax.sgd(1e-2),
        sparsity=0.5,
        allocation=getattr(jopt.allocation, allocation),
        stacked_axes={"stack": 0},
        update=update,
    )

    def one_step(params):
        state = tx.init(params)
        if update == "host":
            state = jopt.update_masks(tx, state, params)
        step = jax.jit(tx.update)
        if update == "step":
            hlo = step.lower(params, state, params).compile().as_text()
            assert_no_weight_sized_gather(hlo, 64 * 128)
        return step(params, state, params)[1].masks, state.masks

    alone, _ = one_step(params)
    with jax.set_mesh(mesh):
        together, before = one_step(sharded)
    contract.assert_same(jax.device_get(together), jax.device_get(alone))
    if update == "host" or kind == "explicit_mesh":
        for name, mask in before.items():
            assert mask.sharding.is_equivalent_to(
                NamedSharding(mesh, PartitionSpec(*specs[name])), mask.ndim
            ), name


@pytest.mark.parametrize("name", ["prune", "prune_global", "quantize_prune", "ste"])
def test_each_shard_by_itself_inside_shard_map(name, auto_mesh):
    """Varying axes are checked; what is not finite is counted over all devices."""
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    w = jax.random.normal(jax.random.key(2), (64, 16)).at[0, 0].set(jnp.nan)

    def step(w):
        state = tx.init({"w": w})
        updates, state = tx.update({"w": w}, state, {"w": w})
        count = optax.tree.get(state, "num_nonfinite")
        return optax.apply_updates({"w": w}, updates)["w"], count

    split = PartitionSpec("data")
    mapped = jax.shard_map(
        step, mesh=auto_mesh, in_specs=split, out_specs=(split, PartitionSpec())
    )
    together, count = jax.jit(mapped)(w)
    assert int(count) == 1
    for part, alone in zip(
        np.split(np.asarray(together), 8), np.split(w, 8), strict=True
    ):
        np.testing.assert_array_equal(part, jax.jit(step)(jnp.asarray(alone))[0])
