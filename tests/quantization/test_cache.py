"""A cache holds what was appended to within its bound, and never changes it again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jopt
from jopt import formats
from tests import contract, hlo

BATCH, CAPACITY, HEADS, FEATURES = 3, 24, 2, 32
SHAPE = (BATCH, CAPACITY, HEADS, FEATURES)
INT8 = jopt.QuantSpec(formats.int8)
INT4 = jopt.QuantSpec(formats.int4, group_size=16)
FP8 = jopt.QuantSpec(formats.fp8_e4m3)
CHANNEL4 = jopt.QuantSpec(formats.int4, axis=(-2, -1), group_size=8)
CHANNEL2 = jopt.QuantSpec(formats.uint2, axis=(-2, -1), group_size=8, symmetric=False)
PER_TOKEN = {
    "int8": INT8,
    "int8 over heads": jopt.QuantSpec(formats.int8, axis=-3),
    "int8 float32 scales": jopt.QuantSpec(formats.int8, scale_dtype=jnp.float32),
    "uint8": jopt.QuantSpec(formats.uint8, symmetric=False),
    "int4 in groups": INT4,
    "int3": jopt.QuantSpec(formats.int3),
    "fp8_e4m3": FP8,
    "fp8_e5m2": jopt.QuantSpec(formats.fp8_e5m2),
    "fp4_e2m1": jopt.QuantSpec(formats.fp4_e2m1, group_size=8),
    "nf4": jopt.QuantSpec(formats.nf4),
    "mxfp8": jopt.QuantSpec(formats.mxfp8),
    "mxfp4": jopt.QuantSpec(formats.mxfp4),
    "nvfp4": jopt.QuantSpec(formats.nvfp4),
}
PER_CHANNEL = {
    "int8 per channel": jopt.QuantSpec(formats.int8, axis=(-2, -1), group_size=4),
    "int4 per channel": CHANNEL4,
    "uint2 per channel": CHANNEL2,
}
append = jax.jit(jopt.KeyValueCache.append)
read = jax.jit(jopt.KeyValueCache.read)


def tokens(n, seed=0, batch=(BATCH,)):
    """Keys and values with outliers in scale, per channel and per token."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, *batch, n, HEADS, FEATURES))
    x *= np.exp(rng.normal(size=(FEATURES,))) * np.exp(rng.normal(size=(n, 1, 1)))
    return jnp.asarray(x, jnp.float32)


def within(error, bound):
    return bool((np.asarray(error) <= np.asarray(bound) * (1 + 1e-4)).all())


@pytest.mark.parametrize("name", [*PER_TOKEN, *PER_CHANNEL])
def test_codes_are_those_of_quantize_and_errors_within_the_bound(name):
    """The oracles: `jopt.quantize` of tokens, or of full groups, bit for bit; |x - x'|.

    Whatever the portions: per channel what is behind the last full group is as it came.
    """
    spec = (PER_TOKEN | PER_CHANNEL)[name]
    size = spec.group_size if name in PER_CHANNEL else 1
    axis = (-3, -2) if spec.axis is None else (-3,)
    alone = spec if name in PER_CHANNEL else dataclasses.replace(spec, axis=axis)
    k, v = tokens(21)
    round_trip = lambda x: jopt.dequantize(jopt.quantize(x, alone))  # noqa: E731
    full = 21 // size * size
    expected = jax.vmap(jax.vmap(round_trip))(jnp.stack([k, v])[:, :, :full])
    cache = jopt.init_cache(SHAPE, spec)
    for stop in (7, 14, 21):
        cache = append(cache, k[:, stop - 7 : stop], v[:, stop - 7 : stop])
        keys, values, mask = read(cache)
        assert keys.shape == values.shape == SHAPE and keys.dtype == jnp.float32
        np.testing.assert_array_equal(mask, _first(stop))
        full = stop // size * size
        for i, (x, stored) in enumerate(((k, keys), (v, values))):
            np.testing.assert_array_equal(stored[:, :full], expected[i][:, :full])
            np.testing.assert_array_equal(stored[:, full:stop], x[:, full:stop])
            assert not np.any(stored[:, stop:])
    bounds = jax.jit(jopt.KeyValueCache.error_bounds)(cache)
    for x, stored, bound in zip((k, v), (keys, values), bounds, strict=True):
        error = np.abs(np.asarray(stored)[:, :21] - np.asarray(x))
        bound = np.broadcast_to(np.asarray(bound), SHAPE)[:, :21]
        assert within(error, bound)
        # It is no larger than it must be: errors come near it.
        share = (error / np.maximum(bound, 1e-30)).max()
        assert share > (0.6 if "fp" in name else 0.9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_full_ranges_keep_their_bound_at_the_end_that_is_clipped(bits):
    """A number as large as the largest, of the other sign; at 8 bits scales matter."""
    form = getattr(jopt.formats, f"int{bits}")
    spec = jopt.QuantSpec(form, narrow_range=False)
    x = np.random.default_rng(0).normal(size=(1, 1000, 1, 16)).astype(np.float32)
    x[..., 0] = -np.abs(x).max(-1)
    x[..., 1] = -x[..., 0] * 0.9999
    cache = jopt.init_cache(x.shape, spec).append(x, x)
    share = np.abs(cache.read().keys - x) / cache.error_bounds()[0]
    assert 0.97 < float(share.max()) <= 1.0


def _first(n):
    mask = np.arange(CAPACITY) < n
    return np.broadcast_to(mask, (BATCH, 1, 1, CAPACITY))


def lengths_and_portions():
    portion = st.lists(st.integers(0, 3), min_size=BATCH, max_size=BATCH)
    return st.lists(portion, min_size=1, max_size=6)


@pytest.mark.properties
@pytest.mark.parametrize("spec", [None, INT8, INT4, CHANNEL4], ids=str)
@given(portions=lengths_and_portions(), seed=st.integers(0, 2**31))
def test_entries_never_change_and_rows_go_their_own_way(spec, portions, seed):
    """Ragged appends give each row what it would hold alone; the past keeps bits."""
    k, v = tokens(3 * len(portions), seed=seed)
    cache = jopt.init_cache(SHAPE, spec)
    length = np.zeros(BATCH, int)
    texts = [[] for _ in range(BATCH)]
    group = 1 if cache.key_residual is None else CHANNEL4.group_size
    for i, count in enumerate(portions):
        part = slice(3 * i, 3 * i + 3)
        before, old = cache, read(cache)
        cache = append(cache, k[:, part], v[:, part], num_tokens=np.array(count))
        new = read(cache)
        for row in range(BATCH):
            kept = length[row] // group * group  # what is final
            for a, b in ((old.keys, new.keys), (old.values, new.values)):
                np.testing.assert_array_equal(a[row, :kept], b[row, :kept])
            texts[row] += list(range(3 * i, 3 * i + count[row]))
        length += count
        np.testing.assert_array_equal(cache.length, length)
        assert jax.tree.structure(cache) == jax.tree.structure(before)
    for row, index in enumerate(texts):
        empty = jopt.init_cache((1, *SHAPE[1:]), spec)
        alone = empty
        for i in index:  # one by one
            alone = append(
                alone, k[row : row + 1, i : i + 1], v[row : row + 1, i : i + 1]
            )
        mine = jax.tree.map(lambda x: x[row : row + 1], cache)  # noqa: B023
        contract.assert_same(read(mine), read(alone))


def test_a_scan_appends_as_single_calls_do_and_compiles_once():
    k, v = tokens(20, seed=3)
    traces = []

    @jax.jit
    def fill(cache, k, v):
        traces.append(1)

        def step(cache, token):
            cache = cache.append(*(x[:, None] for x in token))
            return cache, cache.length

        by_time = [jnp.moveaxis(x, 1, 0) for x in (k, v)]
        return jax.lax.scan(step, cache, tuple(by_time))[0]

    for spec in (INT8, CHANNEL4):
        cache = jopt.init_cache(SHAPE, spec)
        together = fill(cache, k, v)
        contract.assert_same(fill(cache, k, v), together)
        contract.assert_same(read(together), read(append(cache, k, v)))
    assert len(traces) == 2


def test_layers_may_be_scanned_and_rows_mapped():
    """A leading axis comes off all parts, and another one may be added."""
    layers = 2
    k, v = tokens(9, batch=(layers, BATCH))
    for spec in (INT4, CHANNEL4):
        stack = jopt.init_cache((layers, *SHAPE), spec)
        assert stack.length.shape == (layers, BATCH)

        def layer(_, xs):
            cache, k, v = xs
            cache = cache.append(k, v)
            return None, (cache, cache.read())

        scan = jax.jit(lambda xs: jax.lax.scan(layer, None, xs)[1])
        scanned, views = scan((stack, k, v))
        whole = append(stack, k, v)
        contract.assert_same(scanned, whole)
        contract.assert_same(views, read(whole))
        by_row = jax.jit(jax.vmap(jax.vmap(jopt.KeyValueCache.append)))(stack, k, v)
        contract.assert_same(by_row, whole)
        assert read(whole).mask.shape == (layers, BATCH, 1, 1, CAPACITY)


def test_the_mask_is_causal_and_ragged():
    k, v = tokens(4)
    cache = append(jopt.init_cache(SHAPE, INT8), k, v, num_tokens=np.array([4, 2, 0]))
    before = cache.length
    cache = append(cache, k[:, :2], v[:, :2])
    mask = read(cache, before[:, None] + jnp.arange(2)[None]).mask
    assert mask.shape == (BATCH, 1, 2, CAPACITY)
    slots = np.arange(CAPACITY)
    for row, start in enumerate([4, 2, 0]):
        for query in range(2):
            np.testing.assert_array_equal(mask[row, 0, query], slots <= start + query)
    last = read(cache).mask[:, 0, 0].sum(-1)
    np.testing.assert_array_equal(last, [6, 4, 2])


@pytest.mark.parametrize("spec", [None, INT8, CHANNEL4], ids=str)
def test_a_window_keeps_the_newest(spec):
    size = 8
    k, v = tokens(26, seed=5)
    ring = jopt.init_cache((BATCH, size, HEADS, FEATURES), spec, window=True)
    long = jopt.init_cache((BATCH, 32, HEADS, FEATURES), spec)
    for stop in (*range(1, 12), 16, 21, 26):
        start = int(long.length[0])
        ring = append(ring, k[:, start:stop], v[:, start:stop])
        long = append(long, k[:, start:stop], v[:, start:stop])
        positions = np.asarray(ring.positions())
        expected = np.arange(max(stop - size, 0), stop)
        for row in range(BATCH):
            held = positions[row][positions[row] >= 0]
            np.testing.assert_array_equal(np.sort(held), expected)
            full = np.asarray(read(long).keys)[row]
            kept = np.asarray(read(ring).keys)[row]
            for slot, position in enumerate(positions[row]):
                if position >= 0:
                    np.testing.assert_array_equal(kept[slot], full[position])


def test_too_many_tokens_raise_where_it_is_known_and_read_nan_where_not():
    k, v = tokens(CAPACITY)
    for spec in (None, INT8, CHANNEL4):
        cache = append(jopt.init_cache(SHAPE, spec), k[:, :20], v[:, :20])
        with pytest.raises(ValueError, match="capacity of 24 tokens, got 25"):
            cache.append(k[:, :5], v[:, :5])
        over = append(cache, k[:, :5], v[:, :5], num_tokens=np.array([4, 5, 0]))
        keys, values, _ = read(over)
        for x in (keys, values):
            is_nan = np.isnan(np.asarray(x))
            assert is_nan[1].all() and not is_nan[0].any() and not is_nan[2].any()
        # What was there is untouched: with the old length the row is itself again.
        back = dataclasses.replace(over, length=cache.length)
        contract.assert_same(read(back).keys[1, :16], read(cache).keys[1, :16])


def test_bytes():
    def bits(shape, spec, **options):
        cache = jopt.init_cache(shape, spec, **options)
        lengths = cache.length.nbytes
        assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
        return 8 * (cache.nbytes - lengths) / (2 * np.prod(shape))

    for features in (32, 64, 128):
        shape = (2, 256, 4, features)
        assert bits(shape, None) == 32
        assert bits(shape, INT8) == 8 + 16 / features
        assert bits(shape, jopt.QuantSpec(formats.int8, axis=-3)) == 8 + 4 / features
    shape = (2, 256, 4, 64)
    assert bits(shape, INT8) / 32 <= 0.258
    assert bits(shape, INT4) == 5
    assert bits(shape, jopt.QuantSpec(formats.int4, group_size=32)) == 4.5
    assert bits(shape, FP8) == 8.25
    # Codes and a scale per eight tokens, and eight of 256 tokens as floats.
    assert bits(shape, CHANNEL4) == 4 + 2 + 32 * 8 / 256
    assert bits(shape, CHANNEL4, dtype=jnp.bfloat16) == 4 + 2 + 16 * 8 / 256
    kivi = bits(shape, CHANNEL2, value_spec=INT4)
    assert kivi == (2 + 24 / 8 + 1 + 5) / 2


def test_a_cache_is_made_and_written_without_floats_of_its_size():
    shape = (4, 1024, 4, 32)
    make = jax.jit(lambda: jopt.init_cache(shape, INT8)).lower().compile()
    assert make.memory_analysis().temp_size_in_bytes < 4096
    cache = jopt.init_cache(shape, INT8)
    k, v = tokens(1, batch=(4,))
    k, v = jnp.tile(k, (1, 1, 2, 1)), jnp.tile(v, (1, 1, 2, 1))
    step = jax.jit(jopt.KeyValueCache.append, donate_argnums=0)
    memory = step.lower(cache, k, v).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes - 64
    # Codes are written in place; XLA before JAX 0.12 widens bfloat16 scales meanwhile.
    assert memory.temp_size_in_bytes < cache.nbytes / 8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats(dtype):
    k, v = tokens(8)
    k, v = k.astype(dtype), v.astype(dtype)
    for spec in (None, INT8) if dtype == jnp.bfloat16 else (CHANNEL4,):
        cache = append(jopt.init_cache(SHAPE, spec, dtype=dtype), k, v)
        keys, _, _ = read(cache)
        assert keys.dtype == dtype
        bound = jnp.broadcast_to(cache.error_bounds()[0], SHAPE)[:, :8]
        x = k.astype(jnp.float32)
        ulp = jnp.finfo(dtype).eps * jnp.abs(x)
        assert within(jnp.abs(keys[:, :8].astype(jnp.float32) - x), bound + ulp)


def attention(q, keys, values, mask):
    return jax.nn.dot_product_attention(q, keys, values, mask=mask)


@pytest.mark.parametrize("name", ["int8", "int4 in groups", "fp8_e4m3"])
def test_scores_and_results_of_attention_are_within_their_bounds(name):
    """The inequalities of the module, in float64, and that they are not idle."""
    k, v = tokens(CAPACITY, seed=6)
    v = v / jnp.abs(v).max()
    q = jnp.asarray(np.random.default_rng(7).normal(size=(BATCH, 1, HEADS, FEATURES)))
    q = q.astype(jnp.float32)
    cache = append(jopt.init_cache(SHAPE, PER_TOKEN[name]), k, v)
    keys, values, mask = read(cache)
    e_k, e_v = (
        np.broadcast_to(np.asarray(e, np.float64), SHAPE) * (1 + 1e-4)
        for e in cache.error_bounds()
    )
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    scores = np.einsum("bqhd,bkhd->bhqk", wide(q), wide(k)) / FEATURES**0.5
    near = np.einsum("bqhd,bkhd->bhqk", wide(q), wide(keys)) / FEATURES**0.5
    delta = np.einsum("bqhd,bkhd->bhqk", abs(wide(q)), e_k) / FEATURES**0.5
    assert (abs(near - scores) <= delta).all()
    l1 = abs(wide(q)).sum(-1)[:, 0, :, None, None] / FEATURES**0.5
    coarse = l1 * np.moveaxis(e_k.max(-1), 1, 2)[:, :, None]
    assert (delta <= coarse * (1 + 1e-12)).all()
    softmax = lambda s: np.exp(s - s.max(-1, keepdims=True))  # noqa: E731
    p, p2 = (x / x.sum(-1, keepdims=True) for x in (softmax(scores), softmax(near)))
    reach = np.tanh(delta.max(-1, keepdims=True) / 2)
    assert (abs(p2 - p).sum(-1, keepdims=True) <= 2 * reach + 1e-12).all()
    out = np.einsum("bhqk,bkhd->bqhd", p, wide(v))
    spread = wide(v).max(1) - wide(v).min(1)
    bound = e_v.max(1) + reach[:, :, 0] * spread
    actual = wide(attention(q, keys, values, mask))[:, 0]
    error = abs(actual - out[:, 0])
    assert (error <= bound + 1e-5).all()
    assert (error > bound / 1000).any()


@pytest.mark.parametrize(
    ("spec", "kind"),
    [(spec, AxisType.Auto) for spec in (None, INT8, INT4, FP8, CHANNEL4)]
    + [(spec, AxisType.Explicit) for spec in (INT4, CHANNEL4)],
    ids=str,
)
def test_rows_and_heads_stay_on_their_devices(spec, kind):
    """Eight devices: the bits of one, nothing exchanged, nothing moved."""
    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(kind,) * 2)
    shape = (4, 16, 2, FEATURES)
    k, v = tokens(5, batch=(4,))

    def place(x):
        spec = PartitionSpec("rows", None, "heads", None)[: x.ndim]
        names = PartitionSpec(*spec) if x.ndim == 4 else PartitionSpec("rows")
        return jax.device_put(x, NamedSharding(mesh, names))

    def step(cache, k, v):
        cache = cache.append(k, v, num_tokens=jnp.full_like(cache.length, 3))
        before = cache.length
        cache = cache.append(k[:, :1], v[:, :1])
        return cache, cache.read(before[:, None])

    cache = jopt.init_cache(shape, spec)
    alone = jax.jit(step)(cache, k, v)
    with jax.set_mesh(mesh):
        given = jax.tree.map(place, (cache, k, v))
        compiled = jax.jit(step).lower(*given).compile()
        together = compiled(*given)
    assert hlo.collectives(compiled.as_text()) == []
    contract.assert_same(jax.device_get(together), jax.device_get(alone))
    for old, new in zip(
        jax.tree.leaves(given[0]), jax.tree.leaves(together[0]), strict=True
    ):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


def test_saved_and_restored(tmp_path):
    k, v = tokens(9)
    cache = append(jopt.init_cache(SHAPE, CHANNEL4, value_spec=INT8), k, v)
    jopt.save(tmp_path / "cache", {"cache": cache})
    like = {"cache": jopt.init_cache(SHAPE, CHANNEL4, value_spec=INT8)}
    restored = jopt.restore(tmp_path / "cache", like=like)["cache"]
    contract.assert_same(restored, cache)
    contract.assert_same(read(append(restored, k, v)), read(append(cache, k, v)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jopt.init_cache((4, 8), INT8), "shape must be"),
        (lambda: jopt.init_cache((0, 8, 2, 4), INT8), "positive sizes"),
        (lambda: jopt.init_cache(SHAPE, "int8"), "spec must be a jopt.QuantSpec"),
        (
            lambda: jopt.init_cache(SHAPE, jopt.QuantSpec(formats.ternary)),
            "scales from ranges, got ternary for the keys",
        ),
        (
            lambda: jopt.init_cache(SHAPE, jopt.QuantSpec(formats.int8, axis=-1)),
            "per token, or per group of tokens",
        ),
        (
            lambda: jopt.init_cache(SHAPE, jopt.QuantSpec(formats.int8, axis=-7)),
            "axis must name axes of 'keys'",
        ),
        (
            lambda: jopt.init_cache(SHAPE, jopt.QuantSpec(formats.int8, group_size=5)),
            "group_size must divide axis -1 of 'keys'",
        ),
        (
            lambda: jopt.init_cache(
                SHAPE, INT8, value_spec=dataclasses.replace(CHANNEL4, group_size=5)
            ),
            "whole groups .* got 24 tokens and .* for the values: use a capacity of 25",
        ),
        (
            lambda: jopt.init_cache(SHAPE, dataclasses.replace(CHANNEL4, group_size=3)),
            "whole bytes",
        ),
        (
            lambda: jopt.init_cache(
                (1, 32, 2, 16), jopt.QuantSpec(formats.nvfp4, axis=(-2, -1))
            ),
            "outer scale would be shared",
        ),
        (
            lambda: jopt.init_cache((2, 5, 2, 8), CHANNEL4),
            "use a capacity of 8",
        ),
        (lambda: jopt.init_cache((2.0, 4, 2, 8), INT8), "of integers, got .2.0, 4"),
        (lambda: jopt.init_cache("abcd", INT8), "of integers, got 'abcd'"),
        (lambda: jopt.init_cache(4, INT8), "of positive sizes, got 4"),
        (lambda: jopt.init_cache(SHAPE, INT8, window="x"), "window must be True or"),
        (lambda: jopt.init_cache(SHAPE, INT8, dtype=jnp.int8), "dtype must be a float"),
        (lambda: jopt.init_cache(SHAPE, None, dtype="int8"), "dtype must be a float"),
    ],
)
def test_specs_that_make_no_cache_raise(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_tokens_that_do_not_fit_raise():
    cache = jopt.init_cache(SHAPE, INT8)
    k, v = tokens(2)
    for keys, values in ((k[0], v[0]), (k[..., :3], v[..., :3]), (k, v[:, :1])):
        with pytest.raises(ValueError, match="must be floats of shape"):
            cache.append(keys, values)
    with pytest.raises(ValueError, match="got int32"):
        cache.append(k.astype(int), v)
    k, v = tokens(CAPACITY + 1)
    with pytest.raises(ValueError, match="got 25 at once"):
        append(cache, k, v)


@pytest.mark.parametrize(
    ("num_tokens", "error", "message"),
    [
        ([3, 0, 0], ValueError, r"from 0 to the 2 tokens of keys, got \[3, 0, 0\]"),
        ([0, -1, 0], ValueError, "from 0 to the 2 tokens"),
        ([2**32, 0, 0], ValueError, "from 0 to the 2 tokens"),
        (3, ValueError, "from 0 to the 2 tokens of keys, got 3"),
        ([1.0, 0.0, 0.0], TypeError, r"must be integers, got float64\[3\]"),
        ([True, False, True], TypeError, "must be integers, got bool"),
        ([1, 0], ValueError, r"shape \(3,\) of the rows, got \(2,\)"),
        ([[1, 0, 0]], ValueError, r"shape \(3,\) of the rows, got \(1, 3\)"),
    ],
)
def test_numbers_of_tokens_that_do_not_fit_raise(num_tokens, error, message):
    k, v = tokens(2)
    with pytest.raises(error, match=message) as caught:
        jopt.init_cache(SHAPE, INT8).append(k, v, num_tokens=np.asarray(num_tokens))
    assert "\n" not in str(caught.value)


def test_traced_numbers_of_tokens_are_clamped():
    k, v = tokens(2)
    cache = append(jopt.init_cache(SHAPE, INT8), k, v, num_tokens=jnp.array([-1, 1, 5]))
    np.testing.assert_array_equal(cache.length, [0, 1, 2])
    with pytest.raises(TypeError, match="must be integers, got float32"):
        append(cache, k, v, num_tokens=jnp.ones(3))
