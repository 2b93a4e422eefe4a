"""Calls that users write, as they write them, on the blocks of one small model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jopt

WIDTH = 16


def make_params():
    rng = np.random.default_rng(0)
    blocks = {f"{i}": {"kernel": normal(rng, WIDTH, WIDTH)} for i in range(3)}
    return {"blocks": blocks, "head": {"kernel": normal(rng, WIDTH, 4)}}


def normal(rng, *shape):
    return jax.device_put(rng.normal(size=shape).astype(np.float32))


def apply(params, x):
    for block in params["blocks"].values():
        x = x + jnp.tanh(x @ block["kernel"])
    return x @ params["head"]["kernel"]


def train(tx, params, num_steps):
    x = normal(np.random.default_rng(9), 32, WIDTH)
    loss = lambda params: jnp.mean(apply(params, x) ** 2)  # noqa: E731

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


def sparsity_of(leaf):
    return 1 - np.count_nonzero(leaf) / leaf.size


def test_prune_with_scores_and_an_allocation():
    ramp = jopt.schedules.cubic_sparsity(0.0, 0.8, begin_step=0, end_step=200)
    tx = jopt.prune(
        optax.lion(1e-4),
        sparsity=ramp,
        every_steps=100,
        scores=jopt.scores.saliency(decay=0.9),
        allocation=jopt.allocation.erk,
        pattern=jopt.Unstructured(),
        select=jopt.matching("blocks/.*/kernel"),
    )
    params, state = train(tx, make_params(), 201)
    masks = jopt.get_masks(state)
    kept = sum(int(m.sum()) for m in jax.tree.leaves(masks["blocks"]))
    assert kept == 3 * WIDTH**2 - round(0.8 * 3 * WIDTH**2)
    for block, mask in zip(
        jax.tree.leaves(params["blocks"]), jax.tree.leaves(masks["blocks"]), strict=True
    ):
        assert not np.any(np.asarray(block)[~np.asarray(mask)])
    assert sparsity_of(params["head"]["kernel"]) == 0


def test_rigl_around_accumulated_gradients():
    tx = jopt.rigl(
        optax.MultiSteps(optax.adamw(1e-3), 4),
        sparsity=0.9,
        drop_fraction=jopt.schedules.cosine_drop(0.3, 10_000),
        every_steps=100,
    )
    before = jopt.get_masks(tx.init(make_params()))
    params, state = train(tx, make_params(), 401)
    after = jopt.get_masks(state)
    moved = 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert int(old.sum()) == int(new.sum())
        moved += int(np.sum(np.asarray(old) != np.asarray(new)))
    assert moved > 0
    for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert not np.any(np.asarray(leaf)[~np.asarray(mask)])


def test_one_shot_with_a_sparsity_and_a_pattern():
    params = make_params()
    batches = [normal(np.random.default_rng(i), 64, WIDTH) for i in range(2)]
    sparse_params, masks, report = jopt.sparsegpt(apply, params, batches, sparsity=0.5)
    assert {row.sparsity for row in report} == {0.5}
    assert len(report) == 4
    sparse_params, masks, report = jopt.wanda(
        apply, params, batches, pattern=jopt.NM(2, 4)
    )
    for leaf, mask in zip(
        jax.tree.leaves(sparse_params), jax.tree.leaves(masks), strict=True
    ):
        groups = np.asarray(mask).reshape(4, 4, -1)
        assert (groups.sum(1) == 2).all()
        assert not np.any(np.asarray(leaf)[~np.asarray(mask)])
    sparse_params, masks, report = jopt.sparsegpt(
        apply, params, batches, pattern=jopt.NM(2, 4)
    )
    assert all(row.error < 1 for row in report)
