"""Clustering of trees: gradients to the centroids, execution, storage, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from tests import contract

RNG = np.random.default_rng(1)
X = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)


def make_params():
    return {
        "up": {"kernel": jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32)},
        "down": {
            "kernel": jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32),
            "bias": jnp.zeros(4),
        },
    }


PARAMS = make_params()


def apply(params, x):
    hidden = jax.nn.relu(x @ params["up"]["kernel"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"][None]


def values_of(w):
    return set(np.asarray(w).ravel().tolist())


def test_leaves_share_values_and_the_report_says_so():
    packed = jopt.cluster(PARAMS, 4)
    assert isinstance(packed["up"]["kernel"], jopt.ClusteredArray)
    assert packed["down"]["bias"] is PARAMS["down"]["bias"]
    assert len(values_of(packed["up"]["kernel"].to_array())) == 4
    report = jopt.report(packed)
    row = next(r for r in report.rows if r.path == "up/kernel")
    assert row.dtype == "4 clusters of 1" and row.bits == 2 + 32 * 4 / 128
    assert row.sparsity == 0 and row.nbytes == 32 + 16
    floats = jopt.dequantize(packed)
    np.testing.assert_array_equal(
        floats["up"]["kernel"], packed["up"]["kernel"].to_array()
    )


@pytest.mark.parametrize("run", [jopt.execute, None], ids=["execute", "dequantize"])
def test_the_gradient_of_a_centroid_is_the_sum_over_its_weights(run):
    """As in Deep Compression, equation 3; an exact zero gets none and stays."""
    w = jnp.where(jnp.abs(PARAMS["up"]["kernel"]) < 0.5, 0, PARAMS["up"]["kernel"])
    params = PARAMS | {"up": {"kernel": w}}
    packed = jopt.cluster(params, 4, preserve_zeros=True)
    books = jopt.get_codebooks(packed)
    assert books["up"]["kernel"].shape == (1, 3, 1)

    def loss(run, params):
        return jnp.sum(jnp.sin(run(params, X)))

    def of_books(books):
        params = jopt.set_codebooks(packed, books)
        if run is None:
            return loss(apply, jopt.dequantize(params))
        return loss(run(apply), params)

    grads = jax.jit(jax.grad(of_books))(books)
    dense = jax.grad(lambda p: loss(apply, p))(jopt.dequantize(packed))
    np.testing.assert_allclose(grads["down"]["bias"], dense["down"]["bias"], rtol=1e-5)
    for name in ("up", "down"):
        q, g = packed[name]["kernel"], np.asarray(dense[name]["kernel"], np.float64)
        shared = np.asarray(q.to_array())
        sums = [g[shared == c].sum() for c in np.asarray(q.codebook)[0, :, 0]]
        np.testing.assert_allclose(
            grads[name]["kernel"][0, :, 0], sums, rtol=1e-4, atol=1e-5
        )
    state = optax.adam(0.1).init(books)
    updates, _ = optax.adam(0.1).update(grads, state, books)
    trained = jopt.set_codebooks(packed, optax.apply_updates(books, updates))
    np.testing.assert_array_equal(trained["up"]["kernel"].to_array() == 0, w == 0)
    with pytest.raises(ValueError, match="codebooks must have the shape"):
        jopt.set_codebooks(packed, params)


def test_execute_and_rewrite_take_clustered_leaves():
    packed = jopt.cluster(PARAMS, 8, vector_size=2, key=jax.random.key(0))
    expected = apply(jopt.dequantize(packed), X)
    np.testing.assert_allclose(jopt.execute(apply)(packed, X), expected, rtol=1e-6)
    same = jopt.rewrite(apply, jopt.Handler(lambda use: use.run()))
    np.testing.assert_allclose(same(packed, X), expected, rtol=1e-6)

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    stack = {"w": jnp.asarray(RNG.normal(size=(3, 8, 8)), jnp.float32)}
    packed = jopt.cluster(stack, 4, stacked_axes=0)
    assert packed["w"].codebook.shape == (3, 1, 4, 1)
    expected = scanned(jopt.dequantize(packed), X)
    np.testing.assert_allclose(jopt.execute(scanned)(packed, X), expected, rtol=1e-6)


def test_saved_and_restored(tmp_path):
    packed = jopt.cluster(PARAMS, 5, rows_per_codebook=4, preserve_zeros=True)
    jopt.save(tmp_path / "packed", packed)
    restored = jopt.restore(tmp_path / "packed")
    contract.assert_same(restored, packed)
    assert jax.tree.structure(restored) == jax.tree.structure(packed)


def test_importance_and_keys():
    h = {"up": {"kernel": jnp.ones((8, 1)).at[0].set(1e6)}, "down": jnp.ones(())}
    packed = jopt.cluster(PARAMS, 4, importance=h)
    near = jnp.abs(packed["up"]["kernel"].to_array() - PARAMS["up"]["kernel"])
    plain = jopt.cluster(PARAMS, 4)["up"]["kernel"].to_array()
    plain = jnp.abs(plain - PARAMS["up"]["kernel"])
    assert float(near[0].sum()) < float(plain[0].sum())

    def draw(seed):
        options = {"start": "k-means++", "key": jax.random.key(seed), "iterations": 0}
        return jopt.cluster(PARAMS, 4, **options)["up"]["kernel"].codebook

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


@pytest.mark.parametrize("preserve_zeros", [False, True])
def test_training_keeps_params_on_few_values_and_ships_them(preserve_zeros):
    inner = optax.adam(3e-2)
    if preserve_zeros:
        inner = jopt.prune(inner, sparsity=0.5)
    tx = jopt.cluster_weights(inner, 8, preserve_zeros=preserve_zeros)
    target = X @ jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean((apply(p, X) - target) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = PARAMS, tx.init(PARAMS), []
    for i in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
        if i > 0:  # the first step starts from params off the grid
            assert len(values_of(params["up"]["kernel"])) <= 8
    assert losses[-1] < 0.3 * losses[1]
    for name in ("up", "down"):
        w = params[name]["kernel"]
        if preserve_zeros:
            assert int((w == 0).sum()) == w.size // 2
    packed = jopt.cluster(
        params, codebooks=jopt.get_centroids(state), preserve_zeros=preserve_zeros
    )
    contract.assert_same(jopt.dequantize(packed), params)
    assert packed["up"]["kernel"].num_clusters == 8
    assert step._cache_size() == 1


def test_training_begins_later_and_layers_keep_their_own():
    stack = {"w": jnp.asarray(RNG.normal(size=(3, 4, 8)), jnp.float32)}
    tx = jopt.cluster_weights(optax.sgd(0.1), 2, begin_step=2, stacked_axes=0)
    params, state = stack, tx.init(stack)
    update = jax.jit(tx.update)
    for count in range(4):
        updates, state = update({"w": jnp.full((3, 4, 8), 0.1)}, state, params)
        params = optax.apply_updates(params, updates)
        if count < 2:
            expected = stack["w"] - 0.01 * (count + 1)
            np.testing.assert_allclose(params["w"], expected, rtol=1e-5)
    assert [len(values_of(layer)) for layer in params["w"]] == [2, 2, 2]
    assert len(values_of(params["w"])) == 6


def test_sharded_leaves_get_the_same_codes(auto_mesh):
    w = jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32)
    sharding = NamedSharding(auto_mesh, PartitionSpec("data", None))
    cluster = jax.jit(lambda w: jopt.cluster(w, 4))
    alone, together = cluster(w), cluster(jax.device_put(w, sharding))
    np.testing.assert_allclose(together.codebook, alone.codebook, atol=1e-6)
    assert (together.codes == alone.codes).mean() > 0.99


def test_empty_trees_and_projecting_packed_ones():
    assert jopt.cluster({}) == {}
    empty = {"w": jnp.zeros((0, 4))}
    with pytest.raises(ValueError, match=r"weights to cluster, got shape .* for 'w'"):
        jopt.cluster(empty)
    with pytest.raises(ValueError, match=r"weights to cluster, got shape .* for 'w'"):
        jopt.cluster_weights(optax.sgd(0.1)).init(empty)
    with pytest.raises(TypeError, match="got a ClusteredArray at 'down/kernel'"):
        jopt.cluster_weights(optax.sgd(0.1)).init(jopt.cluster(PARAMS))
    with pytest.raises(ValueError, match="a state without"):
        jopt.get_centroids(optax.sgd(0.1).init(PARAMS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clusters": 1}, "from 2 to 65536, got 1"),
        ({"vector_size": 0}, "vector_size must be an integer of at least 1"),
        ({"vector_size": 3, "key": jax.random.key(0)}, "divide the last axis of 'd"),
        ({"vector_size": 2}, "must have a key"),
        ({"vector_size": 2, "preserve_zeros": True}, "preserve_zeros must be False"),
        ({"rows_per_codebook": 3}, "divide the rows of 'down/kernel'"),
        (
            {"stacked_axes": {".*/kernel": 1}, "select": lambda p, w: w.ndim == 2},
            "be 0",
        ),
        ({"select": jopt.matching("nothing")}, "matches none"),
        ({"codebooks": PARAMS}, "codebooks must be"),
    ],
)
def test_what_does_not_fit_raises(options, message):
    with pytest.raises(ValueError, match=message) as error:
        jopt.cluster(PARAMS, **options)
    assert "\n" not in str(error.value)
