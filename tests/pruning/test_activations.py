"""Sparse activations against NumPy: dots, convolutions, scans, gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt


def top_k(x, k, axis):
    """Keep the k largest |x| along an axis, ties to the lower index."""
    x = np.asarray(x)
    order = np.argsort(-np.abs(x), axis=axis, kind="stable")
    ranks = np.argsort(order, axis=axis, kind="stable")
    return np.where(ranks < k, x, 0)


def test_keeps_exactly_the_largest_of_each_row():
    x = jax.random.normal(jax.random.key(0), (5, 16))
    w = jax.random.normal(jax.random.key(1), (16, 3))
    sparse = jopt.sparsify_activations(lambda p, x: x @ p["w"], sparsity=0.7)
    expected = top_k(x, 16 - round(0.7 * 16), 1) @ np.asarray(w)
    np.testing.assert_allclose(sparse({"w": w}, x), expected, rtol=1e-5, atol=1e-6)
    # A traced sparsity, and inside jit.
    traced = jax.jit(
        lambda s: jopt.sparsify_activations(lambda p, x: x @ p["w"], sparsity=s)(
            {"w": w}, x
        )
    )
    np.testing.assert_allclose(traced(0.7), expected, rtol=1e-5, atol=1e-6)


def test_two_of_every_four_inputs():
    x = jax.random.normal(jax.random.key(0), (5, 16))
    sparse = jopt.sparsify_activations(lambda p, x: x @ p, pattern=jopt.NM(2, 4))
    expected = top_k(np.asarray(x).reshape(5, 4, 4), 2, 2).reshape(5, 16)
    np.testing.assert_array_equal(sparse(jnp.eye(16), x), expected)


def test_several_contracted_axes_are_one_row():
    """Attention's output: [token, head, feature] meets [head, feature, out]."""
    x = jax.random.normal(jax.random.key(0), (5, 4, 6))
    w = jax.random.normal(jax.random.key(1), (4, 6, 3))
    for equation, order in (("thf,hfo->to", (0, 1, 2)), ("tfh,hfo->to", (0, 2, 1))):
        apply = lambda p, x, e=equation: jnp.einsum(e, x, p)  # noqa: E731
        given = jnp.transpose(x, order)
        kept = top_k(np.asarray(x).reshape(5, 24), 12, 1)
        found = jopt.sparsify_activations(apply, sparsity=0.5)(w, given)
        expected = kept @ np.asarray(w).reshape(24, 3)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_has_a_row_of_channels_at_each_place():
    conv = nn.Conv(4, (3, 3), use_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8))
    params = conv.init(jax.random.key(1), x)
    found = jopt.sparsify_activations(conv.apply, sparsity=0.75)(params, x)
    expected = conv.apply(params, jnp.asarray(top_k(x, 2, 3)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass_straight_through():
    x = jax.random.normal(jax.random.key(0), (5, 16))
    w = jax.random.normal(jax.random.key(1), (16, 3))
    sparse = jopt.sparsify_activations(lambda p, x: x @ p, sparsity=0.5)
    by_w, by_x = jax.grad(lambda w, x: sparse(w, x).sum(), argnums=(0, 1))(w, x)
    np.testing.assert_allclose(by_x, jnp.ones((5, 3)) @ w.T, rtol=1e-5)
    np.testing.assert_allclose(by_w, top_k(x, 8, 1).T @ np.ones((5, 3)), rtol=1e-5)


def test_layers_of_a_scan_and_members_of_an_ensemble():
    layers = jax.random.normal(jax.random.key(0), (3, 8, 8)) / 3
    x = jax.random.normal(jax.random.key(1), (4, 8))

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]

    sparse = jopt.sparsify_activations(apply, sparsity=0.5)
    expected = np.asarray(x)
    for w in np.asarray(layers):
        expected = np.tanh(top_k(expected, 4, 1) @ w)
    np.testing.assert_allclose(sparse(layers, x), expected, rtol=1e-5, atol=1e-6)
    many = jax.vmap(sparse, in_axes=(None, 0))(layers, x[:, None])
    np.testing.assert_allclose(many[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_selects_by_name():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    params = {"a": jnp.eye(8), "b": jnp.eye(8)}
    sparse = jopt.sparsify_activations(
        lambda p, x: (x @ p["a"], x @ p["b"]),
        sparsity=0.5,
        select=jopt.matching("b"),
    )
    a, b = sparse(params, x)
    np.testing.assert_array_equal(a, x)
    np.testing.assert_array_equal(b, top_k(x, 4, 1))


@pytest.mark.parametrize("kind", ["auto_mesh", "explicit_mesh"])
def test_on_a_mesh(kind, request):
    mesh = request.getfixturevalue(kind)
    x = jax.random.normal(jax.random.key(0), (8, 16))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
    sparse = jopt.sparsify_activations(lambda p, x: x @ p, sparsity=0.5)
    expected = sparse(jnp.eye(16), x)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = sparse(jax.device_put(jnp.eye(16), whole), jax.device_put(x, rows))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "sparsity must be given"),
        ({"sparsity": 1.5}, "sparsity must be in"),
        ({"sparsity": 0.5, "pattern": jopt.NM(2, 4)}, "sparsity must be None"),
        ({"sparsity": 0.5, "pattern": jopt.Channel()}, "pattern must be"),
    ],
)
def test_wrong_arguments_raise_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        jopt.sparsify_activations(lambda p, x: x @ p, **options)


def test_what_does_not_fit_raises_when_called():
    sparse = jopt.sparsify_activations(lambda p, x: x @ p["w"], pattern=jopt.NM(2, 4))
    with pytest.raises(ValueError, match="input of w"):
        sparse({"w": jnp.ones((6, 2))}, jnp.ones((1, 6)))
    none = jopt.sparsify_activations(
        lambda p, x: x @ p["w"], sparsity=0.5, select=lambda name, site: False
    )
    with pytest.raises(ValueError, match="select must choose"):
        none({"w": jnp.ones((4, 2))}, jnp.ones((1, 4)))
