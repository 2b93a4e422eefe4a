"""The promises on meshes: same bits, nothing gathered; pmap; checkpoints."""

import functools
import re

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from tests import contract


def draw(seed, **shapes):
    """Return params of these shapes, of normal numbers."""
    rng = np.random.default_rng(seed)
    drawn = {k: rng.normal(size=shape) for k, shape in shapes.items()}
    return jax.device_put({k: x.astype(np.float32) for k, x in drawn.items()})


PARAMS = draw(3, kernel=(64, 128), wide=(16, 256), bias=(128,))


SPECS = {"kernel": ("data", None), "wide": (None, "data"), "bias": ()}


def two_steps(name):
    """Return `(params, grads of two steps) -> params`, jitted."""
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))

    def run(params, grads):
        carry = params, tx.init(params)
        return jax.lax.scan(contract.make_step(tx), carry, grads)[0][0]

    return jax.jit(run)


@functools.cache
def on_one_device(name):
    return jax.device_get(two_steps(name)(PARAMS, contract.stack_grads(PARAMS, 2)))


# What is spread over devices in a way of its own: the others add schedules and copies.
DEFAULTS = {
    "explicit_mesh": [
        "project",
        "prune_global",
        "rigl",
        "ste",
        "quantize_learned",
        "quantize_prune",
    ],
    "auto_mesh": ["prune_global", "quantize_prune"],
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(
            name, kind, marks=() if name in defaults else pytest.mark.exhaustive
        )
        for name in contract.WRAPPERS
        for kind, defaults in DEFAULTS.items()
    ],
)
def test_sharded_equals_one_device(name, kind, request):
    mesh = request.getfixturevalue(kind)
    spread = {k: NamedSharding(mesh, PartitionSpec(*s)) for k, s in SPECS.items()}
    by_step = {
        k: NamedSharding(mesh, PartitionSpec(None, *s)) for k, s in SPECS.items()
    }
    sharded = jax.device_put(PARAMS, spread)
    grads = jax.device_put(contract.stack_grads(PARAMS, 2), by_step)
    with jax.set_mesh(mesh):
        compiled = two_steps(name).lower(sharded, grads).compile()
        together = jax.device_get(compiled(sharded, grads))
    alone = on_one_device(name)
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


@pytest.mark.parametrize(
    "name", contract.with_exhaustive(contract.WRAPPERS, but=["rigl"])
)
def test_pmap_with_an_axis_name(name):
    if name == "prune_host":
        pytest.skip("a host call is outside of pmap")
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params = contract.make_params()
    grads = contract.make_grads(params)

    def first_step(params, grads):
        return contract.make_step(tx)((params, tx.init(params)), grads)[0]

    def per_device(params, grads):
        return first_step(params, jax.lax.pmean(grads, "batch"))

    copies = jax.tree.map(lambda x: np.stack([x] * 8), (params, grads))
    together, _ = jax.pmap(per_device, axis_name="batch")(*copies)
    alone, _ = jax.jit(first_step)(params, grads)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        for copy in np.asarray(a):
            np.testing.assert_allclose(copy, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", contract.with_exhaustive(contract.WRAPPERS))
def test_restored_state_continues_bit_for_bit(name, tmp_path):
    tx = contract.WRAPPERS[name](optax.adamw(1e-2))
    update = jax.jit(tx.update)
    start = tx.init(contract.make_params())
    params, state = contract.train(tx, contract.make_params(), 3, start, update=update)
    tree = {"params": params, "opt": state}
    jopt.save(tmp_path / "ckpt", tree, step=3)
    like = {"params": contract.make_params(), "opt": start}
    restored = jopt.restore(tmp_path / "ckpt", like=like)
    contract.assert_same(restored, tree)
    on, _ = contract.train(tx, params, 2, state, begin=3, update=update)
    again, _ = contract.train(
        tx, restored["params"], 2, restored["opt"], begin=3, update=update
    )
    contract.assert_same(again, on)


LAYERS = draw(5, out=(64, 128), query=(64, 128), stack=(8, 32, 64))
LAYER_SPECS = {"out": ("data", None), "query": (None, "data"), "stack": ("data",)}


def masks_of(update, allocation, params):
    """Return masks before and after a step, and the step, compiled."""
    tx = jopt.prune(
        optax.sgd(1e-2),
        sparsity=0.5,
        allocation=getattr(jopt.allocation, allocation),
        stacked_axes={"stack": 0},
        update=update,
    )
    state = tx.init(params)
    if update == "host":
        state = jopt.update_masks(tx, state, params)
    step = jax.jit(tx.update).lower(params, state, params).compile()
    return state.masks, step(params, state, params)[1].masks, step


@functools.cache
def masks_on_one_device(update, allocation):
    return jax.device_get(masks_of(update, allocation, LAYERS)[1])


@pytest.mark.parametrize(
    ("kind", "update", "allocation"),
    [
        ("explicit_mesh", "step", "uniform"),
        ("auto_mesh", "step", "uniform"),
        ("auto_mesh", "host", "global_ranking"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("explicit_mesh", "step", "global_ranking"),
                ("auto_mesh", "step", "global_ranking"),
                ("explicit_mesh", "host", "global_ranking"),
                ("explicit_mesh", "host", "uniform"),
                ("auto_mesh", "host", "uniform"),
            )
        ),
    ],
)
def test_leaves_of_one_shape_and_layers_spread_over_devices(
    kind, update, allocation, request
):
    """Column and row parallel kernels of one shape, and a stack split by layer."""
    mesh = request.getfixturevalue(kind)
    spread = {k: NamedSharding(mesh, PartitionSpec(*s)) for k, s in LAYER_SPECS.items()}
    with jax.set_mesh(mesh):
        sharded = jax.device_put(LAYERS, spread)
        before, together, step = masks_of(update, allocation, sharded)
    alone = masks_on_one_device(update, allocation)
    contract.assert_same(jax.device_get(together), alone)
    if update == "step":
        assert_no_weight_sized_gather(step.as_text(), 64 * 128)
    if update == "host" or kind == "explicit_mesh":
        for name, mask in before.items():
            assert mask.sharding.is_equivalent_to(spread[name], mask.ndim), name


@pytest.mark.parametrize(
    "name",
    contract.with_exhaustive(
        ["prune", "prune_global", "quantize_prune", "ste"], but=["ste"]
    ),
)
def test_each_shard_by_itself_inside_shard_map(name, auto_mesh):
    """Varying axes are checked; what is not finite is counted over all devices."""
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    w = np.random.default_rng(2).normal(size=(64, 16)).astype(np.float32)
    w[0, 0] = np.nan

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
        np.testing.assert_array_equal(part, jax.jit(step)(alone)[0])
