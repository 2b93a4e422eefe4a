"""Straight-through masks against NumPy: dense latents, sparse params, SR-STE's pull."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt.updates import moments
from tests import contract

SHAPE = (8, 16)


def kernel_params(seed=0):
    return {"kernel": jax.random.normal(jax.random.key(seed), SHAPE)}


def top_mask(scores, sparsity):
    """Keep the largest, ties to the lower index."""
    flat = np.asarray(scores, np.float64).ravel()
    mask = np.zeros(flat.size, bool)
    kept = flat.size - round(sparsity * flat.size)
    mask[np.argsort(-flat, kind="stable")[:kept]] = True
    return mask.reshape(np.shape(scores))


def nm_mask(scores, n, m):
    """Keep n of every m down the rows."""
    groups = np.moveaxis(np.asarray(scores, np.float64), 0, -1)
    shape = groups.shape
    groups = groups.reshape(-1, m)
    ranks = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1)
    return np.moveaxis((ranks < n).reshape(shape), -1, 0)


class Sgd:
    """SGD with momentum."""

    inner = optax.sgd(0.1, momentum=0.9)

    def __init__(self):
        self.trace = np.zeros(SHAPE)

    def step(self, g):
        self.trace = g + 0.9 * self.trace
        return -0.1 * self.trace


class Adam:
    """Adam with bias correction."""

    inner = optax.adam(0.1)

    def __init__(self):
        self.mu, self.nu, self.t = np.zeros(SHAPE), np.zeros(SHAPE), 0

    def step(self, g):
        self.t += 1
        self.mu = 0.9 * self.mu + 0.1 * g
        self.nu = 0.999 * self.nu + 0.001 * g**2
        mu, nu = self.mu / (1 - 0.9**self.t), self.nu / (1 - 0.999**self.t)
        return -0.1 * mu / (np.sqrt(nu) + 1e-8)


@pytest.mark.parametrize("optimizer", [Sgd, Adam])
def test_ste_follows_its_definition_step_by_step(optimizer):
    """Begin, beat, end and ramp; zeros exact; latents dense."""
    ramp = jopt.schedules.linear_sparsity(0.25, 0.75, begin_step=2, end_step=6)
    tx = jopt.ste(
        optimizer.inner, sparsity=ramp, every_steps=2, begin_step=2, end_step=7
    )
    params = kernel_params()
    state, oracle, update = tx.init(params), optimizer(), jax.jit(tx.update)
    latent, mask = np.asarray(params["kernel"], np.float64), np.ones(SHAPE, bool)
    for step in range(10):
        grads = contract.make_grads(params, step)
        latent = latent + oracle.step(np.asarray(grads["kernel"], np.float64))
        if step in (2, 4, 6, 7):
            mask = top_mask(np.abs(latent), float(ramp(step)))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(state.latent["kernel"], latent, rtol=2e-4, atol=1e-5)
        np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], mask)
        np.testing.assert_array_equal(np.asarray(params["kernel"]) != 0, mask)
        np.testing.assert_allclose(
            params["kernel"], np.where(mask, latent, 0), rtol=2e-4, atol=1e-5
        )
    contract.assert_same(jopt.apply_masks(params, jopt.get_masks(state)), params)


@pytest.mark.parametrize("optimizer", [Sgd, Adam])
def test_sr_ste_follows_its_definition_for_ten_steps(optimizer):
    tx = jopt.sr_ste(optimizer.inner, decay=0.3, pattern=jopt.NM(2, 4))
    params = kernel_params()
    state, oracle, update = tx.init(params), optimizer(), jax.jit(tx.update)
    latent, mask = np.asarray(params["kernel"], np.float64), np.ones(SHAPE, bool)
    for step in range(10):
        grads = contract.make_grads(params, step)
        g = np.asarray(grads["kernel"], np.float64) + 0.3 * (1 - mask) * latent
        latent = latent + oracle.step(g)
        mask = nm_mask(np.abs(latent), 2, 4)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], mask)
        np.testing.assert_allclose(state.latent["kernel"], latent, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(
            params["kernel"], np.where(mask, latent, 0), rtol=2e-4, atol=1e-5
        )


def test_sr_ste_without_decay_is_ste():
    options = {"sparsity": 0.5}
    first, _ = contract.train(
        jopt.ste(optax.adam(0.1), **options), contract.make_params()
    )
    second, _ = contract.train(
        jopt.sr_ste(optax.adam(0.1), decay=0.0, **options), contract.make_params()
    )
    contract.assert_same(first, second)


def test_masked_latents_move_and_weights_come_back():
    tx = jopt.ste(optax.sgd(1.0), sparsity=0.5)
    params = {"w": jnp.array([[4.0, 2.0]])}
    grads = {"w": jnp.array([[0.0, -1.5]])}
    state = tx.init(params)
    kept = []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        kept.append(np.asarray(params["w"][0]).tolist())
    assert kept == [[4.0, 0.0], [0.0, 5.0], [0.0, 6.5]]


@pytest.mark.parametrize(
    "pattern",
    [jopt.NM(2, 4), jopt.NM(1, 4, axis=-1), jopt.Block((4, 4)), jopt.Channel()],
)
def test_patterns(pattern):
    sparsity = None if isinstance(pattern, jopt.NM) else 0.5
    tx = jopt.ste(optax.sgd(0.1), sparsity=sparsity, pattern=pattern)
    params, state = contract.train(tx, kernel_params(), num_steps=2)
    latent = state.latent["kernel"]
    expected = jopt.make_mask(jnp.abs(latent), sparsity=sparsity, pattern=pattern)
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], expected)
    np.testing.assert_array_equal(params["kernel"] != 0, expected)


def test_rules_and_stacked_layers():
    layers = jnp.stack([kernel_params(i)["kernel"] * 10.0**i for i in range(3)])
    params = {"layers": layers, "head": kernel_params(5)["kernel"], "bias": jnp.ones(4)}
    tx = jopt.ste(
        optax.sgd(0.0),
        sparsity={"layers": 0.75, "head": None},
        pattern={".*": jopt.Unstructured()},
        stacked_axes={"layers": 0},
    )
    new, state = contract.train(tx, params, num_steps=2)
    masks = jopt.get_masks(state)
    assert isinstance(masks["head"], optax.MaskedNode)
    assert isinstance(state.latent["head"], optax.MaskedNode)
    for i in range(3):
        np.testing.assert_array_equal(
            masks["layers"][i], top_mask(np.abs(layers[i]), 0.75)
        )
    contract.assert_same(new["head"], params["head"])


def test_scores_see_the_new_latent_and_the_gradient_that_moved_it():
    tx = jopt.ste(optax.sgd(0.5), sparsity=0.5, scores=jopt.scores.saliency)
    params = kernel_params()
    grads = contract.make_grads(params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    g = np.asarray(grads["kernel"])
    latent = np.asarray(params["kernel"]) - np.float32(0.5) * g
    expected = top_mask(np.abs(latent * g), 0.5)
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], expected)


def test_scores_see_moments_of_the_inner_optimizer():
    """Adam's second moment, found under the latents, before the step."""
    score = jopt.scores.Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=lambda inputs, state: inputs.context * inputs.param**2,
        context=lambda params, state: moments.find_moment(state, params, "nu"),
    )
    tx = jopt.ste(optax.adam(0.1), sparsity=0.5, scores=score, begin_step=1)
    params = kernel_params()
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(2):
        nu = np.asarray(optax.tree.get(state, "nu")["kernel"])
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    expected = top_mask(nu * np.asarray(state.latent["kernel"]) ** 2, 0.5)
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], expected)


def test_latents_of_half_precision_params():
    tx = jopt.ste(optax.sgd(0.1), sparsity=0.5)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), kernel_params())
    params, state = contract.train(tx, params)
    assert state.latent["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        params["kernel"] != 0, jopt.get_masks(state)["kernel"]
    )


def test_quantized_after_it_is_masked():
    """Latents of latents: `quantize_weights` snaps what the mask keeps."""
    tx = jopt.quantize_weights(jopt.ste(optax.sgd(0.1), sparsity=0.5), contract.INT8)
    params, state = contract.train(tx, kernel_params(), num_steps=3)
    mask = np.asarray(jopt.get_masks(state)["kernel"])
    assert mask.sum() == 64 and not np.any(np.asarray(params["kernel"])[~mask])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jopt.ste(optax.sgd(1.0)), "sparsity must be given"),
        (lambda: jopt.ste(3, sparsity=0.5), "inner must be an Optax"),
        (
            lambda: jopt.ste(optax.sgd(1.0), sparsity=0.5, every_steps=0),
            "every_steps must be",
        ),
        (
            lambda: jopt.ste(optax.sgd(1.0), sparsity=0.5, scores=jopt.scores.random()),
            "key must be given",
        ),
        (
            lambda: jopt.ste(
                optax.sgd(1.0),
                pattern=jopt.NM(2, 4),
                allocation=jopt.allocation.global_ranking,
            ),
            "allocation must be uniform",
        ),
        (
            lambda: jopt.sr_ste(optax.sgd(1.0), decay=-1.0, sparsity=0.5),
            "decay must be at least 0",
        ),
    ],
)
def test_wrong_arguments_raise_at_construction(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()
