"""SNIP, GraSP and SynFlow: closed forms, finite differences, and what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt

scores = jopt.scores


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def wide(x):
    return np.asarray(x, np.float64)


def regression(params, x, y):
    """A quadratic in w, beside leaves that are no floats."""
    return jnp.mean((x @ params["w"] - y) ** 2) / 2


def problem(num_batches=3):
    params = {"w": normal(5), "steps": jnp.int32(3), "name": None}
    batches = [
        (normal(8, 5, seed=i), normal(8, seed=9 + i)) for i in range(num_batches)
    ]
    return params, batches


def gradient_and_hessian(params, batches):
    """Of the mean loss over batches, in closed form."""
    w = wide(params["w"])
    pairs = [(wide(x), wide(y)) for x, y in batches]
    grad = np.mean([x.T @ (x @ w - y) / len(y) for x, y in pairs], axis=0)
    hessian = np.mean([x.T @ x / len(y) for x, y in pairs], axis=0)
    return w, grad, hessian


def test_snip_is_the_saliency_of_the_mean_loss():
    params, batches = problem()
    w, grad, _ = gradient_and_hessian(params, batches)
    found = scores.snip(regression, params, iter(batches))
    np.testing.assert_allclose(found["w"], np.abs(w * grad), rtol=1e-5)
    assert isinstance(found["steps"], optax.MaskedNode)
    assert found["name"] is None


def test_grasp_is_w_times_hessian_times_gradient():
    params, batches = problem()
    w, grad, hessian = gradient_and_hessian(params, batches)
    found = scores.grasp(regression, params, batches)
    np.testing.assert_allclose(found["w"], w * (hessian @ grad), rtol=1e-4)
    assert isinstance(found["steps"], optax.MaskedNode)


def test_grasp_removes_what_the_gradient_flow_needs_least():
    """By removing weights: the flow that is left is largest where scores are lowest."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(64, 12)) / 8
    hessian = jnp.asarray(a.T @ a, jnp.float32)
    w, shift = normal(12, seed=1), normal(12, seed=2)

    def loss(params):
        d = params["w"] - shift
        return d @ hessian @ d / 2

    def flow(w):
        return float(jnp.sum(jax.grad(loss)({"w": w})["w"] ** 2))

    found = wide(scores.grasp(lambda params, _: loss(params), {"w": w}, [0.0])["w"])
    # Of a small part of one weight, the change is -2 w (H g) times that part.
    part = 1e-2
    changes = np.array([flow(w.at[i].multiply(1 - part)) - flow(w) for i in range(12)])
    np.testing.assert_allclose(changes, -2 * part * found, rtol=0.1, atol=2e-3)
    # Removed whole, the lowest scores leave the most flow, the highest the least.
    order = np.argsort(found)
    lowest, highest = flow(w.at[order[:3]].set(0)), flow(w.at[order[-3:]].set(0))
    assert highest < flow(w) < lowest
    mask = jopt.make_masks(
        {"w": w},
        sparsity=0.25,
        scores={"w": jnp.asarray(found)},
        select=lambda path, leaf: True,
    )
    np.testing.assert_array_equal(np.flatnonzero(~mask["w"]), np.sort(order[:3]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_params_give_wide_scores(dtype):
    """H is linear: gradients that are 0 in float16 do not make it 0."""
    w, x = normal(4, seed=3, dtype=dtype), normal(4, seed=4, dtype=dtype)

    def loss(params, x):
        return jnp.sum(x**2 * params["w"] ** 2).astype(jnp.float32) * 1e-3

    for fn, power in ((scores.snip, 1), (scores.grasp, 2)):
        found = fn(loss, {"w": w}, [x])["w"]
        assert found.dtype == jnp.float32
        curvature = 2e-3 * wide(x) ** 2
        np.testing.assert_allclose(found, curvature**power * wide(w) ** 2, rtol=0.02)
    apply = lambda params, x: 1e3 * (x @ params["w"])  # noqa: E731
    found = scores.synflow(apply, {"w": 100 * w}, jnp.zeros((9, 4)))["w"]
    np.testing.assert_allclose(found, 9e3 * np.abs(wide(100 * w)), rtol=1e-5)


def test_snip_and_grasp_run_under_jit_and_choose_across_layers():
    params = {"a": normal(6, 4), "b": normal(4, 2, seed=1)}
    batches = [normal(3, 6, seed=2), normal(3, 6, seed=3)]

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2

    for fn in (scores.snip, scores.grasp):
        alone = fn(loss, params, batches)
        inside = jax.jit(lambda p, fn=fn: fn(loss, p, batches))(params)
        for k in params:
            np.testing.assert_allclose(inside[k], alone[k], rtol=1e-4, atol=1e-7)
        masks = jopt.make_masks(
            params,
            scores=alone,
            sparsity=0.5,
            allocation=jopt.allocation.global_ranking,
        )
        assert sum(int(m.sum()) for m in masks.values()) == 16


def test_errors_of_batches():
    params, batches = problem()
    for fn in (scores.snip, scores.grasp):
        with pytest.raises(ValueError, match="at least one item, got none"):
            fn(regression, params, [])
        with pytest.raises(TypeError, match="batches must be an iterable"):
            fn(regression, params, 3)
        with pytest.raises(ValueError, match="params must have a float leaf"):
            fn(regression, {"n": jnp.int32(1)}, batches)
    with pytest.raises(TypeError, match="iterable twice"):
        scores.grasp(regression, params, iter(batches))


# ---- SynFlow


def network(params, x):
    """Three layers of rectifiers with a shortcut, no biases."""
    h = jax.nn.relu(x @ params["first"])
    h = h + jax.nn.relu(h @ params["second"])
    return h @ params["third"]


def network_params():
    return {
        "first": normal(6, 5),
        "second": normal(5, 5, seed=1),
        "third": normal(5, 3, seed=2),
        "steps": jnp.int32(0),
    }


def test_synflow_against_paths():
    """Every weight scores the sum over all paths through it, and layers conserve R."""
    params = network_params()
    a, b, c = (np.abs(wide(params[k])) for k in ("first", "second", "third"))
    found = scores.synflow(network, params, jax.ShapeDtypeStruct((1, 6), jnp.float32))
    ones, out = np.ones(6), np.ones(3)
    h = ones @ a
    total = (h + h @ b) @ c @ out
    back = c @ out + b @ c @ out
    np.testing.assert_allclose(found["first"], a * np.outer(ones, back), rtol=1e-5)
    np.testing.assert_allclose(found["second"], b * np.outer(h, c @ out), rtol=1e-5)
    after = h + h @ b
    np.testing.assert_allclose(found["third"], c * np.outer(after, out), rtol=1e-5)
    for layer in ("first", "third"):
        np.testing.assert_allclose(wide(found[layer]).sum(), total, rtol=1e-5)
    assert isinstance(found["steps"], optax.MaskedNode)


def deep(depth):
    keys = jax.random.split(jax.random.key(0), depth)
    weights = [
        jax.random.normal(k, (32, 32)) * width
        for k, width in zip(keys, np.linspace(0.5, 4, depth), strict=True)
    ]

    def apply(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    return apply, weights


def test_synflow_of_a_deep_model_overflows_loudly_and_scales():
    apply, weights = deep(24)
    x = jnp.zeros((1, 32))
    with pytest.raises(ValueError, match=r"one that overflows.*scale=2.0\*\*-60"):
        scores.synflow(apply, weights, x)
    found = scores.synflow(apply, weights, x, scale=2.0**-60)
    # The oracle, in float64.
    ups = [np.ones((1, 32))]
    for w in weights:
        ups.append(ups[-1] @ np.abs(wide(w)))
    down = np.ones((1, 32))
    for w, up, actual in zip(weights[::-1], ups[-2::-1], found[::-1], strict=True):
        expected = np.abs(wide(w)) * (up.T @ down) * 2.0**-120
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
        down = down @ np.abs(wide(w)).T
    with pytest.raises(ValueError, match="got none"):
        scores.synflow(apply, [0 * w for w in weights], x)
    with pytest.raises(ValueError, match="scale must be positive"):
        scores.synflow(apply, weights, x, scale=0.0)


def test_synflow_in_rounds_keeps_every_layer_where_once_cuts_one():
    params = {"wide": normal(64, 64), "narrow": normal(64, 2, seed=1)}
    params["last"] = normal(2, 64, seed=2)

    def apply(params, x):
        for name in ("wide", "narrow", "last"):
            x = jax.nn.relu(x @ params[name])
        return x

    x = jnp.zeros((1, 64))

    def flow(params):
        return scores.synflow(apply, params, x)

    options = {"sparsity": 0.995, "allocation": jopt.allocation.global_ranking}
    rounds = jopt.iterative_masks(flow, params, rounds=20, **options)
    kept = {k: int(m.sum()) for k, m in rounds.items()}
    assert min(kept.values()) > 0
    size = sum(w.size for w in params.values())
    assert sum(kept.values()) == size - round(0.995 * size)
    pruned = jopt.apply_masks(params, rounds)
    assert wide(apply(jax.tree.map(jnp.abs, pruned), jnp.ones((1, 64)))).sum() > 0
    # Conservation: a layer cut by magnitude alone has no flow at all.
    once = jopt.make_masks({**params, "narrow": 1e-3 * params["narrow"]}, **options)
    assert not once["narrow"].any()


def test_synflow_scores_tokens_and_biases():
    params = {"table": normal(7, 4), "bias": jnp.array([0.5, -1.0, 0.0, 2.0])}

    def apply(params, tokens):
        return params["table"][tokens] + params["bias"][None, None]

    tokens = jnp.array([[1, 1, 5]])
    found = scores.synflow(apply, params, tokens)
    expected = np.abs(wide(params["table"])) * np.array(
        [[0], [2], [0], [0], [0], [1], [0]]
    )
    np.testing.assert_allclose(found["table"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["bias"], 3 * np.abs(params["bias"]))
    shapes = jax.ShapeDtypeStruct((1, 3), jnp.int32)  # zeros: the first token
    found = scores.synflow(apply, params, shapes)
    assert not found["table"][1:].any() and found["table"][0].any()
