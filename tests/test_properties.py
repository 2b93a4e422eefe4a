"""Promises about masks, for any numbers: hypothesis looks for a counterexample.

A few examples of each run with the suite; `.ci/nightly` draws a thousand and more.
Shapes are fixed, so that each property compiles once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jopt
from jopt.arrays import axis_selection
from tests import contract

pytestmark = pytest.mark.properties
SHAPE = (8, 16)

# Few different values make ties; any float32 makes subnormals, infinities and NaN.
any_scores = st.one_of(
    hnp.arrays(np.float32, SHAPE, elements=st.floats(width=32)),
    hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])),
)
finite_scores = hnp.arrays(
    np.float32, SHAPE, elements=st.floats(-(2.0**60), 2.0**60, width=32)
)
sparsities = st.integers(0, 1_000_000).map(lambda parts: parts / 1_000_000)
PATTERNS = {
    "unstructured": jopt.Unstructured(),
    "block": jopt.Block((4, 4)),
    "channel": jopt.Channel(-1),
}
every_pattern = pytest.mark.parametrize("name", PATTERNS)


@functools.partial(jax.jit, static_argnames="pattern")
def make(scores, sparsity, pattern):
    return jopt.make_mask(scores, sparsity=sparsity, pattern=pattern)


def masks_of(name, scores, sparsity):
    return np.asarray(make(scores, jnp.float32(sparsity), PATTERNS[name]))


def num_units(name, mask):
    if name == "block":
        mask = mask.reshape(2, 4, 4, 4)[:, 0, :, 0]
    if name == "channel":
        mask = mask[0]
    return mask.size, int(mask.sum())


def num_kept(size, sparsity):
    """Count in integers: sparsity has six decimals, a half goes to the even side."""
    parts = round(float(np.float32(sparsity)) * 1_000_000)
    whole, rest = divmod(parts * size, 1_000_000)
    return size - (whole + (2 * rest + whole % 2 > 1_000_000))


@every_pattern
@given(scores=any_scores, sparsity=sparsities)
def test_counts_are_exact(name, scores, sparsity):
    size, kept = num_units(name, masks_of(name, scores, sparsity))
    assert kept == num_kept(size, sparsity)


@every_pattern
@given(scores=any_scores, pair=st.tuples(sparsities, sparsities))
def test_masks_nest_as_sparsity_rises(name, scores, pair):
    low, high = (masks_of(name, scores, s) for s in sorted(pair))
    assert not (high & ~low).any()


@given(scores=finite_scores, sparsity=sparsities)
def test_masking_again_changes_nothing(scores, sparsity):
    mask = masks_of("unstructured", scores, sparsity)
    again = np.where(mask, np.abs(scores) + 1, 0).astype(np.float32)
    np.testing.assert_array_equal(masks_of("unstructured", again, sparsity), mask)


@given(
    order=st.permutations(range(128)),
    signs=hnp.arrays(np.bool_, (128,)),
    sparsity=sparsities,
)
def test_distinct_scores_move_with_their_masks(order, signs, sparsity):
    scores = np.where(signs, 1, -1) * (np.arange(128) + 1.0)
    scores = scores.astype(np.float32)
    straight = masks_of("unstructured", scores.reshape(SHAPE), sparsity).ravel()
    moved = masks_of("unstructured", scores[order].reshape(SHAPE), sparsity).ravel()
    np.testing.assert_array_equal(moved, straight[order])


@pytest.mark.parametrize("pattern", [jopt.NM(2, 4), jopt.NM(3, 8, axis=-1)])
@given(scores=any_scores)
def test_n_of_every_m(pattern, scores):
    mask = np.asarray(make(scores, None, pattern))
    groups = np.moveaxis(mask, pattern.axis, -1).reshape(-1, pattern.m)
    assert (groups.sum(-1) == pattern.n).all()
    values = np.moveaxis(scores, pattern.axis, -1).reshape(-1, pattern.m)
    values = np.where(np.isnan(values), -np.inf, values)
    kept = np.where(groups, values, np.inf).min(-1)
    gone = np.where(groups, -np.inf, values).max(-1)
    assert (kept >= gone).all()


along = jax.jit(lambda x, k: axis_selection.top_k_along(x, k, axis=0))


@given(scores=any_scores, k=st.integers(0, 8))
def test_every_column_keeps_its_own(scores, k):
    mask = np.asarray(along(scores, k))
    assert (mask.sum(0) == k).all()
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    order = np.lexsort((np.isnan(scores), -ranked), axis=0)[:k]
    expected = np.zeros(SHAPE, bool)
    np.put_along_axis(expected, order, True, 0)
    np.testing.assert_array_equal(mask, expected)


@functools.partial(jax.jit, static_argnames="allocation")
def allocate(scores, sparsity, allocation):
    units = [
        jopt.allocation.Units(scores[None], (0,), ("a",), SHAPE),
        jopt.allocation.Units(scores[:4][None], (1,), ("b",), (4, 16)),
        jopt.allocation.Units(scores[:, :2][None], (2,), ("c",), (8, 2)),
    ]
    return [kept.low[0] for kept in allocation(units, sparsity)]


ALLOCATIONS = {
    "global_ranking": jopt.allocation.global_ranking,
    "erk": jopt.allocation.erk,
    "er": jopt.allocation.er,
    "owl": jopt.allocation.owl(),
    "lamp": jopt.allocation.lamp,
    "sensitivity": jopt.allocation.sensitivity({"a": 1.0, ".*": 3.0}),
}
SIZES = (128, 64, 16)


@pytest.mark.parametrize("name", ALLOCATIONS)
@given(scores=finite_scores, sparsity=sparsities)
def test_budgets_add_up(name, scores, sparsity):
    kept = allocate(np.abs(scores), jnp.float32(sparsity), ALLOCATIONS[name])
    kept = [int(k) for k in kept]
    assert sum(kept) == num_kept(sum(SIZES), sparsity)
    assert all(0 <= k <= size for k, size in zip(kept, SIZES, strict=True))


@pytest.fixture(scope="module")
def moving():
    tx = jopt.rigl(optax.adam(0.1), sparsity=0.75, drop_fraction=0.5, every_steps=1)
    state = tx.init({"w": jax.random.normal(jax.random.key(0), SHAPE)})
    return jax.jit(tx.update), state


@given(weights=finite_scores, grads=any_scores)
def test_masks_that_move_keep_their_size(moving, weights, grads):
    update, state = moving
    _, state = update({"w": grads}, state, {"w": weights})
    assert int(jopt.get_masks(state)["w"].sum()) == 32


@pytest.fixture(scope="module")
def restorable(tmp_path_factory):
    tx = jopt.prune(
        optax.adam(0.1), sparsity=0.5, every_steps=2, scores=jopt.scores.saliency
    )
    return jax.jit(tx.update), tx, tmp_path_factory.mktemp("run")


@given(weights=finite_scores, grads=finite_scores)
def test_a_restored_state_goes_on_bit_for_bit(restorable, weights, grads):
    update, tx, folder = restorable
    params, grads = {"w": jnp.asarray(weights)}, {"w": jnp.asarray(grads)}
    updates, state = update(grads, tx.init(params), params)
    tree = {"params": optax.apply_updates(params, updates), "state": state}
    jopt.save(folder / "ckpt", tree, overwrite=True)
    back = jopt.restore(folder / "ckpt", like=tree)
    contract.assert_same(back, tree)
    again = update(grads, back["state"], back["params"])
    contract.assert_same(again, update(grads, tree["state"], tree["params"]))
