"""The promises on meshes: same bits, nothing gathered; pmap; checkpoints."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from tests import contract

every_wrapper = pytest.mark.parametrize("name", contract.WRAPPERS)


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, kind) for kind in ("auto_mesh", "explicit_mesh") for n in contract.WRAPPERS],
)
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
    contract.assert_same(jax.device_get(together), jax.device_get(alone))
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


@every_wrapper
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


@every_wrapper
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
