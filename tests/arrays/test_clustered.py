"""K-means against scikit-learn and the optimum; clustered arrays as they are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from jopt.arrays import clustered, kmeans

RNG = np.random.default_rng(0)


def inertia(x, centroids, h=1.0):
    """The objective, in float64, from every distance."""
    x, c = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    h = np.broadcast_to(h, x.shape)
    return (h[:, None] * (x[:, None] - c[None]) ** 2).sum(-1).min(-1).sum()


@pytest.mark.parametrize(("size", "num_clusters"), [(1, 8), (4, 16)])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_centroids_are_those_of_scikit_learn(size, num_clusters, is_weighted):
    """From the same start, with a weight per point, to the very end."""
    x = RNG.normal(size=(3000, size)).astype(np.float32)
    start = x[:num_clusters].copy()
    weight = RNG.uniform(0.1, 3, 3000) if is_weighted else np.ones(3000)
    oracle = KMeans(num_clusters, init=start, n_init=1, max_iter=300, tol=0)
    oracle.fit(x.astype(np.float64), sample_weight=weight)
    h = jnp.asarray(weight, jnp.float32)[:, None]
    found = kmeans.kmeans(
        jnp.asarray(x), jnp.asarray(start), importance=h, iterations=300
    )
    np.testing.assert_allclose(found, oracle.cluster_centers_, atol=2e-5)
    codes = kmeans.nearest_centroids(jnp.asarray(x), found)
    assert (np.asarray(codes) == oracle.labels_).mean() > 0.999
    np.testing.assert_allclose(
        inertia(x, found, weight[:, None]), oracle.inertia_, 1e-5
    )


def optimum(x, num_clusters):
    """The least inertia of numbers: intervals of the sorted ones, exact by tables."""
    x = np.sort(np.asarray(x, np.float64))
    n = len(x)
    total = np.concatenate([[0], np.cumsum(x)])
    square = np.concatenate([[0], np.cumsum(x * x)])

    def cost(i, j):  # of x[i:j]
        return square[j] - square[i] - (total[j] - total[i]) ** 2 / (j - i)

    best = np.array([0.0] + [cost(0, j) for j in range(1, n + 1)])
    for _ in range(num_clusters - 1):
        best = np.array(
            [0.0]
            + [min(best[i] + cost(i, j) for i in range(j)) for j in range(1, n + 1)]
        )
    return best[-1]


@pytest.mark.parametrize("num_clusters", [2, 4, 7])
def test_numbers_come_near_the_optimum_and_never_below(num_clusters):
    x = np.concatenate([RNG.normal(size=60), RNG.normal(size=20) * 0.1 + 3])
    best = optimum(x, num_clusters)
    points = jnp.asarray(x, jnp.float32)[:, None]
    reached = []
    for start in ("density", "linear", "k-means++"):
        first = kmeans.start_centroids(
            points, num_clusters, start=start, key=jax.random.key(0)
        )
        reached.append(inertia(points, kmeans.kmeans(points, first)))
        assert reached[-1] <= inertia(points, first) * (1 + 1e-6)
        assert reached[-1] >= best * (1 - 1e-5) - 1e-6
    assert min(reached) <= 1.5 * best + 1e-6  # a local minimum, as Lloyd's are


@pytest.mark.properties
@given(
    x=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=40),
    num_clusters=st.sampled_from([2, 5]),
)
def test_every_step_descends_and_what_rests_is_a_mean(x, num_clusters):
    points = jnp.pad(jnp.asarray(x, jnp.float32), (0, 40 - len(x)))[:, None]
    h = (jnp.arange(40) < len(x)).astype(jnp.float32)[:, None]
    c = kmeans.start_centroids(points, num_clusters, start="linear", importance=h)
    before = inertia(points, c, h)
    for _ in range(3):
        c = kmeans.kmeans(points, c, importance=h, iterations=1)
        after = inertia(points, c, h)
        assert after <= before * (1 + 1e-5) + 1e-5
        before = after
    c = kmeans.kmeans(points, c, importance=h)
    codes = np.asarray(kmeans.nearest_centroids(points, c, importance=h))[: len(x)]
    for code in set(codes):
        mean = np.asarray(x, np.float64)[codes == code].mean()
        np.testing.assert_allclose(c[code, 0], mean, atol=1e-5)


def test_equal_numbers_are_their_own_mean_bit_for_bit():
    values = jnp.asarray(RNG.normal(size=5), jnp.float32)
    x = jnp.asarray(RNG.choice(np.asarray(values), 4097))[:, None]
    np.testing.assert_array_equal(kmeans.kmeans(x, values[:, None])[:, 0], values)


def test_many_points_in_chunks_are_as_few():
    x = jnp.asarray(RNG.normal(size=(2**17 + 3, 1)), jnp.float32)
    start = kmeans.start_centroids(x, 16, start="density")
    one = kmeans.kmeans(x, start, iterations=1)
    codes = np.asarray(kmeans.nearest_centroids(x, start))
    wide = np.asarray(x, np.float64)[:, 0]
    expected = [wide[codes == k].mean() for k in range(16)]
    np.testing.assert_allclose(one[:, 0], expected, atol=1e-6)
    nearest = np.abs(wide[:, None] - np.asarray(start, np.float64)[None, :, 0])
    assert (nearest.argmin(1) == codes).mean() > 0.9999


def test_importance_of_each_number_of_a_vector():
    """Weighted per coordinate: by hand, from float64 distances and means."""
    x, h = RNG.normal(size=(200, 3)), RNG.uniform(0, 2, (200, 3))
    start = x[:4]
    distance = (h[:, None] * (x[:, None] - start[None]) ** 2).sum(-1)
    codes = distance.argmin(1)
    expected = [(h * x)[codes == k].sum(0) / h[codes == k].sum(0) for k in range(4)]
    found = kmeans.kmeans(
        *(jnp.asarray(a, jnp.float32) for a in (x, start)),
        importance=jnp.asarray(h, jnp.float32),
        iterations=1,
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_plus_plus_draws_far_points_and_follows_its_key():
    x = jnp.asarray(np.repeat([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], 50, 0), jnp.float32)
    draw = lambda seed: kmeans.start_centroids(  # noqa: E731
        x, 3, start="k-means++", key=jax.random.key(seed)
    )
    for seed in range(3):
        assert len(np.unique(np.asarray(draw(seed)), axis=0)) == 3
        np.testing.assert_array_equal(draw(seed), draw(seed))


def test_a_start_of_my_own_and_wrong_ones():
    x = jnp.ones((4, 1))
    mine = lambda points, h, count, key: jnp.zeros((count, 1))  # noqa: E731
    assert kmeans.start_centroids(x, 2, start=mine).shape == (2, 1)
    with pytest.raises(ValueError, match="must have a key"):
        kmeans.start_centroids(x, 2, start="k-means++")
    with pytest.raises(ValueError, match="vectors of 2"):
        kmeans.start_centroids(jnp.ones((4, 2)), 2, start="linear")
    with pytest.raises(ValueError, match="start must be"):
        kmeans.start_centroids(x, 2, start="random")


def test_moves_between_grid_points_are_exact():
    c = jnp.asarray(RNG.normal(size=(64, 1)) * 2.0 ** RNG.integers(-20, 3, (64, 1)))
    c = kmeans.on_grid(c.astype(jnp.float32), jnp.float32)[:, 0]
    p, t = jnp.meshgrid(c, c)
    np.testing.assert_array_equal(p + (t - p), t)


@pytest.mark.parametrize(
    ("shape", "num_clusters", "options", "bits"),
    [
        ((32, 64), 16, {}, 4 + 32 * 16 / 2048),
        ((32, 64), 5, {}, 3 + 32 * 5 / 2048),
        ((32, 64), 16, {"keeps_zero": True}, 4 + 32 * 15 / 2048),
        ((32, 64), 32, {"vector_size": 4}, 5 / 4 + 32 * 128 / 2048),
        ((32, 64), 4, {"num_blocks": 4}, 2 + 32 * 16 / 2048),
        ((4, 8, 64), 4, {"num_layer_axes": 1}, 2 + 32 * 16 / 2048),
        ((3, 3, 4, 10), 300, {}, 16 + 32 * 300 / 360),
    ],
)
def test_codes_are_packed_and_read_as_a_table_is(shape, num_clusters, options, bits):
    w = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    w = jnp.where(jnp.abs(w) < 0.3, 0, w) if "keeps_zero" in options else w
    book = clustered.find_codebook(
        w,
        num_clusters,
        start="k-means++",
        key=jax.random.key(0),
        iterations=3,
        **options,
    )
    keeps_zero = options.get("keeps_zero", False)
    q = clustered.assign_codes(w, book, keeps_zero=keeps_zero)
    assert q.shape == shape and q.dtype == w.dtype and q.num_clusters == num_clusters
    np.testing.assert_allclose(q.bits_per_weight, bits)
    # By hand: for each block of rows the nearest of its vectors.
    d, layers = book.shape[-1], options.get("num_layer_axes", 0)
    books = np.asarray(book, np.float64).reshape(-1, *book.shape[-2:])
    points = np.asarray(w, np.float64).reshape(len(books), -1, d)
    assert book.ndim == 3 + layers
    read = np.asarray(q.to_array()).reshape(points.shape)
    for c, x, y in zip(books, points, read, strict=True):
        y = y.astype(np.float64)
        if keeps_zero:
            np.testing.assert_array_equal(y[x == 0], 0)
            assert (y[x != 0] != 0).all()
            x, y = x[x != 0][:, None], y[x[:, 0] != 0]
        distance = ((x[:, None] - c[None]) ** 2).sum(-1)
        np.testing.assert_allclose(((x - y) ** 2).sum(-1), distance.min(-1), atol=1e-6)


def test_layers_scan_and_map_and_dtypes_stay():
    w = jnp.asarray(RNG.normal(size=(3, 8, 16)), jnp.bfloat16)
    book = clustered.find_codebook(w, 4, num_layer_axes=1)
    q = clustered.assign_codes(w, book)
    whole = q.to_array()
    assert whole.dtype == jnp.bfloat16
    _, by_scan = jax.lax.scan(lambda _, q: (None, q.to_array()), None, q)
    np.testing.assert_array_equal(by_scan, whole)
    np.testing.assert_array_equal(jax.vmap(lambda q: q.to_array())(q), whole)
    for i in range(3):
        alone = clustered.find_codebook(w[i], 4)
        np.testing.assert_array_equal(alone, book[i])


def test_what_is_not_finite_spoils_its_codebook_alone():
    w = jnp.ones((2, 4)).at[1, 2].set(jnp.nan)
    book = clustered.find_codebook(w, 2, num_blocks=2)
    assert jnp.isfinite(book[0]).all() and jnp.isnan(book[1]).all()


@pytest.mark.parametrize("start", ["density", "linear", "k-means++"])
@pytest.mark.parametrize("power", [-100, 70, 120])
def test_magnitudes_do_not_matter(start, power):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    factor = 2.0**power
    options = {"start": start, "key": jax.random.key(0)}
    books = [clustered.find_codebook(x, 5, **options) for x in (w, w * factor)]
    np.testing.assert_array_equal(books[1], books[0] * factor)
    codes = [
        clustered.assign_codes(*pair).codes
        for pair in zip((w, w * factor), books, strict=True)
    ]
    np.testing.assert_array_equal(*codes)
