"""Masks of a tree without an optimizer: once, and in rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import contract


def kept_by(scores, k):
    flat = np.asarray(scores, np.float64).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    return mask.reshape(np.shape(scores))


def test_takes_functions_trees_and_scores_with_memory():
    params = contract.make_params()
    grads = contract.make_grads(params)
    w, g = (np.asarray(t["head"]["kernel"]) for t in (params, grads))
    tree = jax.tree.map(lambda x: -jnp.abs(x), params)
    for scores, expected in (
        (jopt.scores.magnitude, np.abs(w)),
        (jopt.scores.saliency, np.abs(w * g)),
        (jopt.scores.saliency(decay=0.9), np.abs(w * g)),
        (tree, -np.abs(w)),
    ):
        masks = jopt.make_masks(params, sparsity=0.75, scores=scores, grads=grads)
        np.testing.assert_array_equal(masks["head"]["kernel"], kept_by(expected, 32))
        assert isinstance(masks["dense"]["bias"], optax.MaskedNode)


def test_rules_give_leaves_patterns_and_sparsities():
    masks = jopt.make_masks(
        contract.make_params(),
        sparsity={"head/.*": 0.25},
        pattern={"dense/kernel": jopt.NM(1, 4), ".*": jopt.Unstructured()},
    )
    assert int(masks["head"]["kernel"].sum()) == 96
    groups = np.asarray(masks["dense"]["kernel"]).reshape(2, 4, 16)
    assert (groups.sum(1) == 1).all()


def test_scores_that_read_gradients_ask_for_them():
    params = contract.make_params()
    for scores in (jopt.scores.saliency, jopt.scores.movement()):
        with pytest.raises(ValueError, match="grads must be given"):
            jopt.make_masks(params, sparsity=0.5, scores=scores)
    with pytest.raises(ValueError, match="key must be given"):
        jopt.make_masks(params, sparsity=0.5, scores=jopt.scores.random())
    with pytest.raises(ValueError, match="scores must be a function"):
        jopt.make_masks(params, sparsity=0.5, scores={"dense": jnp.ones(3)})


def test_the_host_sees_averages_as_the_step_does():
    """Masks of averaged scores between steps are those inside of them."""
    options = {
        "sparsity": 0.5,
        "every_steps": 2,
        "scores": jopt.scores.saliency(decay=0.5),
    }
    params = contract.make_params()
    tx = jopt.prune(optax.sgd(0.1), **options)
    host = jopt.prune(optax.sgd(0.1), **options, update="host")
    a, b = (params, tx.init(params)), (params, host.init(params))
    for step in range(4):
        grads = contract.make_grads(params, step)
        updates, state = tx.update(grads, a[1], a[0])
        a = optax.apply_updates(a[0], updates), state
        state = jopt.update_masks(host, b[1], b[0], grads=grads)
        updates, state = host.update(grads, state, b[0])
        b = optax.apply_updates(b[0], updates), state
        contract.assert_same(jopt.get_masks(a[1]), jopt.get_masks(b[1]))


def test_rounds_keep_a_layer_that_one_round_would_remove():
    """SynFlow on a chain whose middle layer is small."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((32, 32), (32, 2), (2, 32))
    params = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]

    def apply(params, x):
        for w in params:
            x = x @ w
        return x

    flow = lambda p: jopt.scores.synflow(apply, p, jnp.ones((1, 32)))  # noqa: E731
    masks = jopt.iterative_masks(flow, params, sparsity=0.97, rounds=50)
    kept = [int(mask.sum()) for mask in masks]
    size = sum(w.size for w in params)
    assert sum(kept) == size - round(0.97 * size)
    assert min(kept) > 0
    # What is left still lets something through.
    left = jopt.apply_masks([jnp.abs(w) for w in params], masks)
    assert float(apply(left, jnp.ones((1, 32))).sum()) > 0


def test_rounds_nest_and_refuse_what_overflows():
    params = {"w": jax.random.normal(jax.random.key(0), (16, 16))}
    flow = lambda p: jax.tree.map(jnp.square, p)  # noqa: E731
    last = np.ones((16, 16), bool)
    for sparsity in (0.3, 0.6, 0.9):
        masks = jopt.iterative_masks(flow, params, sparsity=sparsity, rounds=3)
        mask = np.asarray(masks["w"])
        assert not (mask & ~last).any()
        last = mask
    with pytest.raises(ValueError, match="score_fn must return finite"):
        jopt.iterative_masks(
            lambda p: jax.tree.map(lambda w: w / 0.0, p), params, sparsity=0.5
        )
