"""Exactly the k largest are kept, whatever the scores and wherever they lie."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jopt.arrays import counts, scans, selection

few = settings(max_examples=30, deadline=None, derandomize=True)
top_k_mask = jax.jit(selection.top_k_mask)


@pytest.fixture(autouse=True, scope="module", params=["sorted", "searched"])
def small_arrays(request):
    """Small arrays are sorted, unless they are to be searched as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "searched":
            patch.setattr(selection, "_SORTED", 0)
        jax.clear_caches()
        yield
    jax.clear_caches()


DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"]


def expected_mask(scores, k):
    """Keeps the first k of a stable sort by descending value, NaN last."""
    values = np.asarray(scores).ravel().astype(np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    is_nan = np.isnan(np.asarray(scores).ravel().astype(np.float64))
    order = np.lexsort((np.arange(values.size), -values, is_nan))
    mask = np.zeros(values.size, bool)
    mask[order[:k]] = True
    return mask.reshape(np.shape(scores))


def check(scores, k, mask=None):
    mask = np.asarray(top_k_mask(scores, k) if mask is None else mask)
    assert mask.sum() == min(max(k, 0), mask.size)
    np.testing.assert_array_equal(mask, expected_mask(scores, k))


def numbers(dtype, size, seed=0):
    values = np.random.default_rng(seed).normal(size=size) * 10
    return np.abs(values).astype(dtype) if "u" in dtype else values.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (2, 3, 101)])
def test_every_type_and_rank_matches_a_stable_sort(dtype, shape):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    scores = numbers("uint32" if dtype == np.uint32 else "float64", shape).astype(dtype)
    for k in {0, 1, scores.size // 3, scores.size - 1, scores.size}:
        check(scores, k)


special = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 1e-40, 1.5e-40, -1e-45]
)
anything = st.one_of(special, st.floats(width=32), st.sampled_from([1.0, 2.0, 3.0]))


@few
@given(st.lists(anything, min_size=24, max_size=24), st.integers(0, 24))
def test_ties_nan_infinities_and_subnormals_rank_by_value(values, k):
    check(np.float32(values), k)


@few
@given(st.lists(anything, min_size=24, max_size=24))
def test_keeping_more_never_drops_what_was_kept(values):
    scores = np.float32(values)
    masks = np.array([top_k_mask(scores, k) for k in range(25)])
    assert not (masks[:-1] & ~masks[1:]).any()


@few
@given(st.lists(st.floats(width=16), min_size=2, max_size=2))
def test_keys_are_ordered_as_the_values(pair):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        a, b = np.array(pair, dtype)
        keys = selection.ordered_keys(np.array([a, b], dtype)).tolist()
        if np.isnan(a):
            assert keys[0] == 0
        elif not np.isnan(b):
            assert (a < b) == (keys[0] < keys[1]) and (a == b) == (keys[0] == keys[1])


def test_subnormals_are_not_flushed():
    """A float compare on a CPU says 1e-40 >= 1.5e-40."""
    scores = np.float32([1e-40, 1.5e-40, 1e-45, 0, -1e-45, 1.4e-40])
    np.testing.assert_array_equal(top_k_mask(scores, 1), [0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(top_k_mask(scores, 3), [1, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(top_k_mask(scores, 5), [1, 1, 1, 1, 0, 1])


def test_nan_ranks_last_and_is_kept_only_to_reach_k():
    scores = np.float32([np.nan, -np.inf, 0, -np.nan, np.inf])
    np.testing.assert_array_equal(top_k_mask(scores, 3), [0, 1, 1, 0, 1])
    np.testing.assert_array_equal(top_k_mask(scores, 4), [1, 1, 1, 0, 1])


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_the_ends_of_the_integers_are_ranked(dtype):
    ends = np.iinfo(dtype)
    scores = np.array([ends.max, ends.min, 0, ends.max, 1, ends.min], dtype)
    for k in range(7):
        check(scores, k)


SHAPES_OF_SCORES = {
    "normal": lambda r, n: r.normal(size=n),
    "half-normal": lambda r, n: np.abs(r.normal(size=n)),
    "sixteen values": lambda r, n: np.round(r.normal(size=n) * 2),
    "half zeros": lambda r, n: np.maximum(r.normal(size=n), 0),
    "heavy tail": lambda r, n: np.exp(5 * r.normal(size=n)),
    "a grid": lambda r, n: np.round(300 * r.normal(size=n)) * 0.0137,
    "two scales": lambda r, n: np.where(np.arange(n) % 2, 1e-30, 1.0) * r.random(n),
    "all equal": lambda r, n: np.full(n, 0.1),
    "sorted": lambda r, n: np.sort(r.normal(size=n)),
}


@pytest.mark.parametrize("name", SHAPES_OF_SCORES)
def test_large_arrays_match_a_stable_sort(name):
    scores = SHAPES_OF_SCORES[name](np.random.default_rng(1), 150_001)
    scores = np.float32(scores)
    for sparsity in (0.0, 0.3, 0.9, 0.99999, 1.0):
        check(scores, scores.size - counts.num_pruned(scores.size, sparsity))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_panels_of_lanes_and_chunks_of_ties_add_up(monkeypatch, dtype):
    monkeypatch.setattr(scans, "_LANES", 32)  # as 10^10 elements would be read
    monkeypatch.setattr(scans, "_TIE_CHUNK", 128)
    mask = jax.jit(lambda scores, k: selection.top_k_mask(scores, k))
    scores = numbers("float32", (211, 151)).astype(ml_dtypes.bfloat16).astype(dtype)
    for k in (0, 7, 3001, 31_000, scores.size):
        check(scores, k, mask(scores, k))
        check(np.ones_like(scores), k, mask(np.ones_like(scores), k))


def test_columns_of_different_scale_are_sampled_alike():
    scores = numbers("float32", (1024, 512)) * np.float32(1.1) ** np.arange(512)
    check(scores, 5000)


def test_k_may_be_a_count_a_python_or_a_traced_integer():
    scores = numbers("float32", (37, 11))
    expected = expected_mask(scores, 100)
    for k in (100, jnp.int32(100), jnp.uint32(100), counts.as_count(100)):
        np.testing.assert_array_equal(selection.top_k_mask(scores, k), expected)
    np.testing.assert_array_equal(top_k_mask(scores, 100), expected)
    assert not top_k_mask(scores, -5).any() and top_k_mask(scores, 10**9).all()


def test_only_ordered_types_are_ranked():
    with pytest.raises(TypeError, match=r"scores must be float32, .* got complex64"):
        selection.top_k_mask(jnp.ones(3, jnp.complex64), 1)
    with pytest.raises(TypeError, match="k must be an integer"):
        selection.top_k_mask(jnp.ones(3), 0.5)


def test_empty_arrays_have_empty_masks():
    assert selection.top_k_mask(jnp.ones((0, 3)), 2).shape == (0, 3)
    assert selection.top_k_masks([], 2) == []


def test_vmap_selects_in_every_row():
    scores = np.round(numbers("float32", (5, 300)))
    ks = np.arange(5) * 60
    masks = jax.jit(jax.vmap(selection.top_k_mask))(scores, ks)
    for row, k, mask in zip(scores, ks, masks, strict=True):
        check(row, k, mask)


def test_control_flow_and_gradients_pass_through():
    scores = np.round(numbers("float32", (40, 50)))

    def loss(w, k):
        mask = jax.lax.cond(
            k > 0, selection.top_k_mask, lambda w, k: jnp.zeros_like(w, bool), w, k
        )
        return jnp.sum(jnp.where(mask, w, 0))

    step = jax.jit(lambda ks: jax.lax.map(lambda k: jax.grad(loss)(scores, k), ks))
    for k, gradient in zip((0, 70, 900), step(jnp.array([0, 70, 900])), strict=True):
        np.testing.assert_array_equal(gradient, expected_mask(scores, k))


def ranked_together(arrays, k):
    flat = expected_mask(np.concatenate([np.ravel(a) for a in arrays]), k)
    ends = np.cumsum([np.size(a) for a in arrays])[:-1]
    parts = np.split(flat, ends)
    return [p.reshape(np.shape(a)) for p, a in zip(parts, arrays, strict=True)]


top_k_masks = jax.jit(selection.top_k_masks)


@pytest.mark.parametrize("rounding", [2, 0, -1])
def test_arrays_ranked_together_share_one_threshold(rounding):
    shapes = [(30, 40), (7,), (0, 3), (), (2, 5, 60)]
    arrays = [
        np.round(numbers("float32", s, i), rounding) for i, s in enumerate(shapes)
    ]
    for k in (0, 1, 500, 1500, sum(a.size for a in arrays)):
        masks = top_k_masks(arrays, k)
        for mask, expected in zip(masks, ranked_together(arrays, k), strict=True):
            np.testing.assert_array_equal(mask, expected)


def test_mixed_float_types_rank_by_value():
    values = np.round(numbers("float32", (50,)))
    subnormal = np.array([1e-40, -1e-40, 3e-40], ml_dtypes.bfloat16)
    arrays = [values, values.astype(ml_dtypes.bfloat16), subnormal]
    for k in (3, 40, 60, 103):
        masks = top_k_masks(arrays, k)
        for mask, expected in zip(masks, ranked_together(arrays, k), strict=True):
            np.testing.assert_array_equal(mask, expected)
    with pytest.raises(TypeError, match="ranked together must have one type"):
        selection.top_k_masks([values, np.arange(3)], 2)


def test_a_threshold_says_what_is_above_and_what_is_needed():
    found = selection.find_threshold([np.float32([3, 1, 1]), np.float32([1, 2])], 3)
    assert int(found.key) == int(selection.ordered_keys(jnp.float32(1)))
    assert bool(found.split) and int(found.need.low) == 1
    everything = selection.find_threshold([np.float32([3, 1, 1])], 3)
    assert not bool(everything.split) and int(everything.need.low) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_temporary_grows_with_the_array(dtype):
    lowered = top_k_mask.lower(jax.ShapeDtypeStruct((2500, 4000), dtype), 1_000_000)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1e6


def test_sizes_beyond_2_to_the_32_are_traced():
    scores = jax.ShapeDtypeStruct((2**17, 2**16), jnp.float32)
    k = 2**33 - selection.num_pruned(2**33, 0.9)
    mask = jax.eval_shape(lambda s: selection.top_k_mask(s, k), scores)
    assert mask.shape == scores.shape


SPECS = [((64,), ("x",)), ((16, 24), ("x", None)), ((5, 16, 3), (None, "x", None))]


def gathers(compiled):
    """Returns the numbers of elements that all-gathers of a program bring together."""
    shapes = re.findall(r"= \S+?\[([\d,]*)\]\S* all-gather", compiled.as_text())
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


@pytest.fixture(scope="module", params=[AxisType.Auto, AxisType.Explicit])
def mesh(request):
    return jax.make_mesh((8,), ("x",), axis_types=(request.param,))


@pytest.mark.parametrize("shape, spec", SPECS)
def test_a_sharded_mask_is_bit_identical_and_nothing_is_gathered(mesh, shape, spec):
    scores = np.round(numbers("float32", shape))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    sharded = jax.device_put(scores, sharding)
    mask = jax.jit(lambda scores, k: selection.top_k_mask(scores, k))
    compiled = mask.lower(sharded, 5).compile()
    assert max(gathers(compiled), default=0) <= 8
    for k in (0, 5, scores.size // 2, scores.size):
        result = compiled(sharded, k)
        check(scores, k, result)
        assert result.sharding.is_equivalent_to(sharding, len(shape))


def test_a_two_dimensional_mesh_and_several_arrays():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    arrays = [np.round(numbers("float32", (16, 24), i)) for i in range(2)]
    specs = [PartitionSpec("x", "y"), PartitionSpec(("y", "x"))]
    sharded = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]
    for k in (3, 400):
        masks = top_k_masks(sharded, k)
        for mask, expected in zip(masks, ranked_together(arrays, k), strict=True):
            np.testing.assert_array_equal(mask, expected)
    with jax.set_mesh(mesh):  # an array on one device, while a mesh is set
        check(arrays[0], 50)


def test_inside_shard_map_a_named_axis_makes_one_ranking(mesh):
    scores = np.round(numbers("float32", (16, 40)))
    spec = PartitionSpec("x")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    def together(scores, k):
        return selection.top_k_mask(scores, k, axis_name="x")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    def apart(scores, k):
        return selection.top_k_mask(scores, k)

    with jax.set_mesh(mesh):
        sharded = jax.device_put(scores, NamedSharding(mesh, spec))
        for k in (0, 33, 640):
            check(scores, k, together(sharded, k))
        rows = np.asarray(apart(sharded, 33)).reshape(8, 2, 40)
    for row, part in zip(rows, scores.reshape(8, 2, 40), strict=True):
        check(part, 33, row)


def test_inside_shard_map_several_arrays_share_ties_in_order(mesh):
    arrays = [np.round(numbers("float32", (8, 30), i) / 5) for i in range(2)]
    spec = PartitionSpec("x")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def together(*arrays):
        return selection.top_k_masks(arrays, 101, axis_name="x")

    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays]
        masks = together(*placed)
    for mask, expected in zip(masks, ranked_together(arrays, 101), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_pmap_with_an_axis_name_makes_one_ranking():
    scores = np.round(numbers("float32", (8, 100)))
    mask = jax.pmap(
        lambda scores: selection.top_k_mask(scores, 99, axis_name="i"), axis_name="i"
    )
    check(scores, 99, mask(scores))


def test_constants_that_are_transposed_inside_are_read_right():
    """XLA folds the transpose of a constant, and must not mix up its layouts."""
    scores = jax.random.normal(jax.random.key(0), (5, 16))
    expected = top_k_mask(scores.T, 24)

    @jax.jit
    def nested(k):
        return jax.jit(lambda x: top_k_mask(x.T, k))(scores)

    np.testing.assert_array_equal(nested(24), expected)
