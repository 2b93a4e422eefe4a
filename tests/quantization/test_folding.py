"""Folded models compute what they computed, with their norms doing nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jopt

RNG = np.random.default_rng(3)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def randomized(tree):
    """Replace every leaf, so that no scale is one and no mean zero."""
    return jax.tree.map(lambda leaf: jnp.abs(normal(*leaf.shape)) + 0.1, tree)


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen(use_bias):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (4, 6):
                x = nn.Conv(features, (3, 3), use_bias=use_bias)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    model, x = Model(), normal(2, 6, 6, 3)
    variables = model.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), variables["params"])
    stats = randomized(variables["batch_stats"])
    pairs = {f"Conv_{i}": f"BatchNorm_{i}" for i in range(2)}
    folded, still = jopt.fold_batch_norm(params, stats, pairs, epsilon=1e-3)
    want = model.apply({"params": params, "batch_stats": stats}, x)
    got = model.apply({"params": folded, "batch_stats": still}, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert bool((folded["BatchNorm_0"]["scale"] == 1).all())
    shift = folded["BatchNorm_1"]["bias"]
    assert bool((shift == 0).all()) == use_bias


def test_nnx_through_functional():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.conv(x)))

    apply, params, rest = jopt.functional(Model(nnx.Rngs(0)), mutable=True)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), params)
    rest = randomized(rest)
    folded, still = jopt.fold_batch_norm(params, rest, {"conv": "norm"})
    x = normal(2, 5, 5, 3)
    want, got = apply(params, rest, x)[0], apply(folded, still, x)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_paths_that_name_nothing_are_refused():
    params = {"conv": {"kernel": jnp.ones((1, 1, 2, 2))}}
    stats = {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    with pytest.raises(ValueError, match="got none at 'cnv/kernel'"):
        jopt.fold_batch_norm(params, stats, {"cnv": "norm"})
    with pytest.raises(ValueError, match="with a bias"):
        jopt.fold_batch_norm(params, stats, {"conv": "norm"})


def two_layers():
    kernel = jnp.ones((1, 1, 2, 3))
    params = {
        "a": {"kernel": kernel},
        "b": {"kernel": kernel},
        "norm": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
    }
    return params, {"norm": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}


def test_a_norm_that_two_layers_share_is_refused():
    params, stats = two_layers()
    with pytest.raises(ValueError, match=r"'norm' for \['a', 'b'\]; what is shared"):
        jopt.fold_batch_norm(params, stats, {"a": "norm", "b": "norm"})


@pytest.mark.parametrize("pairs", [{}, None, ["a"]])
def test_no_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match="at least one layer to its norm, got"):
        jopt.fold_batch_norm(*two_layers(), pairs)


def test_widths_must_agree():
    params, stats = two_layers()
    with pytest.raises(
        ValueError, match=r"axis 2 of 'a/kernel' with 2 and 'norm/mean'"
    ):
        jopt.fold_batch_norm(params, stats, {"a": "norm"}, axis=2)
    with pytest.raises(ValueError, match=r"axis must be one of 'a/kernel'"):
        jopt.fold_batch_norm(params, stats, {"a": "norm"}, axis=4)
    params["a"]["bias"] = jnp.ones(1)
    with pytest.raises(ValueError, match=r"'a/bias' of shape \(1,\)"):
        jopt.fold_batch_norm(params, stats, {"a": "norm"})


def test_packed_params_are_refused():
    params, stats = two_layers()
    packed = jopt.quantize(params, jopt.QuantSpec(jopt.formats.int8))
    with pytest.raises(TypeError, match="at 'a/kernel'; fold first, then quantize"):
        jopt.fold_batch_norm(packed, stats, {"a": "norm"})
