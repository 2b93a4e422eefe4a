"""Patterns keep the exact number of groups, and refuse what they do not fit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays import counts, patterns
from jopt.arrays.patterns import NM, Block, Channel, Unstructured, make_mask

few = settings(max_examples=15, deadline=None, derandomize=True)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def best(values, k):
    """Masks the first k of a stable sort by descending value, NaN last."""
    values = np.float64(values)
    order = np.lexsort((-np.where(np.isnan(values), 0, values), np.isnan(values)), -1)
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, order[..., :k], True, -1)
    return mask


def expected_n_of_m(scores, pattern):
    moved = np.moveaxis(np.asarray(scores), pattern.axis, -1)
    groups = best(moved.reshape(*moved.shape[:-1], -1, pattern.m), pattern.n)
    return np.moveaxis(groups.reshape(moved.shape), -1, pattern.axis)


@pytest.mark.parametrize(
    "pattern, shape",
    [
        (NM(2, 4), (8, 5)),
        (NM(2, 4, axis=-1), (3, 16)),
        (NM(1, 4, axis=0), (12,)),
        (NM(4, 8, axis=1), (3, 16, 2, 5)),
        (NM(1, 16, axis=0), (32, 3)),
        (NM(5, 10, axis=-1), (3, 30)),
        (NM(4, 4), (4, 3)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_n_of_m_matches_a_stable_sort_of_each_group(pattern, shape, dtype):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    scores = np.round(normal(*shape), 1).astype(dtype)
    mask = make_mask(scores, pattern=pattern)
    np.testing.assert_array_equal(mask, expected_n_of_m(scores, pattern))


values = st.sampled_from([np.nan, -np.inf, -1, -0.0, 0.0, 1e-40, 1.5e-40, 1, np.inf])


@few
@given(st.lists(values, min_size=16, max_size=16))
def test_two_of_four_are_kept_whatever_the_values(values):
    scores = np.float32(values)
    mask = np.asarray(make_mask(scores, pattern=NM(2, 4, axis=-1)))
    assert (mask.reshape(4, 4).sum(-1) == 2).all()
    np.testing.assert_array_equal(mask, expected_n_of_m(scores, NM(2, 4, axis=-1)))


def test_ties_go_to_the_lower_index_in_every_pattern():
    """An earlier library kept the lower index without, the higher with N:M."""
    ones = np.ones((4, 4), np.float32)
    for pattern in (NM(2, 4, axis=0), NM(8, 16, axis=0)):
        scores = np.ones((pattern.m, 4), np.float32)
        mask = np.asarray(make_mask(scores, pattern=pattern))
        assert mask[: pattern.n].all() and not mask[pattern.n :].any()
    mask = make_mask(ones, sparsity=0.5)
    np.testing.assert_array_equal(np.ravel(mask), np.arange(16) < 8)
    mask = make_mask(ones, sparsity=0.5, pattern=Block((2, 2)))
    np.testing.assert_array_equal(np.asarray(mask)[:, 0], [1, 1, 0, 0])
    mask = make_mask(ones, sparsity=0.5, pattern=Channel(-1))
    np.testing.assert_array_equal(np.asarray(mask)[0], [1, 1, 0, 0])


def test_two_of_four_needs_at_most_a_byte_per_group():
    for axis in (-1, -2):
        mask = jax.jit(lambda s, axis=axis: make_mask(s, pattern=NM(2, 4, axis=axis)))
        compiled = mask.lower(jax.ShapeDtypeStruct((2500, 4000), "float32")).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 2500 * 4000 // 4 + 1000


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.999999, 1.0])
def test_unstructured_keeps_exactly_the_complement(sparsity):
    scores = normal(3, 5, 7)
    kept = scores.size - counts.num_pruned(scores.size, sparsity)
    mask = make_mask(scores, sparsity=sparsity)
    np.testing.assert_array_equal(np.ravel(mask), best(scores.ravel(), kept))
    traced = jax.jit(lambda s, sparsity: make_mask(s, sparsity=sparsity))
    np.testing.assert_array_equal(traced(scores, sparsity), mask)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(
    "block, shape", [((2, 3), (4, 9)), ((4,), (3, 8)), ((1, 2), (3, 4, 6))]
)
def test_blocks_tile_the_last_axes(block, shape, reduce):
    scores = normal(*shape)
    mask = np.asarray(make_mask(scores, sparsity=0.5, pattern=Block(block, reduce)))
    kept, pooled = [], []
    grid = [*shape[: -len(block)]] + [
        size // b for size, b in zip(shape[-len(block) :], block, strict=True)
    ]
    steps = (1,) * (len(shape) - len(block)) + block
    for place in np.ndindex(*grid):
        inside = tuple(
            slice(p * s, p * s + s) for p, s in zip(place, steps, strict=True)
        )
        assert mask[inside].all() or not mask[inside].any()
        kept.append(mask[inside].all())
        pooled.append(getattr(np.float32(scores[inside]), reduce)())
    k = len(pooled) - counts.num_pruned(len(pooled), 0.5)
    np.testing.assert_array_equal(kept, best(np.array(pooled), k))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_kept_whole(axis):
    scores = normal(4, 6, 10)
    mask = np.asarray(make_mask(scores, sparsity=0.3, pattern=Channel(axis)))
    size = scores.shape[axis]
    per_channel = np.moveaxis(mask, axis, 0).reshape(size, -1)
    assert (per_channel.all(1) | ~per_channel.any(1)).all()
    sums = np.moveaxis(scores, axis, 0).reshape(size, -1).astype(np.float64).sum(1)
    k = size - counts.num_pruned(size, 0.3)
    np.testing.assert_array_equal(per_channel[:, 0], best(sums, k))


def test_a_channel_or_block_with_nan_goes_first():
    scores = np.ones((4, 4), np.float32)
    scores[1, 0] = np.nan
    mask = np.asarray(make_mask(scores, sparsity=0.25, pattern=Channel(0)))
    np.testing.assert_array_equal(mask[:, 0], [1, 0, 1, 1])
    for reduce in ("mean", "max"):
        mask = make_mask(scores, sparsity=0.25, pattern=Block((2, 2), reduce))
        np.testing.assert_array_equal(np.asarray(mask)[::2, ::2], [[0, 1], [1, 1]])


def test_layers_mapped_one_by_one_keep_their_share():
    """Ranked as one tensor, layers scaled 1, 10, 100 once kept 0, 0.53 and 0.97."""
    stacked = normal(3, 20, 20) * np.float32([1, 10, 100])[:, None, None]
    masks = jax.lax.map(lambda scores: make_mask(scores, sparsity=0.5), stacked)
    np.testing.assert_array_equal(np.sum(masks, (1, 2)), [200, 200, 200])
    blocks = jax.lax.map(
        lambda s: make_mask(s, sparsity=0.5, pattern=Block((4, 4))), stacked[:, :12, :8]
    )
    np.testing.assert_array_equal(np.sum(blocks, (1, 2)), [48, 48, 48])


@pytest.mark.parametrize(
    "pattern, shape, message",
    [
        (NM(2, 4), (6, 8), r"m=4 divides, got shape \(6, 8\) for 'a/kernel'"),
        (NM(2, 4), (8,), r"axis -2, got shape \(8,\) for 'a/kernel'"),
        (Block((4, 4)), (8, 6), r"divides, got shape \(8, 6\) for 'a/kernel'"),
        (Block((4, 4)), (8,), r"divides, got shape \(8,\) for 'a/kernel'"),
        (Channel(2), (8, 8), r"axis 2, got shape \(8, 8\) for 'a/kernel'"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_name(pattern, shape, message):
    with pytest.raises(ValueError, match=message):
        patterns.check_pattern(pattern, shape, path="a/kernel")
    with pytest.raises(ValueError, match="'scores'"):
        make_mask(jnp.ones(shape), sparsity=None, pattern=pattern)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NM(5, 4), "NM needs integers 1 <= n <= m, got n=5 and m=4"),
        (lambda: NM(0, 4), "NM needs integers 1 <= n <= m"),
        (lambda: NM(2.0, 4), "NM needs integers"),
        (lambda: Block(()), "Block needs a tuple of positive sizes"),
        (lambda: Block(4), "Block needs a tuple of positive sizes"),
        (lambda: Block((2, 0)), "Block needs a tuple of positive sizes"),
        (lambda: Block((2, 2), "min"), "reduce='mean' or 'max', got 'min'"),
    ],
)
def test_a_pattern_that_is_none_is_refused_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_n_of_m_takes_no_sparsity_and_the_others_need_one():
    """An earlier library ignored the sparsity beside N:M."""
    scores = jnp.ones((8, 8))
    for sparsity in (0.5, 0.0, jnp.float32(0.3)):
        with pytest.raises(ValueError, match="sparsity must be None with NM"):
            make_mask(scores, sparsity=sparsity, pattern=NM(2, 4))
    for pattern in (Unstructured(), Block((2, 2)), Channel()):
        with pytest.raises(ValueError, match="sparsity must be given with"):
            make_mask(scores, pattern=pattern)
    with pytest.raises(TypeError, match="pattern must be Unstructured"):
        make_mask(scores, sparsity=0.5, pattern="nm_2,4")


@pytest.mark.parametrize("mesh_name", ["auto_mesh", "explicit_mesh"])
@pytest.mark.parametrize("spec", [("data", None), (None, "data")])
@pytest.mark.parametrize(
    "pattern, sparsity",
    [
        (NM(2, 4), None),
        (NM(8, 16), None),
        (Block((2, 4), "max"), 0.5),
        (Channel(), 0.5),
    ],
)
def test_a_sharded_pattern_is_bit_identical(
    request, mesh_name, spec, pattern, sparsity
):
    mesh = request.getfixturevalue(mesh_name)
    scores = np.round(normal(32, 64))  # sums are exact
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    placed = jax.device_put(scores, sharding)
    mask = jax.jit(lambda s: make_mask(s, sparsity=sparsity, pattern=pattern))
    compiled = mask.lower(placed).compile()
    result = compiled(placed)
    np.testing.assert_array_equal(result, mask(scores))
    if pattern == NM(2, 4):  # the groups lie on one device each
        assert "all-gather" not in compiled.as_text()
        assert result.sharding.is_equivalent_to(sharding, 2)
