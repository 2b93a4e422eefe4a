"""Faults of earlier pruning libraries that must not be possible here.

One test for each that was seen in JaxPruner on current JAX, in the order of that list.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from tests import contract, hlo

MOVING = {
    "set": contract.moving(jopt.set_, sparsity=0.5, every_steps=1),
    "rigl": contract.moving(jopt.rigl, sparsity=0.5, every_steps=1),
}


def normal(*shape):
    drawn = np.random.default_rng(0).normal(size=shape)
    return jax.device_put(drawn.astype(np.float32))


every_moving = pytest.mark.parametrize("name", MOVING)


def test_1_nothing_that_jax_removed_is_called():
    for file in Path(jopt.__file__).parent.rglob("*.py"):
        assert "jax.tree_map(" not in file.read_text(), file


@every_moving
def test_2_leaves_without_a_mask_are_no_structure_error(name):
    tx = MOVING[name](optax.sgd(0.1))
    params, state = contract.train(tx, contract.make_params(), num_steps=2)
    assert isinstance(jopt.get_masks(state)["dense"]["bias"], optax.MaskedNode)
    assert bool((params["dense"]["bias"] != 0).all())


def test_3_states_keep_their_types_whatever_the_optimizer():
    """All of Optax is in test_contract_optimizers; here, that no type is rebuilt."""
    inner = optax.MultiSteps(optax.inject_hyperparams(optax.lion)(learning_rate=0.1), 2)
    tx = MOVING["rigl"](inner)
    before = tx.init(contract.make_params())
    _, after = contract.train(tx, contract.make_params(), num_steps=3)
    assert jax.tree.structure(after) == jax.tree.structure(before)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda inner: jopt.static_sparse(inner, sparsity=0.5),
        *MOVING.values(),
        lambda inner: jopt.prune(
            inner, sparsity=0.5, scores=jopt.scores.random(), key=jax.random.key(0)
        ),
    ],
)
def test_4_packed_masks_are_never_numbers_in_a_gradient(wrapper):
    tx = wrapper(optax.sgd(1.0))
    params = {"kernel": normal(8, 8)}
    state = tx.init(params)
    assert jax.tree.leaves(state.masks)[0].dtype == jnp.uint8
    grads = {"kernel": np.ones((8, 8), np.float32)}
    updates, state = jax.jit(tx.update)(grads, state, params)
    mask = np.asarray(jopt.get_masks(state)["kernel"])
    expected = np.where(mask, -1.0, -np.asarray(params["kernel"]))
    np.testing.assert_array_equal(updates["kernel"], expected)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        (jopt.Unstructured(), "auto_mesh"),
        (jopt.NM(2, 4), "explicit_mesh"),
        pytest.param(
            jopt.Unstructured(), "explicit_mesh", marks=pytest.mark.exhaustive
        ),
        pytest.param(jopt.NM(2, 4), "auto_mesh", marks=pytest.mark.exhaustive),
    ],
)
def test_5_sharded_leaves_are_ranked_where_they_lie(kind, pattern, request):
    mesh = request.getfixturevalue(kind)
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    params = {"w": normal(256, 128)}
    sparsity = 0.9 if isinstance(pattern, jopt.Unstructured) else None
    tx = jopt.prune(optax.sgd(0.1), sparsity=sparsity, pattern=pattern)
    _, alone = jax.jit(tx.update)(params, tx.init(params), params)
    sharded = jax.device_put(params, {"w": rows})
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(sharded)
        step = jax.jit(tx.update).lower(sharded, state, sharded).compile()
        _, state = step(sharded, state, sharded)
    contract.assert_same(
        jax.device_get(jopt.get_masks(state)), jax.device_get(jopt.get_masks(alone))
    )
    found = hlo.collectives(step.as_text())
    largest = max((c.num_bytes for c in found), default=0)
    assert largest < 256 * 128 * 4 / 100, found


def test_6_any_pytree_will_do():
    kernel, bias = normal(8, 16), normal(16)
    trees = [
        {"layers": [{"w": kernel}, (kernel, bias)]},
        nnx.state(nnx.Linear(8, 16, rngs=nnx.Rngs(0))),
        eqx.filter(eqx.nn.Linear(8, 16, key=jax.random.key(0)), eqx.is_array),
    ]
    for params in trees:
        tx = MOVING["rigl"](optax.adam(0.1))
        state = tx.init(params)
        (trained, state), _ = jax.jit(contract.make_step(tx))((params, state), params)
        assert jax.tree.structure(trained) == jax.tree.structure(params)
        masks = jax.tree.leaves(jopt.get_masks(state))
        assert all(int(mask.sum()) == 64 for mask in masks)


def test_7_masks_are_found_and_enforced_however_deep():
    tx = optax.MultiSteps(
        optax.chain(optax.clip(1.0), jopt.prune(optax.sgd(0.1), sparsity=0.5)), 2
    )
    params, state = contract.train(tx, contract.make_params(), num_steps=4)
    mask = jopt.get_masks(state)["dense"]["kernel"]
    np.testing.assert_array_equal(params["dense"]["kernel"] != 0, mask)


def test_8_extra_arguments_reach_the_inner_optimizer():
    tx = MOVING["rigl"](optax.polyak_sgd(0.1))
    params = contract.make_params()
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state, params, value=np.float32(1.0))


def test_9_ac_dc_alternates_and_prints_nothing():
    tx = jopt.ac_dc(
        optax.sgd(0.1), sparsity=0.5, dense_steps=2, compressed_steps=2, end_step=6
    )
    params = contract.make_params()
    state = tx.init(params)
    program = str(jax.make_jaxpr(tx.update)(params, state, params))
    assert "callback" not in program and "debug" not in program
    update, kept = jax.jit(tx.update), []
    for step in range(8):
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
        kept.append(int(jopt.get_masks(state)["dense"]["kernel"].sum()))
    assert set(kept) == {64, 128} and kept[-1] == 64


def test_10_a_pattern_that_is_none_says_what_would_be():
    with pytest.raises(TypeError, match=r"pattern must be Unstructured\(\), NM"):
        jopt.prune(optax.sgd(0.1), sparsity=0.5, pattern="2:4")


def test_11_schedules_and_patterns_are_not_ignored():
    with pytest.raises(ValueError, match="sparsity must be None"):
        jopt.prune(optax.sgd(0.1), sparsity=0.5, pattern=jopt.NM(2, 4))
    assert float(jopt.schedules.cubic_sparsity(0.3, 0.9, end_step=10)(0)) > 0.29
    tx = jopt.prune(
        optax.sgd(0.1),
        sparsity=0.75,
        pattern={"head/.*": jopt.NM(2, 4), ".*": jopt.Block((4, 4))},
    )
    _, state = contract.train(tx, contract.make_params(), num_steps=1)
    masks = jopt.get_masks(state)
    assert int(masks["head"]["kernel"].sum()) == 64
    blocks = np.asarray(masks["dense"]["kernel"]).reshape(2, 4, 4, 4).sum((1, 3))
    assert sorted(np.unique(blocks)) == [0, 16] and int((blocks > 0).sum()) == 2


@pytest.mark.parametrize("pattern", [jopt.Unstructured(), jopt.Block((4, 4))])
def test_12_no_stacked_layer_is_ranked_away(pattern):
    scale = np.array([1.0, 10.0, 100.0], np.float32)[:, None, None]
    stack = {"layers": jax.device_put(scale * np.asarray(normal(3, 8, 16)))}
    masks = jopt.make_masks(stack, sparsity=0.5, pattern=pattern, stacked_axes=0)
    assert [int(layer.sum()) for layer in masks["layers"]] == [64, 64, 64]


def test_13_keys_nan_and_counts():
    params = contract.make_params()

    def first(key):
        tx = jopt.static_sparse(optax.sgd(0.1), sparsity=0.5, key=key)
        state = tx.init(params)
        assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
        return np.asarray(jopt.get_masks(state)["head"]["kernel"])

    assert not np.array_equal(first(jax.random.key(0)), first(jax.random.key(1)))
    masks = jopt.make_masks(params, sparsity=0.5)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    clean = jopt.apply_masks(broken, masks)["head"]["kernel"]
    assert int((clean == 0).sum()) == 64
    from_python = jopt.allocation.uniform  # counts are integers of any size
    for size in (2**25 + 1, 2**31 + 3, 2**33 + 1):
        scores = jax.ShapeDtypeStruct((1, size), jnp.float32)
        units = [jopt.allocation.Units(scores, (0,))]
        (kept,) = from_python(units, 0.25)
        total = (int(kept.high[0]) << 16) + int(kept.low[0])
        assert total == size - round(0.25 * size)


def test_14_one_branch_a_step_and_no_branch_without_updates():
    params = {**contract.make_params(), "steps": jnp.arange(4)}
    grads = jax.tree.map(jnp.zeros_like, params)
    for tx, branches in (
        (MOVING["set"](optax.sgd(0.1)), 1),
        (jopt.static_sparse(optax.sgd(0.1), sparsity=0.5), 0),
    ):
        program = jax.make_jaxpr(tx.update)(grads, tx.init(params), params)
        names = [str(eqn.primitive) for eqn in program.jaxpr.eqns]
        assert names.count("cond") == branches
