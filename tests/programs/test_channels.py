"""Factors that leaves exchange: any numbers leave the function what it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.programs import channels, sites

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def find(apply, params, *inputs):
    analysis = sites.analyse(apply, params, inputs, {})
    return analysis, *channels.find_groups(analysis, params)


def exchanged(params, group):
    """Multiply what makes the channels by random factors, and divide what reads."""
    leaves, treedef = jax.tree.flatten(params)
    factors = np.exp(RNG.normal(size=group.size)).astype(np.float32)
    for links, power in ((group.made, 1), (group.read, -1)):
        for leaf, channel in links:
            by = np.where(channel < 0, 1, factors[channel]) ** power
            leaves[leaf] = leaves[leaf] * by
    return treedef.unflatten(leaves)


def split(params, x):
    """One product in two halves, one of them masked, beside a gate."""
    left, right = jnp.split(x @ params["fused"], 2, axis=-1)
    right = jnp.where(right > 0, right, 0.0) * jax.nn.sigmoid(x @ params["gate"])
    return jax.nn.relu(left) @ params["a"] + jnp.cumsum(right, axis=0) @ params["b"]


def test_slices_of_one_product_go_to_readers_of_their_own():
    shapes = {"fused": (3, 8), "gate": (3, 4), "a": (4, 2), "b": (4, 2)}
    params = {name: normal(*shape) for name, shape in shapes.items()}
    x = normal(5, 3)
    analysis, (group,), left = find(split, params, x)
    assert (group.source, group.size, group.sites) == ("fused", 8, ("a", "b"))
    names = list(analysis.table.leaves)
    by_leaf = {names[link.leaf]: link.channel.ravel() for link in group.read}
    np.testing.assert_array_equal(by_leaf["a"], np.arange(4))
    np.testing.assert_array_equal(by_leaf["b"], np.arange(4, 8))
    got = split(exchanged(params, group), x)
    np.testing.assert_allclose(got, split(params, x), rtol=1e-4, atol=1e-5)
    assert set(left) == {"gate", "a", "b"}


REASONS = {
    "returns": lambda p, x: x @ p["a"],
    "tanh does not pass": lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    "max joins it with what is not scaled": lambda p, x: (
        jnp.maximum(x @ p["a"], 1.0) @ p["b"]
    ),
    "add joins it with what is not scaled": lambda p, x: (x + x @ p["a"]) @ p["b"],
    "multiplied by itself": lambda p, x: ((x @ p["a"]) @ (x @ p["a"]).T) @ x,
    "reduce_sum does not pass": lambda p, x: jnp.sum(x @ p["a"], axis=1) @ x,
    "'b' multiplies something else": lambda p, x: x @ p["a"] @ p["b"] + x @ p["b"],
    "'b' is used by": lambda p, x: x @ p["a"] @ p["b"] + jnp.sum(p["b"]),
    "carried through a loop": lambda p, x: jax.lax.fori_loop(
        0, 3, lambda i, y: y * 2, x @ p["a"]
    ),
    "enters a cond": lambda p, x: jax.lax.cond(
        x[0, 0] > 0, lambda y: y @ p["b"], lambda y: y, x @ p["a"]
    ),
    "no leaf": lambda p, x: (x @ p["a"]) @ (p["b"] + 1.0),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_ends_factors_is_named(reason):
    params, x = {"a": normal(4, 4), "b": normal(4, 4)}, normal(4, 4)
    _, groups, left = find(REASONS[reason], params, x)
    assert "a" not in [group.source for group in groups]
    assert reason in left["a"], left["a"]
