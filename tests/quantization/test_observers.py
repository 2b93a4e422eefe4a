"""Ranges of activations: against NumPy on the raw numbers, and what must not happen."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays import formats
from jopt.arrays.quantized import fake_quantize, quantize_array
from jopt.arrays.scales import compute_scale
from jopt.arrays.specs import QuantSpec, scale_shape
from jopt.programs.handlers import Handler
from jopt.programs.interpret import rewrite
from jopt.programs.record import record
from jopt.quantization import observers

INT8 = QuantSpec(formats.int8)
RANGES = [observers.absmax(), observers.minmax(), observers.moving_average(0.75)]
COUNTING = [observers.percentile(99.0), observers.mse(), observers.entropy()]
WEIGHTED = observers.importance_weighted()
HISTOGRAMS = [*COUNTING, WEIGHTED]
# Lists of observers that keep the same: one recording serves all of a list.
KINDS = [*([observer] for observer in RANGES), COUNTING, [WEIGHTED]]
by_kind = pytest.mark.parametrize(
    "kind", KINDS, ids=["absmax", "minmax", "moving_average", "histogram", "weighted"]
)
SPECS = {
    "int8": INT8,
    "int4": QuantSpec(formats.int4),
    "int2": QuantSpec(formats.int2),
    "uint8": QuantSpec(formats.uint8, symmetric=False),
    "asymmetric int4": QuantSpec(formats.int4, symmetric=False),
    "fp8_e4m3": QuantSpec(formats.fp8_e4m3),
    "fp8_e5m2": QuantSpec(formats.fp8_e5m2),
    "nf4": QuantSpec(formats.nf4),
    "fp4": QuantSpec(formats.fp4_e2m1),
}


def _draw(*shape):
    rng = np.random.default_rng(0)
    data = {
        "normal": rng.normal(size=shape),
        "laplace": rng.laplace(size=shape),
        "relu": np.maximum(rng.normal(size=shape), 0),
        "uniform": rng.uniform(-1, 3, size=shape),
        "heavy": rng.standard_t(3, size=shape),
        "positive": rng.uniform(3, 5, size=shape),
    }
    return {name: x.astype(np.float32) for name, x in data.items()}


DATA = _draw(500, 60)


def apply(params, x):
    return x @ params["w"]


def observe(observer, spec, batches, w=None):
    """The recorded value of the one site of `x @ w`."""
    w = np.ones((batches[0].shape[-1], 2), np.float32) if w is None else w
    statistic = observer.statistic(spec)
    recording = record(apply, {"w": jnp.asarray(w)}, batches, statistic, progress=False)
    return jax.device_get(recording.values["w"])


def find(observer, spec, batches, w=None):
    return observer.range(observe(observer, spec, batches, w), spec)


@functools.cache
def histogram(name):
    """All histogram observers but the weighted one keep the same."""
    return observe(observers.mse(), INT8, [DATA[name]])


def ends(x, spec):
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    largest = max(-low, high)
    return (-largest, largest) if spec.symmetric else (low, high)


@functools.partial(jax.jit, static_argnums=4)
def errors(x, weights, low, high, spec):
    """The true weighted squared error of every range, on the raw numbers."""
    spec = dataclasses.replace(spec, axis=(), scale_dtype=jnp.float32)

    def error(pair):
        scale = compute_scale(pair[0].reshape(1, 1), pair[1].reshape(1, 1), spec)
        return jnp.mean(weights * jnp.square(fake_quantize(x, spec, scale=scale) - x))

    return lax.map(error, (low, high))


def best_and_found(x, weights, found, spec):
    low, high = ends(x, spec)
    c = np.append(np.arange(1, 101) / 100, 0)
    lows, highs = np.float32(c * low), np.float32(c * high)
    lows[-1], highs[-1] = found
    all_errors = np.asarray(errors(x, weights, lows, highs, spec))
    return all_errors[:-1].min(), all_errors[-1]


def test_ranges_are_those_of_numpy_over_batches():
    batches = [DATA["normal"][:100], 3 * DATA["uniform"][:100], DATA["relu"][:100]]
    x = np.concatenate(batches)
    absmax, minmax, average = (find(o, INT8, batches) for o in RANGES)
    largest = np.abs(x).max()
    assert absmax == (-largest, largest)
    assert minmax == (x.min(), x.max())
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low, high = 0.75 * low + 0.25 * batch.min(), 0.75 * high + 0.25 * batch.max()
    np.testing.assert_allclose(average, (low, high), rtol=1e-6)
    for end in (*absmax, *minmax, *average):
        assert end.shape == () and end.dtype == np.float32


@pytest.mark.parametrize("axis", [-1, (0, -1)])
def test_ranges_per_index_have_the_shape_of_the_scales(axis):
    spec = dataclasses.replace(INT8, axis=axis)
    batches = [DATA["normal"][:20].reshape(4, 5, 60), np.ones((4, 5, 60), np.float32)]
    x = batches[0]
    shape = scale_shape(x.shape, spec)
    shared = tuple(a for a in range(3) if shape[a] == 1)
    least, largest = (f(x, axis=shared, keepdims=True) for f in (np.min, np.max))
    absmax, minmax, average = (find(o, spec, batches) for o in RANGES)
    for end in (*absmax, *minmax, *average):
        assert end.shape == shape
    np.testing.assert_array_equal(minmax[0], np.minimum(least, 0))
    np.testing.assert_array_equal(minmax[1], np.maximum(largest, 1))
    np.testing.assert_array_equal(absmax[1], np.maximum(np.maximum(-least, largest), 1))
    mixed = np.maximum(0.75 * largest + 0.25, 0)
    np.testing.assert_allclose(average[1], mixed, rtol=1e-6)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("p", [50.0, 90.0, 99.9, 100.0])
def test_percentiles_are_those_of_numpy_within_a_bin(name, p):
    x, value = DATA[name], histogram(name)
    low, high = observers.percentile(p).range(value, INT8)
    expected = np.percentile(np.abs(x.astype(np.float64)), p)
    assert -low == high
    assert abs(high - expected) <= expected / 64
    low, high = observers.percentile(p).range(value, SPECS["uint8"])
    tail = (100 - p) / 2
    below, above = np.percentile(x.astype(np.float64), [tail, 100 - tail])
    assert abs(low - min(below, 0)) <= abs(below) / 64
    assert abs(high - max(above, 0)) <= abs(above) / 64
    if p == 100:
        assert (low, high) == ends(x, SPECS["uint8"])
        assert observers.percentile(100).range(value, INT8) == ends(x, INT8)


magnitudes = st.floats(2.0**-60, 2.0**40, exclude_max=True, width=32)
numbers = st.lists(
    st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda v: -v)),
    min_size=7,
    max_size=7,
)
count_in_bins = jax.jit(observers._count_in_bins)


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
@hypothesis.given(numbers, st.floats(0.01, 100))
def test_percentiles_stay_within_a_bin_whatever_the_numbers(x, p):
    value = jax.device_get(count_in_bins(jnp.array(x, jnp.float32)))
    magnitude = np.abs(np.array(x))
    low, high = observers.percentile(p).range(value, INT8)
    expected = np.percentile(magnitude, p)
    assert abs(high - expected) <= expected / 64 + 1e-12 * magnitude.max()
    assert -low == high <= np.float32(magnitude.max())


def test_errors_are_integrated_exactly():
    rng = np.random.default_rng(1)
    for grid in (np.sort(rng.normal(size=9)), np.arange(-3.0, 4.0), np.array([-1, 1])):
        lower = rng.uniform(-4, 4, size=50)
        upper = lower + rng.uniform(0, 3, size=50) * (np.arange(50) > 0)
        share = (np.arange(2000) + 0.5) / 2000
        x = lower[:, None] + share * (upper - lower)[:, None]
        nearest = np.abs(x[..., None] - grid).min(-1)
        found = observers._mean_errors(lower, upper, grid)
        np.testing.assert_allclose(found, (nearest**2).mean(-1), rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_least_error_is_that_of_the_raw_numbers(spec):
    for name in DATA:
        x = DATA[name]
        found = observers.mse().range(histogram(name), spec)
        best, error = best_and_found(x, np.ones((1, 1), np.float32), found, spec)
        assert error <= 1.01 * best, name
        low, high = ends(x, spec)
        share = found[1] / high
        np.testing.assert_allclose(found[0], share * low, rtol=1e-6)
        assert abs(share * 100 - round(share * 100)) < 1e-3


def test_importance_follows_the_weights():
    """One feature is large and hardly used: its error does not count."""
    x = DATA["normal"] * np.where(np.arange(60) == 0, 30, 1).astype(np.float32)
    w = np.random.default_rng(2).normal(size=(60, 8)).astype(np.float32)
    w[0] *= 1e-3
    weights = np.square(w).sum(1)[None]
    value = observe(WEIGHTED, INT8, [x[:200], x[200:]], w)  # for every spec the same
    for spec in (SPECS["int4"], SPECS["asymmetric int4"], SPECS["fp8_e4m3"]):
        best, error = best_and_found(x, weights, WEIGHTED.range(value, spec), spec)
        assert error <= 1.01 * best
    plain = observers.mse().range(count_in_bins(x), SPECS["int4"])
    weighted = WEIGHTED.range(value, SPECS["int4"])
    assert weighted[1] < plain[1] / 3
    true = [np.square(quantized(x, r) @ w - x @ w).mean() for r in (plain, weighted)]
    assert true[1] < true[0] / 2


def quantized(x, found):
    spec = dataclasses.replace(SPECS["int4"], axis=())
    scale = compute_scale(*(jnp.full((1, 1), end) for end in found), spec)
    return np.asarray(fake_quantize(x, spec, scale=scale))


def _conv(w, x):
    return lax.conv_general_dilated(
        x, w, (2, 1), "SAME", feature_group_count=2, rhs_dilation=(1, 2)
    )


PRODUCTS = {
    "dot": (lambda w, x: x @ w, (3, 4), (2, 3)),
    "weight first": (lambda w, x: w @ x, (4, 3), (3, 2)),
    "batched": (lambda w, x: jnp.einsum("bij,bjk->bik", x, w), (2, 3, 4), (2, 5, 3)),
    "two axes": (lambda w, x: jnp.einsum("kil,bik->bl", w, x), (3, 4, 5), (2, 4, 3)),
    "conv": (_conv, (4, 1, 3, 2), (2, 2, 5, 6)),
    "ragged": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 3], jnp.int32)),
        (2, 3, 4),
        (4, 3),
    ),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_importance_is_what_one_element_does_to_the_product(product):
    """Of each element alone, the squared norm of the product, up to one factor."""
    function, *shapes = product
    rng = np.random.default_rng(3)
    w, x = (jnp.float32(rng.normal(size=shape)) for shape in shapes)
    taken = Handler(
        lambda use: (use.run(), observers._importance(use)),
        initial=lambda site: jnp.zeros(shapes[1]),
    )
    _, found = rewrite(lambda p, x: function(p["w"], x), taken)({"w": w}, x)
    one = jax.jit(lambda e: jnp.square(function(w, e.reshape(x.shape))).sum())
    expected = np.reshape([one(e) for e in np.eye(x.size, dtype=np.float32)], x.shape)
    np.testing.assert_allclose(
        found["w"] * jnp.max(jnp.abs(w)) ** 2, expected, rtol=1e-4, atol=1e-6
    )


def test_importance_of_low_precision_compressed_and_absent_weights():
    x = jnp.float32(DATA["heavy"][:50])
    w = jnp.float32(np.random.default_rng(4).normal(size=(60, 8)))
    observer, spec = observers.importance_weighted(), SPECS["int4"]
    statistic = observer.statistic(spec)

    def of(apply, params, x):
        values = record(
            apply, params, [x], statistic, select=lambda site: True, progress=False
        ).values
        return [jax.device_get(value) for value in values.values()]

    (plain,) = of(apply, {"w": w}, x)
    (compressed,) = of(apply, {"w": quantize_array(w, INT8)}, x)
    np.testing.assert_allclose(compressed["counts"], plain["counts"], rtol=0.1)
    for dtype in (jnp.bfloat16, jnp.float16):
        small = {"w": (w / 1000).astype(dtype)}  # squares beyond float16
        (low,) = of(apply, small, x.astype(dtype))
        np.testing.assert_allclose(
            low["counts"].sum(), plain["counts"].sum(), rtol=0.02
        )
        (none,) = of(apply, {"w": jnp.zeros_like(small["w"])}, x.astype(dtype))
        largest = np.abs(x.astype(dtype)).max().astype(np.float32)
        assert observer.range(none, spec) == (-largest, largest)
    (pair,) = of(lambda params, x: x @ x.T, {"w": w}, x)
    assert pair["counts"].sum() == x.size


def raw_entropy(x, spec, num_bins=2048):
    """Migacz's procedure on linear histograms of the numbers themselves."""
    low, high = ends(x, spec)
    levels = observers._grid(low, high, spec)
    x = np.sort(x[x != 0])
    most = round(num_bins * (high - low) / max(-low, high))
    losses = {}
    for bins in range(most, len(levels) - 1, -(most // 128)):
        c = bins / most
        edges = np.linspace(c * low, c * high, bins + 1)
        inside = np.diff(np.searchsorted(x, edges)).astype(float)
        p = inside.copy()
        p[0] += np.sum(x < edges[0])
        p[-1] += np.sum(x >= edges[-1])
        middles = (edges[1:] + edges[:-1]) / 2
        cell = np.abs(middles[:, None] - c * levels).argmin(1)
        q = np.zeros(bins)
        for level in range(len(levels)):
            members = (cell == level) & (p > 0)
            if members.any():
                q[members] = inside[members].sum() / members.sum()
        if np.any((q == 0) & (p > 0)):
            continue
        p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
        losses[c] = np.sum(p * np.log(p / q))
    return losses


@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "uniform", "heavy"])
def test_entropy_chooses_as_on_raw_histograms(name):
    x = _draw(200_000)[name]
    value = jax.device_get(count_in_bins(x))
    for key in ("int8", "int4", "int2", "asymmetric int4", "nf4"):
        if key == "int8" and name != "normal":
            continue
        spec = SPECS[key]
        low, high = observers.entropy().range(value, spec)
        share = high / ends(x, spec)[1]
        np.testing.assert_allclose(low, share * ends(x, spec)[0], rtol=1e-6)
        losses = raw_entropy(x, spec)
        chosen = min(losses, key=lambda c: abs(c - share))
        best = min(losses, key=losses.get)
        assert losses[chosen] <= 1.03 * losses[best], key
        if key != "int8":  # there the choice hangs on the noise of 2048 bins
            assert abs(chosen - best) <= 0.07, key


def test_entropy_clips_tails_and_keeps_what_has_none():
    shares = {
        name: observers.entropy().range(histogram(name), INT8)[1] / np.abs(x).max()
        for name, x in DATA.items()
    }
    assert shares["uniform"] == shares["positive"] == 1
    assert shares["heavy"] < 0.7
    assert shares["normal"] > 0.7
    outlier = np.append(DATA["normal"].ravel(), 50.0).astype(np.float32)
    _, high = observers.entropy().range(count_in_bins(outlier), SPECS["int4"])
    assert 1.5 < high < 6


@pytest.mark.parametrize("observer", [RANGES[0], COUNTING[0], WEIGHTED])
def test_batches_and_order_do_not_matter(observer):
    x, statistic = DATA["heavy"], observer.statistic(INT8)
    rng = np.random.default_rng(5)
    w = rng.integers(1, 5, size=(60, 1)).astype(np.float32)
    shuffled = x[rng.permutation(len(x))]
    whole = observe(observer, INT8, [x], w)
    parts = observe(observer, INT8, [shuffled[:100], shuffled[100:200], x[:0]], w)
    rest = observe(observer, INT8, [shuffled[200:]], w)
    merged, swapped = statistic.merge(parts, rest), statistic.merge(rest, parts)
    jax.tree.map(np.testing.assert_array_equal, merged, swapped)
    for key in whole:
        rtol = 1e-6 if observer is WEIGHTED else 0
        np.testing.assert_allclose(merged[key], whole[key], rtol=rtol)


def test_zeros_and_constants():
    for constant, rtol in (
        (0, 0),
        (3, 1 / 64),
        (-3, 1 / 64),
        (1e-30, 0.5),
        (-1e30, 0.5),
    ):
        value = count_in_bins(np.full((4, 5), constant, np.float32))
        for observer in RANGES + HISTOGRAMS:
            for spec in (INT8, SPECS["uint8"], SPECS["nf4"]):
                low, high = observer.range(value, spec)
                assert low <= 0 <= high
                largest = np.abs(np.float32(constant))
                np.testing.assert_allclose(max(-low, high), largest, rtol=rtol)


@by_kind
def test_what_is_not_finite_does_not_vanish_and_what_never_ran_has_no_range(kind):
    def apply(params, inputs):
        ran = [inputs[name] @ params[name] for name in bad]
        x = inputs["nan"]
        return lax.cond(jnp.bool(True), lambda: ran[0], lambda: x @ params["never"])

    bad = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
    params = {name: jnp.ones((60, 2)) for name in (*bad, "never")}
    batches = [dict.fromkeys(bad, DATA["normal"][:4]) for _ in range(3)]
    for name, number in bad.items():
        batches[1][name] = batches[1][name].copy()
        batches[1][name][2, 3] = number

    def recorded(spec):
        statistic = kind[0].statistic(spec)
        values = record(apply, params, batches, statistic, progress=False).values
        return jax.device_get(values)

    values = recorded(INT8)
    for observer in kind:
        assert observer.range(values["never"], INT8) is None
        for name in bad:
            assert np.isnan(observer.range(values[name], INT8)).all()
    if kind[0] in RANGES:
        spec = dataclasses.replace(INT8, axis=-1)
        values = recorded(spec)
        assert kind[0].range(values["never"], spec) is None
        for name in bad:
            low, high = kind[0].range(values[name], spec)
            assert (np.isnan(low) == (np.arange(60) == 3)).all()
            assert (np.isnan(high) == np.isnan(low)).all()


def test_weights_that_are_not_finite_do_not_choose():
    w = np.ones((60, 2), np.float32)
    w[3, 1] = np.nan
    assert np.isnan(find(WEIGHTED, INT8, [DATA["normal"][:4]], w)).all()


@by_kind
def test_layers_of_a_scan_have_ranges_of_their_own(kind):
    def apply(params, x):
        return lax.scan(lambda x, w: (2 * (x @ w), None), x, params["w"])[0]

    x = DATA["normal"][:40, :8]
    params = {"w": jnp.stack([jnp.eye(8)] * 3)}
    values = record(
        apply, params, [x[:20], x[20:]], kind[0].statistic(INT8), progress=False
    ).values
    values = jax.device_get(values["w"])
    layers = [jax.tree.map(lambda v, i=i: v[i], values) for i in range(3)]
    for observer in kind:
        first = np.array(observer.range(layers[0], INT8))
        assert first[1] <= np.abs(x).max()
        for i in (1, 2):
            found = observer.range(layers[i], INT8)
            np.testing.assert_allclose(found, 2**i * first, rtol=1e-5)


def test_sites_inside_shard_map_have_a_value_per_device(auto_mesh):
    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        apply, mesh=auto_mesh, in_specs=(whole, split), out_specs=split
    )
    x, params = DATA["normal"][:16], {"w": jnp.ones((60, 2))}
    for observer in (COUNTING[0], WEIGHTED):
        statistic = observer.statistic(INT8)
        values = record(sharded, params, [x, x], statistic, progress=False).values
        value = jax.tree.map(lambda v: v[3], jax.device_get(values["w"]))
        assert value["low"] == x[6:8].min()
        assert value["high"] == x[6:8].max()
        each = 2 if observer is WEIGHTED else 1  # two outputs have weights of one
        assert value["counts"].sum() == 2 * x[6:8].size * each


@pytest.mark.parametrize("mesh", ["auto_mesh", "explicit_mesh"])
@pytest.mark.parametrize("observer", [COUNTING[0], WEIGHTED])
def test_sharded_batches_give_the_same(observer, mesh, request):
    mesh = request.getfixturevalue(mesh)
    x = DATA["heavy"][:64]
    w = np.ones((60, 2), np.float32)
    alone = observe(observer, INT8, [x, x], w)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        together = observe(observer, INT8, [sharded, sharded], w)
    jax.tree.map(np.testing.assert_array_equal, together, alone)


def test_no_batch_is_gathered(auto_mesh):
    sharding = NamedSharding(auto_mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((64, 60), jnp.float32, sharding=sharding)
    text = count_in_bins.lower(x).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_numbers_beyond_the_bins_keep_their_range():
    for factor in (1e-30, 1e30):
        x = DATA["normal"] * np.float32(factor)
        largest = np.abs(x).max()
        value = count_in_bins(x)
        for observer in HISTOGRAMS:
            low, high = observer.range(value, INT8)
            assert 0.5 * largest < high <= largest
            assert low == -high


def test_bfloat16_activations():
    x = jnp.asarray(DATA["normal"][:50], jnp.bfloat16)
    params = {"w": jnp.ones((60, 2), jnp.bfloat16)}
    observer = observers.percentile(100)
    values = record(apply, params, [x], observer.statistic(INT8), progress=False).values
    assert observer.range(values["w"], INT8)[1] == np.abs(np.float32(x)).max()


def test_what_cannot_be_is_said_at_once():
    grouped = dataclasses.replace(INT8, group_size=32)
    for observer in RANGES + HISTOGRAMS:
        for spec in (grouped, QuantSpec(formats.mxfp8)):
            with pytest.raises(ValueError, match="group_size must be None"):
                observer.statistic(spec)
    per_index = dataclasses.replace(INT8, axis=-1)
    for observer in HISTOGRAMS:
        with pytest.raises(ValueError, match="axis must be None or"):
            observer.statistic(per_index)
        observer.statistic(dataclasses.replace(INT8, axis=()))
    with pytest.raises(ValueError, match="axis must name axes of 'w'"):
        observe(RANGES[0], dataclasses.replace(INT8, axis=5), [DATA["normal"]])
    for p in (0, -1, 101, float("nan")):
        with pytest.raises(ValueError, match="p must be in"):
            observers.percentile(p)
    for factory in (observers.mse, observers.importance_weighted):
        with pytest.raises(ValueError, match="num_candidates must be at least 1"):
            factory(0)
    with pytest.raises(ValueError, match="num_bins must be at least 256"):
        observers.entropy(100)
    with pytest.raises(ValueError, match="decay must be in"):
        observers.moving_average(1)
