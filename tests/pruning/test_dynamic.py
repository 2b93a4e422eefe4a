"""Training that is sparse from the start, against NumPy, pattern by pattern."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt.updates import resets
from tests import contract

KERNEL = (8, 16)


def kernel_params(seed=0):
    drawn = np.random.default_rng(seed).normal(size=KERNEL)
    return {"kernel": jax.device_put(drawn.astype(np.float32))}


def kept_by(scores, k):
    """The k largest, ties to the lower index."""
    flat = np.asarray(scores, np.float64).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    return mask.reshape(np.shape(scores))


def moved(mask, weights, growth, fraction):
    """RigL's rule: drop the smallest kept weights, grow the best of all others."""
    num_kept = int(mask.sum())
    num_dropped = int(np.round(np.float32(fraction * num_kept)))
    survivors = kept_by(np.where(mask, np.abs(weights), -1.0), num_kept - num_dropped)
    return survivors | kept_by(np.where(survivors, -1.0, growth), num_dropped)


def test_rigl_follows_its_definition_step_by_step():
    """Masks, params and Adam's moments of six steps, in NumPy."""
    fraction = optax.cosine_decay_schedule(0.5, 8)
    tx = jopt.rigl(
        optax.adam(0.1), sparsity=0.75, drop_fraction=fraction, every_steps=2
    )
    params = kernel_params()
    state = tx.init(params)
    mask = np.asarray(jopt.get_masks(state)["kernel"])
    assert mask.sum() == 32
    w = np.asarray(params["kernel"], np.float64)
    mu, nu = np.zeros(KERNEL), np.zeros(KERNEL)
    update = jax.jit(tx.update)
    for step in range(6):
        grads = contract.make_grads(params, step)
        g = np.asarray(grads["kernel"], np.float64)
        if step % 2 == 0:
            new = moved(mask, w, np.abs(g), float(fraction(step)))
            mu[new & ~mask], nu[new & ~mask] = 0, 0
            mask = new
        g = np.where(mask, g, 0)
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
        corrected = mu / (1 - 0.9 ** (step + 1))
        scale = np.sqrt(nu / (1 - 0.999 ** (step + 1))) + 1e-8
        w = np.where(mask, w - 0.1 * corrected / scale, 0)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], mask)
        np.testing.assert_allclose(params["kernel"], w, rtol=2e-4, atol=1e-6)
        assert not np.any(np.asarray(params["kernel"])[~mask])


def test_snfs_grows_by_the_average_gradient():
    tx = jopt.snfs(
        optax.sgd(0.0),
        sparsity=0.75,
        drop_fraction=0.5,
        decay=0.5,
        redistribute=False,
        begin_step=2,
    )
    params = kernel_params()
    state = tx.init(params)
    old = np.asarray(jopt.get_masks(state)["kernel"])
    average = np.zeros(KERNEL)
    update = jax.jit(tx.update)
    for step in range(3):
        grads = contract.make_grads(params, step)
        average = 0.5 * average + 0.5 * np.asarray(grads["kernel"])
        weights = np.asarray(params["kernel"])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = moved(old, weights, np.abs(average), 0.5)
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], expected)


def test_snfs_gives_what_grows_to_the_layers_of_large_momentum():
    # With a decay that is exact, so are the averages, and their parts of the sum.
    tx = jopt.snfs(optax.sgd(0.0), sparsity=0.75, drop_fraction=0.5, decay=0.5)
    params = {name: kernel_params(i)["kernel"] for i, name in enumerate("abc")}
    grads = {"a": 3.0, "b": 1.0, "c": 0.0}
    grads = {name: np.full(KERNEL, value, "f") for name, value in grads.items()}
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    masks = jopt.get_masks(state)
    # 32 are kept and 16 dropped of each; 48 grow as 3 : 1 : 0.
    assert [int(masks[name].sum()) for name in "abc"] == [52, 28, 16]


def test_snfs_fills_a_layer_and_hands_on_the_rest():
    tx = jopt.snfs(optax.sgd(0.0), sparsity=0.25, drop_fraction=0.9)
    params = {name: kernel_params(i)["kernel"] for i, name in enumerate("ab")}
    grads = {"a": np.ones(KERNEL, "f"), "b": np.zeros(KERNEL, "f")}
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    masks = jopt.get_masks(state)
    assert [int(masks[name].sum()) for name in "ab"] == [128, 64]


def test_set_draws_what_grows_and_differs_from_count_to_count():
    tx = jopt.set_(optax.sgd(0.0), sparsity=0.75, drop_fraction=0.5, every_steps=1)
    params = kernel_params()
    state = tx.init(params)
    update = jax.jit(tx.update)
    seen = [np.asarray(jopt.get_masks(state)["kernel"])]
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(jopt.get_masks(state)["kernel"]))
    assert all(mask.sum() == 32 for mask in seen)
    grown = [after & ~before for before, after in itertools.pairwise(seen)]
    assert all(8 <= g.sum() <= 16 for g in grown)
    assert not np.array_equal(grown[0], grown[1])


PATTERNS = [jopt.NM(2, 4), jopt.NM(1, 4, axis=-1), jopt.Block((4, 4)), jopt.Channel()]


@pytest.mark.parametrize(
    ("wrapper", "pattern"),
    [(jopt.rigl, pattern) for pattern in PATTERNS]
    # What grows is of another kind; what a pattern does with it is not.
    + [
        pytest.param(
            wrapper,
            pattern,
            marks=() if pattern == default else pytest.mark.exhaustive,
        )
        for wrapper, default in ((jopt.set_, PATTERNS[2]), (jopt.snfs, PATTERNS[1]))
        for pattern in PATTERNS
    ],
)
def test_patterns_hold_while_masks_move(wrapper, pattern):
    sparsity = None if isinstance(pattern, jopt.NM) else 0.5
    tx = wrapper(
        optax.adam(0.1),
        sparsity=sparsity,
        pattern=pattern,
        drop_fraction=0.5,
        every_steps=1,
    )
    # A seed whose draws of the few blocks do not lead back to the first ones.
    params = kernel_params(1)
    state = tx.init(params)
    first = np.asarray(jopt.get_masks(state)["kernel"])
    params, state = contract.train(tx, params, num_steps=4, state=state)
    mask = np.asarray(jopt.get_masks(state)["kernel"])
    assert not np.array_equal(first, mask)
    for m in (first, mask):
        assert_pattern(m, pattern)
    np.testing.assert_array_equal(np.asarray(params["kernel"]) != 0, mask)


def assert_pattern(mask, pattern):
    if isinstance(pattern, jopt.NM):
        groups = np.moveaxis(mask, pattern.axis, -1).reshape(-1, pattern.m)
        assert (groups.sum(-1) == pattern.n).all()
    elif isinstance(pattern, jopt.Block):
        blocks = mask.reshape(2, 4, 4, 4).sum((1, 3))
        assert set(np.unique(blocks)) == {0, 16} and (blocks > 0).sum() == 4
    else:
        assert set(np.unique(mask.sum(0))) == {0, 8} and mask.sum() == 64


def test_rigl_fills_the_groups_that_dropped_under_nm():
    tx = jopt.rigl(optax.sgd(0.0), pattern=jopt.NM(2, 4, axis=-1), drop_fraction=0.25)
    params = kernel_params()
    state = tx.init(params)
    old = np.asarray(jopt.get_masks(state)["kernel"]).reshape(-1, 4)
    grads = contract.make_grads(params)
    _, state = jax.jit(tx.update)(grads, state, params)
    w = np.abs(np.asarray(params["kernel"])).reshape(-1, 4)
    g = np.abs(np.asarray(grads["kernel"])).reshape(-1, 4)
    survivors = kept_by(np.where(old, w, -1), 48)
    expected = survivors.copy()
    for group, s, growth in zip(expected, survivors, g, strict=True):
        others = np.argsort(-np.where(s, -1, growth))[: 2 - s.sum()]
        group[others] = True
    mask = np.asarray(jopt.get_masks(state)["kernel"]).reshape(-1, 4)
    np.testing.assert_array_equal(mask, expected)


def test_moments_of_grown_weights_start_as_init_makes_them():
    """Rprop starts at a step size, schedule-free at the params: not at zero."""
    params = kernel_params()
    grown = {"kernel": np.arange(128).reshape(KERNEL) % 3 == 0}
    for inner in (
        optax.rprop(0.5),
        optax.contrib.schedule_free_sgd(0.1),
        optax.inject_hyperparams(optax.adagrad)(learning_rate=0.1),
        optax.MultiSteps(optax.chain(optax.clip(1.0), optax.lion(0.1)), 2),
        optax.partition(
            {"a": optax.adam(0.1)}, lambda p: jax.tree.map(lambda _: "a", p)
        ),
    ):
        _, state = contract.train(inner, params, num_steps=3)
        reset = jax.jit(functools.partial(resets.reset_where, inner))(
            state, params, grown
        )
        fresh, kernels = inner.init(params), 0
        for new, old, first in zip(
            *map(jax.tree.leaves, (reset, state, fresh)), strict=True
        ):
            is_kernel = np.shape(new) == KERNEL
            kernels += is_kernel
            expected = np.where(grown["kernel"], first, old) if is_kernel else old
            np.testing.assert_array_equal(new, expected)
        assert kernels >= 1


def test_the_first_mask_follows_the_initialisation_or_the_key():
    def first(seed, key=None):
        tx = jopt.static_sparse(optax.sgd(0.1), sparsity=0.5, key=key)
        return np.asarray(jopt.get_masks(tx.init(kernel_params(seed)))["kernel"])

    np.testing.assert_array_equal(first(0), first(0))
    assert not np.array_equal(first(0), first(1))
    key = jax.random.key(3)
    np.testing.assert_array_equal(first(0, key), first(1, key))


def test_static_takes_masks_of_others_and_keeps_them():
    params = contract.make_params()
    masks = jopt.make_masks(params, sparsity=0.5)
    tx = jopt.static_sparse(optax.adam(0.1), masks=masks)
    trained, state = contract.train(tx, params)
    contract.assert_same(jopt.get_masks(state), masks)
    np.testing.assert_array_equal(
        trained["dense"]["kernel"] != 0, masks["dense"]["kernel"]
    )
    assert bool((trained["dense"]["bias"] != 0).all())
    optax.tree.map_params(tx, lambda x: x, state)  # calls init on no tree


def test_gradients_of_pruned_weights_do_not_reach_the_moments():
    tx = jopt.static_sparse(optax.adam(0.1), sparsity=0.5)
    _, state = contract.train(tx, kernel_params())
    mask = np.asarray(jopt.get_masks(state)["kernel"])
    mu = np.asarray(optax.tree.get(state, "mu")["kernel"])
    np.testing.assert_array_equal(mu != 0, mask)


def test_stacked_layers_move_each_by_itself():
    stack = np.stack([kernel_params(i)["kernel"] for i in range(3)])
    scale = np.array([1.0, 10.0, 100.0], np.float32)[:, None, None]
    tx = jopt.rigl(
        optax.sgd(0.0),
        sparsity=0.5,
        drop_fraction=0.5,
        stacked_axes=0,
        allocation=jopt.allocation.uniform,
    )
    params = {"w": jax.device_put(stack * scale)}
    state = tx.init(params)
    old = np.asarray(jopt.get_masks(state)["w"])
    _, state = jax.jit(tx.update)(params, state, params)
    new = np.asarray(jopt.get_masks(state)["w"])
    for i in range(3):
        w = np.asarray(params["w"][i])
        np.testing.assert_array_equal(new[i], moved(old[i], w, np.abs(w), 0.5))


def test_non_finite_weights_are_dropped_first_and_counted():
    params = kernel_params()
    tx = jopt.rigl(optax.sgd(0.0), sparsity=0.5, drop_fraction=0.1)
    state = tx.init(params)
    where = np.argwhere(np.asarray(jopt.get_masks(state)["kernel"]))[0]
    broken = np.array(params["kernel"])
    broken[tuple(where)] = np.nan
    params, grads = {"kernel": broken}, {"kernel": np.ones(KERNEL, "f")}
    _, state = jax.jit(tx.update)(grads, state, params)
    assert int(state.num_nonfinite) == 1
    assert int(jopt.get_masks(state)["kernel"].sum()) == 64


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jopt.rigl(optax.sgd(1.0)), "sparsity must be given"),
        (
            lambda: jopt.rigl(optax.sgd(1.0), sparsity=0.5, drop_fraction=2.0),
            "drop_fraction must be in",
        ),
        (
            lambda: jopt.rigl(optax.sgd(1.0), sparsity=0.5, every_steps=0),
            "every_steps must be",
        ),
        (
            lambda: jopt.rigl(optax.sgd(1.0), pattern=jopt.NM(2, 4), sparsity=0.5),
            "sparsity must be None",
        ),
        (lambda: jopt.snfs(optax.sgd(1.0), sparsity=0.5, decay=1.0), "decay must be"),
        (
            lambda: jopt.static_sparse(optax.sgd(1.0), sparsity=0.5, masks={}),
            "masks must be given alone",
        ),
        (lambda: jopt.set_(3, sparsity=0.5), "inner must be an Optax"),
        (
            lambda: jopt.set_(
                optax.sgd(1.0), sparsity=0.5, scores=jopt.scores.random()
            ),
            "without memory",
        ),
    ],
)
def test_wrong_arguments_raise_at_construction(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


def test_masks_that_do_not_fit_raise():
    masks = {"kernel": jnp.ones((4, 4), bool)}
    tx = jopt.static_sparse(optax.sgd(1.0), masks=masks)
    with pytest.raises(ValueError, match="masks must fit 'kernel'"):
        tx.init(kernel_params())
