"""Allocations against NumPy in float64, and their promises: exact, bounded, nested."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from jopt.arrays import counts
from jopt.pruning.allocation.ranking import cuts
from jopt.pruning.allocation.shares import fill
from jopt.pruning.allocation.units import Units

SHAPES = ((3, 3, 1, 8), (8, 16), (40,), (3, 3, 8, 16), (16, 4), (2, 2))
TABLE = {"layer_[01]": 1.0, "layer_2": 0.25, ".*": 3.0}
ALLOCATIONS = {
    "erk": jopt.allocation.erk,
    "er": jopt.allocation.er,
    "sensitivity": jopt.allocation.sensitivity(TABLE),
    "owl": jopt.allocation.owl(threshold=2.0, limit=0.2),
    "global_ranking": jopt.allocation.global_ranking,
    "lamp": jopt.allocation.lamp,
}
EXACT = pytest.mark.parametrize("name", ALLOCATIONS)


def make_units(shapes=SHAPES, seed=0):
    """Layers of different sizes and scales, with ties, in the order of positions."""
    rng = np.random.default_rng(seed)
    return [
        Units(
            jax.device_put(
                np.float32(np.round(np.abs(rng.normal(size=(1, *s))) * 8) / 8 * 2.0**i)
            ),
            (i,),
            (f"layer_{i}",),
            s,
        )
        for i, s in enumerate(shapes)
    ]


UNITS = make_units()
SIZES = np.array([u.size for u in UNITS])


def as_ints(kept):
    """Return the counts of all layers, in the order of the lists."""
    return np.concatenate(
        [np.asarray(k.high, np.int64) * 2**16 + np.asarray(k.low) for k in kept]
    )


@pytest.fixture(scope="module")
def traced():
    """Compile each allocation once, with a traced sparsity."""
    return {
        name: jax.jit(lambda s, a=allocation: a(UNITS, s))
        for name, allocation in ALLOCATIONS.items()
    }


def asked(sparsity, sizes=SIZES):
    return int(sizes.sum()) - round(
        Fraction(round(sparsity * 10**6), 10**6) * int(sizes.sum())
    )


sparsities = st.integers(0, 1000).map(lambda parts: parts / 1000)


@EXACT
@settings(deadline=None)
@given(low=sparsities, high=sparsities)
def test_counts_are_exact_bounded_nested_and_the_same_when_traced(
    traced, name, low, high
):
    low, high = min(low, high), max(low, high)
    kept = [as_ints(traced[name](jnp.float32(s))) for s in (low, high)]
    for sparsity, found in zip((low, high), kept, strict=True):
        assert found.sum() == asked(sparsity)
        assert np.all((found >= 0) & (found <= SIZES))
        eager = ALLOCATIONS[name](UNITS, sparsity)
        np.testing.assert_array_equal(as_ints(eager), found)
    assert np.all(kept[0] >= kept[1]), "masks must be nested"


@EXACT
def test_every_layer_shrinks_step_by_step(traced, name):
    """All counts from full to empty: no layer ever gains, where remainders would."""
    before = SIZES
    for sparsity in np.linspace(0, 1, 257):
        kept = as_ints(traced[name](jnp.float32(sparsity)))
        assert np.all(kept <= before)
        before = kept
    assert before.sum() == 0


def water_level(ratios, sizes, k):
    """Solve sum n_i min(1, eps r_i) = k in float64 by filling the densest first."""
    ratios, sizes = np.asarray(ratios, np.float64), np.asarray(sizes, np.float64)
    full = np.zeros(len(sizes), bool)
    while True:
        rest = ~full
        if not rest.any():
            return sizes
        eps = (k - sizes[full].sum()) / (ratios * sizes)[rest].sum()
        over = rest & (eps * ratios > 1)
        if not over.any():
            return np.where(full, sizes, np.minimum(1, eps * ratios) * sizes)
        full |= over


@pytest.mark.parametrize("sparsity", [0.02, 0.35, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("name", ["erk", "er", "sensitivity"])
def test_densities_are_in_proportion_and_capped(name, sparsity):
    ratios = {
        "erk": [sum(s) / math.prod(s) for s in SHAPES],
        "er": [sum(s[-2:]) / math.prod(s[-2:]) for s in SHAPES],
        "sensitivity": [1.0, 1.0, 0.25, 3.0, 3.0, 3.0],
    }[name]
    ideal = water_level(ratios, SIZES, asked(sparsity))
    kept = as_ints(ALLOCATIONS[name](UNITS, sparsity))
    np.testing.assert_allclose(kept, ideal, atol=1.0)
    # JaxPruner rounds every layer by itself: where these add up, they are ours.
    rounded = np.round(ideal)
    if rounded.sum() == kept.sum() and np.all(np.abs(ideal % 1 - 0.5) > 1e-3):
        np.testing.assert_array_equal(kept, rounded)


def test_erk_counts_units_and_takes_ratios_of_weights():
    """Four blocks of a layer of 64 weights: ratio 16/64, budget 4."""
    units = [
        Units(jnp.ones((1, 2, 2)), (0,), ("a",), (8, 8)),
        Units(jnp.ones((1, 64)), (1,), ("b",), (8, 8)),
    ]
    kept = as_ints(jopt.allocation.erk(units, 0.5))
    np.testing.assert_array_equal(kept, [2, 32])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
@EXACT
def test_one_layer_keeps_the_count(name, sparsity):
    unit = UNITS[1]._replace(positions=(0,))
    (kept,) = ALLOCATIONS[name]([unit], sparsity)
    assert as_ints([kept]) == asked(sparsity, SIZES[1:2])


@EXACT
def test_stacked_layers_get_what_they_get_apart(name):
    """In whatever lists the layers stand, and in whatever order the lists."""
    rng = np.random.default_rng(1)
    table = {"a": [1.0, 2.0, 3.0], "b": 2.0}
    allocation = ALLOCATIONS[name]
    if name == "sensitivity":
        allocation = jopt.allocation.sensitivity(table)
    scores = jnp.asarray(np.round(np.abs(rng.normal(size=(3, 8, 6))), 1), jnp.float32)
    other = jnp.asarray(np.round(np.abs(rng.normal(size=(1, 5, 4))), 1), jnp.float32)
    names = ("a[0]", "a[1]", "a[2]")
    last = Units(other, (3,), ("b",), (5, 4))
    together = [last, Units(scores, (0, 1, 2), names, (8, 6))]
    apart = [
        Units(scores[i : i + 1], (i,), names[i : i + 1], (8, 6)) for i in range(3)
    ] + [last]
    for sparsity in (0.37, 0.8):
        b, *a = as_ints(allocation(together, sparsity))
        np.testing.assert_array_equal(as_ints(allocation(apart, sparsity)), [*a, b])


@pytest.mark.parametrize("sparsity", [0.3, 0.77, 0.95])
def test_global_ranking_counts_a_stable_sort(sparsity):
    flat = np.concatenate([np.asarray(u.scores, np.float64).ravel() for u in UNITS])
    best = np.argsort(-flat, kind="stable")[: asked(sparsity)]
    layer = np.repeat(np.arange(len(SIZES)), SIZES)
    expected = np.bincount(layer[best], minlength=len(SIZES))
    kept = jopt.allocation.global_ranking(UNITS, sparsity)
    np.testing.assert_array_equal(as_ints(kept), expected)


@pytest.mark.parametrize("sparsity", [0.3, 0.77, 0.95])
def test_lamp_follows_the_paper(sparsity):
    """u^2 over the sum of what is not smaller in its layer, in float64."""
    rng = np.random.default_rng(2)
    drawn = [np.abs(rng.normal(size=s)) * 10.0**i for i, s in enumerate(SHAPES)]
    units = [
        u._replace(scores=jax.device_put(np.float32(x)[None]))
        for u, x in zip(UNITS, drawn, strict=True)
    ]
    found = []
    for x in drawn:
        u = np.sort(x.astype(np.float32).astype(np.float64).ravel())[::-1] ** 2
        found.append(u / np.cumsum(u))
    flat = np.concatenate(found)
    best = np.argsort(-flat, kind="stable")[: asked(sparsity)]
    layer = np.repeat(np.arange(len(SIZES)), SIZES)
    expected = np.bincount(layer[best], minlength=len(SIZES))
    kept = as_ints(jopt.allocation.lamp(units, sparsity))
    np.testing.assert_allclose(kept, expected, atol=1)
    assert kept.min() >= 1


def test_lamp_does_not_depend_on_the_scale_of_a_layer():
    units = make_units()
    kept = jopt.allocation.lamp(units, 0.7)
    scaled = [
        u._replace(scores=np.asarray(u.scores) * np.float32(10.0 ** (6 * i - 18)))
        for i, u in enumerate(units)
    ]
    again = jopt.allocation.lamp(scaled, 0.7)
    np.testing.assert_allclose(as_ints(again), as_ints(kept), atol=1)


def test_lamp_ranks_what_is_not_finite_last():
    scores = jnp.array([[jnp.nan, 1.0, 2.0, -3.0]])
    (kept,) = jopt.allocation.lamp([Units(scores, (0,))], 0.5)
    assert as_ints([kept]) == 2


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_owl_spreads_densities_by_outliers(sparsity):
    rng = np.random.default_rng(3)
    scores = np.abs(rng.normal(size=(4, 500)))
    for i in range(4):
        scores[i, : 10 * i] *= 40
    unit = Units(jnp.asarray(scores, jnp.float32), (0, 1, 2, 3))
    kept = as_ints(jopt.allocation.owl(threshold=5.0, limit=0.1)([unit], sparsity))
    ratios = np.mean(scores > 5.0 * scores.mean(axis=1, keepdims=True), axis=1)
    spread = (ratios - ratios.min()) / np.ptp(ratios) * 0.2
    expected = (spread - spread.mean() + 1 - sparsity) * 500
    np.testing.assert_allclose(kept, expected, atol=1.0)
    assert kept.sum() == 2000 - round(2000 * sparsity)
    none = as_ints(jopt.allocation.owl(limit=0.0)([unit], sparsity))
    np.testing.assert_array_equal(none, 500 - round(500 * sparsity))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.123456])
def test_huge_layers_add_up_exactly(sparsity):
    """Sizes beyond 32 bits: the shares to a millionth, the sum to a unit."""
    sizes = [3 * 10**10, 2**31 + 7, 10**6, 5, 2**33]
    weights = np.array([1.0, 0.5, 3.0, 8.0, 0.25]) * sizes / 8
    k = sum(sizes) - counts.num_pruned(sum(sizes), sparsity)
    solve = jax.jit(
        lambda k: fill(
            lambda eps: jnp.round(weights.astype(np.float32) * eps),
            counts.as_counts(sizes),
            k,
        )
    )
    kept = as_ints([solve(counts.as_count(k))])
    assert kept.sum() == k
    ideal = water_level([1.0, 0.5, 3.0, 8.0, 0.25], sizes, k)
    np.testing.assert_allclose(kept, ideal, rtol=1e-6, atol=1)


def test_thresholds_mask_what_the_counts_keep():
    """The ranking's own threshold equals a search in each layer, ties included."""
    ranking, units = jopt.allocation.global_ranking, UNITS[:3]
    rank = jax.jit(lambda s: ranking(units, s))
    divide = jax.jit(lambda s: cuts(ranking, units, s))
    mask_above = jax.jit(jax.vmap(jopt.arrays.selection.mask_above))
    for sparsity in (0.0, 0.4, 0.9, 1.0):
        kept = as_ints(rank(sparsity))
        found = [divide(sparsity)]
        if sparsity == 0.4:  # and as a number of Python
            found.append(cuts(ranking, units, sparsity))
        for i, u in enumerate(units):
            best = np.argsort(-np.asarray(u.scores[0]).ravel(), kind="stable")
            expected = np.isin(np.arange(u.size), best[: kept[i]])
            for cut in found:
                mask = mask_above(u.scores, cut[i])
                np.testing.assert_array_equal(np.ravel(mask), expected)


@pytest.fixture(scope="module", params=ALLOCATIONS)
def on_one_device(request):
    """An allocation, its layers, and what they keep without a mesh."""
    allocation, units = ALLOCATIONS[request.param], make_units([(8, 16), (16, 24)], 4)
    if request.param == "sensitivity":
        allocation = jopt.allocation.sensitivity({".*0": 1.0, ".*1": 2.0})
    return allocation, units, as_ints(allocation(units, 0.7))


@pytest.mark.parametrize("kind", ["auto_mesh", "explicit_mesh"])
def test_sharded_layers_count_as_on_one_device(on_one_device, kind, request):
    mesh = request.getfixturevalue(kind)
    allocation, units, expected = on_one_device
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    placed = [u._replace(scores=jax.device_put(u.scores, sharding)) for u in units]
    scores = [u.scores for u in placed]

    def allocate(scores, sparsity):
        members = [u._replace(scores=s) for u, s in zip(units, scores, strict=True)]
        return allocation(members, sparsity)

    with jax.set_mesh(mesh):
        kept = jax.jit(allocate)(scores, jnp.float32(0.7))
    np.testing.assert_array_equal(as_ints(kept), expected)


@pytest.mark.parametrize("name", ["erk", "lamp", "sensitivity", "owl"])
def test_host_and_step_make_the_same_masks(name):
    rng = np.random.default_rng(5)
    params = {
        "layer_0": np.float32(rng.normal(size=(8, 6))),
        "layer_1": np.float32(rng.normal(size=(3, 8, 6))),
        "layer_2": np.float32(rng.normal(size=(8, 6))),
    }
    params = jax.device_put(params)
    table = {"layer_1": [1.0, 2.0, 4.0], ".*": 1.5}
    allocation = ALLOCATIONS[name]
    if name == "sensitivity":
        allocation = jopt.allocation.sensitivity(table)
    masks = []
    for update in ("step", "host"):
        tx = jopt.prune(
            optax.sgd(0.1),
            sparsity=lambda count: 0.6 + 0.0 * count,
            allocation=allocation,
            stacked_axes={"layer_1": 0, ".*": None},
            update=update,
        )
        state = tx.init(params)
        if update == "host":
            state = jopt.update_masks(tx, state, params)
        else:
            _, state = jax.jit(tx.update)(params, state, params)
        masks.append(jopt.get_masks(state))
    jax.tree.map(np.testing.assert_array_equal, *masks)
    kept = sum(int(m.sum()) for m in jax.tree.leaves(masks[0]))
    assert kept == 240 - round(240 * 0.6)


def test_sensitivity_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"got none for 'layer_2'.*near names: 'layr"):
        jopt.allocation.sensitivity({"layer_[01]": 1.0, "layr_2": 1.0})(UNITS, 0.5)
    with pytest.raises(ValueError, match=r"at least 0, got -1.0 for 'a'"):
        jopt.allocation.sensitivity({"a": -1.0})
    with pytest.raises(ValueError, match="regular expressions"):
        jopt.allocation.sensitivity({"a[": 1.0})
    with pytest.raises(ValueError, match="one for each layer, for 'layer_0', got 2"):
        jopt.allocation.sensitivity({".*": [1.0, 2.0]})(UNITS, 0.5)
    with pytest.raises(ValueError, match="above 0 for some layer"):
        jopt.allocation.sensitivity({".*": 0.0})(UNITS, 0.5)
    with pytest.raises(ValueError, match="must name every layer"):
        jopt.allocation.sensitivity({".*": 1.0})([UNITS[0]._replace(names=())], 0.5)


def test_a_sensitivity_of_zero_comes_last():
    allocation = jopt.allocation.sensitivity({"layer_1": 0.0, ".*": 1.0})
    others = SIZES.sum() - SIZES[1]
    kept = as_ints(allocation(UNITS, float(SIZES[1] / SIZES.sum())))
    assert kept[1] <= 1
    kept = as_ints(allocation(UNITS, 0.01))
    assert kept.sum() - kept[1] == others
    name = "layer_0[2]"
    unit = Units(jnp.ones((1, 4)), (0,), (name,), (4,))
    pair = [unit, Units(jnp.ones((1, 4)), (1,), ("layer_0[1]",), (4,))]
    kept = as_ints(jopt.allocation.sensitivity({name: 3.0, ".*": 1.0})(pair, 0.5))
    np.testing.assert_array_equal(kept, [3, 1])


def test_owl_checks_its_numbers():
    with pytest.raises(ValueError, match="threshold must be above 0"):
        jopt.allocation.owl(threshold=0.0)
    with pytest.raises(ValueError, match=r"limit must be in \[0, 0.5\], got 0.6"):
        jopt.allocation.owl(limit=0.6)


def test_an_ensemble_of_sparsities():
    kept = jax.jit(jax.vmap(lambda s: jopt.allocation.erk(UNITS, s)))(
        jnp.array([0.5, 0.9])
    )
    for i, sparsity in enumerate((0.5, 0.9)):
        one = jax.tree.map(lambda x, i=i: x[i], kept)
        expected = as_ints(jopt.allocation.erk(UNITS, sparsity))
        np.testing.assert_array_equal(as_ints(one), expected)
