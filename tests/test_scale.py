"""What a mask update exchanges between devices: the formula of docs/scale.md."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from tests import contract, hlo

PER_READ = 4 * 4  # four probes; twice that where a layer has 2^31 scores or more


def compiled_update(mesh, rows, *, num_leaves=3, **options):
    """Compile an update of leaves that eight devices hold some rows of."""
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.9, **options)
    spread = NamedSharding(mesh, PartitionSpec("data", None))
    leaf = jax.device_put(np.ones((rows, 128), np.float32), spread)
    params = {f"w{i}": leaf for i in range(num_leaves)}
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        return jax.jit(tx.update).lower(params, state, params).compile()


@pytest.mark.parametrize("kind", ["auto_mesh", "explicit_mesh"])
def test_one_threshold_over_all_leaves_exchanges_counts(kind, request):
    mesh = request.getfixturevalue(kind)
    options = {"allocation": jopt.allocation.global_ranking}
    found = {}
    for rows, num_leaves in ((64, 3), (256, 3), (64, 6)):
        compiled = compiled_update(mesh, rows, num_leaves=num_leaves, **options)
        text = compiled.as_text()
        hlo.assert_only_counts_travel(text, rows * 128 * 4)
        in_loops = [c.num_bytes for loop in hlo.loops(text).values() for c in loop]
        # One loop reads for the threshold; others look for the last tie of each layer.
        assert in_loops.count(PER_READ) == 1
        assert all(b in (PER_READ, 4 * num_leaves) for b in in_loops)
        total = sum(c.num_bytes for c in hlo.collectives(text))
        assert total - sum(in_loops) <= 12 * num_leaves + 8
        found[rows, num_leaves] = total
    assert found[64, 3] == found[256, 3]  # nothing grows with the leaves


def test_uniform_masks_of_layers_on_several_axes_exchange_counts(auto_mesh):
    """Layers spread over devices, and weights spread over two axes of a mesh."""
    two = jax.make_mesh(
        (2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.9, stacked_axes=0)
    drawn = np.random.default_rng(0).normal(size=(8, 64, 128))
    stack = {"w": jax.device_put(drawn.astype(np.float32))}
    _, alone = jax.jit(tx.update)(stack, tx.init(stack), stack)
    for mesh, spec in (
        (auto_mesh, PartitionSpec("data", None, None)),
        (two, PartitionSpec(None, "a", "b")),
    ):
        sharded = jax.device_put(stack, {"w": NamedSharding(mesh, spec)})
        state = jax.jit(tx.init)(sharded)
        compiled = jax.jit(tx.update).lower(sharded, state, sharded).compile()
        hlo.assert_only_counts_travel(compiled.as_text(), 8 * 64 * 128 * 4)
        _, state = compiled(sharded, state, sharded)
        contract.assert_same(
            jax.device_get(jopt.get_masks(state)), jax.device_get(jopt.get_masks(alone))
        )


def test_members_of_an_ensemble_have_sparsities_of_their_own():
    """`vmap` over a traced sparsity: the masks that each member has alone."""
    sparsities = np.array([0.25, 0.5, 0.75], np.float32)
    members = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
    grads = contract.stack_grads({"w": members[0]}, 3)

    def train(sparsity, w):
        tx = jopt.prune(optax.sgd(0.1, momentum=0.9), sparsity=sparsity, every_steps=2)
        carry = {"w": w}, tx.init({"w": w})
        return jax.lax.scan(contract.make_step(tx), carry, grads)[0][0]["w"]

    together = np.asarray(jax.jit(jax.vmap(train))(sparsities, members))
    alone = jax.jit(train)
    for i, sparsity in enumerate(sparsities):
        expected = np.asarray(alone(sparsity, members[i]))
        np.testing.assert_array_equal(together[i] != 0, expected != 0)
        # Momentum is fused in another way, to an ulp.
        np.testing.assert_allclose(together[i], expected, rtol=1e-6)
        assert int((together[i] == 0).sum()) == round(float(sparsity) * 128)
