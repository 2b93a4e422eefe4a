"""`prune` against a NumPy oracle, its schedule, its options and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import contract


def oracle_mask(scores, sparsity):
    """Keep the largest, ties to the lower index: a stable sort, in NumPy."""
    flat = np.asarray(scores, np.float64).ravel()
    kept = flat.size - round(sparsity * flat.size)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:kept]] = True
    return mask.reshape(scores.shape)


def test_follows_the_definition_step_by_step():
    """Masks from the params that enter; the inner step where kept; exact zeros."""
    ramp = jopt.schedules.linear_sparsity(0.0, 0.75, begin_step=2, end_step=6)
    inner = optax.sgd(0.1, momentum=0.9)
    tx = jopt.prune(inner, sparsity=ramp, every_steps=2, begin_step=2, end_step=6)
    params = {"kernel": contract.make_params()["dense"]["kernel"]}
    state, inner_state = tx.init(params), inner.init(params)
    expected, mask = np.asarray(params["kernel"]), np.ones((8, 16), bool)
    update = jax.jit(tx.update)
    for step in range(9):
        grads = contract.make_grads(params, step)
        steps, inner_state = inner.update(
            grads, inner_state, {"kernel": jnp.asarray(expected)}
        )
        if step in (2, 4, 6):
            mask = oracle_mask(np.abs(expected), 0.75 * (step - 2) / 4)
        expected = np.where(mask, expected + np.asarray(steps["kernel"]), 0)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], mask)
        assert np.all(np.asarray(params["kernel"])[~mask] == 0)


def test_the_last_update_is_at_end_step_even_off_the_beat():
    ramp = jopt.schedules.cubic_sparsity(0.0, 0.75, end_step=5)
    tx = jopt.prune(optax.sgd(0.0), sparsity=ramp, every_steps=4, end_step=5)
    params, _ = contract.train(tx, contract.make_params(), num_steps=6)
    assert int((params["head"]["kernel"] == 0).sum()) == 96


def test_keeps_everything_before_begin_step():
    tx = jopt.prune(optax.sgd(0.0), sparsity=0.5, begin_step=3)
    early, state = contract.train(tx, contract.make_params(), num_steps=3)
    contract.assert_same(early, contract.make_params())
    assert all(bool(m.all()) for m in jax.tree.leaves(jopt.get_masks(state)))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_counts_are_exact_for_every_sparsity(sparsity, traced):
    schedule = (lambda count: sparsity + 0.0 * count) if traced else sparsity
    tx = jopt.prune(optax.sgd(0.0), sparsity=schedule)
    params, _ = contract.train(tx, contract.make_params(), num_steps=1)
    zeros = int((params["dense"]["kernel"] == 0).sum())
    assert zeros == round(sparsity * 128)


def test_global_ranking_is_one_threshold_over_all_leaves():
    tx = jopt.prune(
        optax.sgd(0.0), sparsity=0.6, allocation=jopt.allocation.global_ranking
    )
    start = {
        "a": contract.make_params()["dense"]["kernel"],
        "b": jnp.linspace(-1, 1, 64).reshape(4, 16),
        "c": 3 * contract.make_params()["head"]["kernel"],
        "bias": jnp.ones(3),
    }
    params, _ = contract.train(tx, start, num_steps=1)
    order = ["a", "b", "c"]  # the order of the tree's leaves
    flat = np.concatenate([np.abs(np.asarray(start[k])).ravel() for k in order])
    expected = oracle_mask(flat, 0.6)
    actual = np.concatenate([np.asarray(params[k]).ravel() != 0 for k in order])
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.013, 1.0])
def test_global_ranking_keeps_the_count_at_the_ends(sparsity):
    tx = jopt.prune(
        optax.sgd(0.0), sparsity=sparsity, allocation=jopt.allocation.global_ranking
    )
    params, _ = contract.train(tx, contract.make_params(), num_steps=1)
    zeros = sum(int((params[m]["kernel"] == 0).sum()) for m in ("dense", "head"))
    assert zeros == round(sparsity * 256)


def test_global_ranking_breaks_ties_by_leaf_and_index():
    tx = jopt.prune(
        optax.sgd(0.0), sparsity=0.5, allocation=jopt.allocation.global_ranking
    )
    start = {"a": jnp.ones((4, 4)), "b": jnp.ones((2, 8)), "c": jnp.ones((4, 4))}
    params, _ = contract.train(tx, start, num_steps=1)
    kept = [int(np.count_nonzero(params[k])) for k in "abc"]
    assert kept == [16, 8, 0]
    np.testing.assert_array_equal(params["b"][0], 1)


def test_host_update_equals_the_update_in_the_step():
    options = {"sparsity": 0.7, "every_steps": 2, "end_step": 5}
    for scores, allocation in (
        (jopt.scores.magnitude, jopt.allocation.uniform),
        (jopt.scores.saliency, jopt.allocation.global_ranking),
    ):
        options |= {"scores": scores, "allocation": allocation}
        inside = optax.chain(jopt.prune(optax.sgd(1e-2), **options))
        expected, _ = contract.train(inside, contract.make_params())
        pruned = jopt.prune(optax.sgd(1e-2), **options, update="host")
        tx = optax.chain(pruned)
        params, update = contract.make_params(), jax.jit(tx.update)
        state = tx.init(params)
        for step in range(6):
            grads = contract.make_grads(params, step)
            state = jopt.update_masks(pruned, state, params, grads=grads)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        contract.assert_same(params, expected)


def test_host_update_sees_the_latents_of_quantize_weights():
    spec = jopt.QuantSpec(jopt.formats.int2, scale_dtype=jnp.float32)
    inside = jopt.quantize_weights(jopt.prune(optax.sgd(0.01), sparsity=0.5), spec)
    expected, _ = contract.train(inside, contract.make_params(), num_steps=3)
    pruned = jopt.prune(optax.sgd(0.01), sparsity=0.5, update="host")
    tx = jopt.quantize_weights(pruned, spec)
    params, update = contract.make_params(), jax.jit(tx.update)
    state = tx.init(params)
    for step in range(3):
        state = jopt.update_masks(pruned, state, params)
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    contract.assert_same(params, expected)


def test_host_update_needs_its_own_handle_and_one_state():
    params = contract.make_params()
    tx = optax.chain(jopt.prune(optax.sgd(0.1), sparsity=0.5))
    with pytest.raises(TypeError, match='update="host"'):
        jopt.update_masks(tx, tx.init(params), params)
    pruned = jopt.prune(optax.sgd(0.1), sparsity=0.5, update="host")
    with pytest.raises(ValueError, match="one pruned state, got 0"):
        jopt.update_masks(pruned, optax.sgd(0.1).init(params), params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), pruned.init(params))
    with pytest.raises(ValueError, match="got a stack of them"):
        jopt.update_masks(pruned, stacked, params)


def test_host_update_does_not_ask_the_state_when_told_the_count():
    pruned = jopt.prune(optax.sgd(0.1), sparsity=0.5, every_steps=3, update="host")
    params = contract.make_params()
    state = pruned.init(params)
    assert jopt.update_masks(pruned, state, params, count=1) is state
    due = jopt.update_masks(pruned, state, params, count=3)
    assert int(jopt.get_masks(due)["head"]["kernel"].sum()) == contract.HALF


def test_host_update_without_the_gradients_that_a_score_reads_raises():
    pruned = jopt.prune(
        optax.sgd(0.1), sparsity=0.5, scores=jopt.scores.saliency, update="host"
    )
    params = contract.make_params()
    with pytest.raises(ValueError, match="grads must be given"):
        jopt.update_masks(pruned, pruned.init(params), params)


def test_random_scores_depend_on_key_path_and_count_only():
    def masks_of(key, params):
        tx = jopt.prune(
            optax.sgd(0.0), sparsity=0.5, scores=jopt.scores.random(), key=key
        )
        _, state = contract.train(tx, params, num_steps=1)
        return jopt.get_masks(state)

    params = contract.make_params()
    first = masks_of(jax.random.key(0), params)
    again = masks_of(jax.random.key(0), params)
    contract.assert_same(first, again)
    other = masks_of(jax.random.key(1), params)
    assert not bool((first["dense"]["kernel"] == other["dense"]["kernel"]).all())
    assert not bool((first["dense"]["kernel"] == first["head"]["kernel"]).all())
    wider = masks_of(jax.random.key(0), {**params, "another": jnp.ones((4, 4))})
    contract.assert_same(wider["dense"], first["dense"])
    with pytest.raises(ValueError, match="key must be given"):
        jopt.prune(optax.sgd(0.1), sparsity=0.5, scores=jopt.scores.random())


def test_a_score_with_memory():
    """A running mean of gradients, as an extension would write it."""
    score = jopt.scores.Score(
        init=jnp.zeros_like,
        update=lambda inputs, state: state + inputs.grad,
        scores=lambda inputs, state: jnp.abs(state),
    )
    tx = jopt.prune(optax.sgd(0.0), sparsity=0.5, scores=score, begin_step=2)
    start = contract.make_params()
    params, _ = contract.train(tx, start, num_steps=3)
    total = sum(
        np.asarray(contract.make_grads(start, i)["dense"]["kernel"]) for i in range(3)
    )
    np.testing.assert_array_equal(
        np.asarray(params["dense"]["kernel"]) != 0, oracle_mask(np.abs(total), 0.5)
    )


def test_a_score_sees_mask_count_and_extra_args():
    """Regrowth: on count 1 drop one kept weight, and grow what `extra_args` favours."""

    def scores(inputs, state):
        regrown = jnp.where(inputs.mask, 1.0, inputs.extra_args["favour"]["w"])
        return jnp.where(inputs.count == 0, inputs.param, regrown)

    score = jopt.scores.Score(lambda param: (), lambda inputs, state: state, scores)
    tx = jopt.prune(optax.sgd(0.0), sparsity=0.5, scores=score)
    params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    favour = {"w": jnp.array([[0.0, 0.0, 0.0, 2.0]])}
    state = tx.init(params)
    for expected in ([True, True, False, False], [True, False, False, True]):
        _, state = tx.update(params, state, params, favour=favour)
        np.testing.assert_array_equal(jopt.get_masks(state)["w"][0], expected)


def test_saliency_does_not_underflow_in_float16():
    w = jnp.linspace(0.01, 0.02, 64, dtype=jnp.float16)
    g = jnp.full_like(w, 1e-6)
    scores = np.asarray(jopt.scores.saliency(w, g))
    assert scores.dtype == np.float32 and (np.diff(scores) > 0).all()


@pytest.mark.parametrize("update", ["step", "host"])
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.5, "allocation": jopt.allocation.global_ranking},
        {"sparsity": 0.5, "pattern": jopt.Block((2, 2))},
        {"pattern": jopt.NM(2, 4)},
    ],
)
def test_empty_leaves_are_left_alone(options, update):
    tx = jopt.prune(optax.sgd(0.1), **options, update=update)
    params = {"empty": jnp.zeros((0, 4)), "w": jnp.arange(1.0, 17.0).reshape(4, 4)}
    state = tx.init(params)
    if update == "host":
        state = jopt.update_masks(tx, state, params)
    updates, state = tx.update(params, state, params)
    pruned = optax.apply_updates(params, updates)
    assert int((pruned["w"] == 0).sum()) == 8 and pruned["empty"].shape == (0, 4)


def test_what_does_not_fit_the_state_names_the_leaf():
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.5)
    params = contract.make_params()
    state = tx.init(params)
    grads = contract.make_grads(params)
    grads["head"]["kernel"] = None
    with pytest.raises(ValueError, match="gradient for 'head/kernel'"):
        tx.update(grads, state, params)
    params["head"]["kernel"] = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="'head/kernel'"):
        tx.update(params, state, params)
    quantized = {"q": jopt.quantize(jnp.ones((8, 8)), contract.INT8)}
    for wrap in (tx, jopt.quantize_weights(optax.sgd(0.1), contract.INT8)):
        with pytest.raises(TypeError, match="got a QuantizedArray at 'q'"):
            wrap.init(quantized)
    for inner in (1e-3, optax.adamw):
        with pytest.raises(TypeError, match="inner must be an Optax transformation"):
            jopt.prune(inner, sparsity=0.5)


def test_apply_masks_refuses_what_does_not_fit():
    ones = {"w": jnp.ones((8, 8))}
    mask = jnp.zeros((8, 8), bool).at[0, 0].set(True)
    for form in (mask, jopt.pack_mask(mask)):
        assert float(jopt.apply_masks(ones, {"w": form})["w"].sum()) == 1.0
    for wrong in (mask[0], mask[:, :1], mask.astype(float), jopt.pack_mask(mask)[0]):
        with pytest.raises(ValueError, match="masks must fit 'w'"):
            jopt.apply_masks(ones, {"w": wrong})


def test_nothing_to_prune_warns():
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.5)
    with pytest.warns(UserWarning, match="prune selects none of 1 leaves"):
        tx.init({"bias": jnp.ones(4)})


def test_non_finite_scores_rank_last_and_are_counted():
    kernel = np.array(contract.make_params()["dense"]["kernel"])
    kernel[0, :3] = [np.nan, np.inf, -np.inf]
    tx = jopt.prune(optax.sgd(0.0), sparsity=0.25)
    params = {"kernel": jnp.asarray(kernel)}
    updates, state = jax.jit(tx.update)(
        {"kernel": jnp.zeros_like(kernel)}, tx.init(params), params
    )
    mask = np.asarray(jopt.get_masks(state)["kernel"])
    assert not mask[0, :3].any() and mask.sum() == 96
    assert int(state.num_nonfinite) == 3
    cleaned = jopt.apply_masks(optax.apply_updates(params, updates), {"kernel": mask})
    assert bool(jnp.isfinite(cleaned["kernel"]).all())


def test_masks_take_one_bit_per_weight():
    params = {"w": jnp.ones((64, 48)), "odd": jnp.ones((5, 9))}
    state = jopt.prune(optax.sgd(0.1), sparsity=0.5).init(params)
    assert state.masks["w"].dtype == jnp.uint8
    assert state.masks["w"].nbytes * 8 == 64 * 48
    assert state.masks["odd"].dtype == jnp.bool_ and state.masks["odd"].shape == (5, 9)


def test_masks_of_partitioned_states_are_merged():
    """Two wrappers over disjoint leaves, found in one state."""
    tx = optax.partition(
        {
            "most": jopt.prune(optax.sgd(0.0), sparsity=0.75),
            "some": jopt.prune(optax.adam(0.0), sparsity=0.25),
            "none": optax.sgd(0.0),
        },
        {"dense": {"kernel": "most", "bias": "none"}, "head": {"kernel": "some"}},
    )
    params, state = contract.train(tx, contract.make_params(), num_steps=1)
    masks = jopt.get_masks(state)
    assert int(masks["dense"]["kernel"].sum()) == 32
    assert int(masks["head"]["kernel"].sum()) == 96
    assert isinstance(masks["dense"]["bias"], optax.MaskedNode)
    contract.assert_same(jopt.apply_masks(params, masks), params)


def test_averages_pass_through_apply_masks():
    """Schedule-free evaluation params are dense until masked."""
    inner = optax.contrib.schedule_free_sgd(0.1)
    tx = jopt.prune(inner, sparsity=0.5)
    params, state = contract.train(tx, contract.make_params(), num_steps=4)
    evaluated = optax.contrib.schedule_free_eval_params(state.inner_state, params)
    masked = jopt.apply_masks(evaluated, jopt.get_masks(state))
    assert int((masked["dense"]["kernel"] == 0).sum()) == 64


def test_hyperparameters_can_be_injected():
    factory = optax.inject_hyperparams(
        jopt.prune,
        static_args=(
            "inner", "scores", "pattern", "allocation", "select", "stacked_axes",
            "update", "key", "end_step", "every_steps", "begin_step",
        ),
    )  # fmt: skip
    tx = factory(inner=optax.sgd(0.0), sparsity=0.5)
    params, state = contract.train(tx, contract.make_params(), num_steps=1)
    assert int((params["dense"]["kernel"] == 0).sum()) == 64
    state.hyperparams["sparsity"] = jnp.asarray(0.75)
    params, _ = contract.train(tx, params, num_steps=1, state=state)
    assert int((params["dense"]["kernel"] == 0).sum()) == 96


ERRORS = {
    "no sparsity": (lambda: {}, "sparsity must be given"),
    "per cent": (lambda: {"sparsity": 90}, "fraction in \\[0, 1\\], got 90"),
    "nan": (lambda: {"sparsity": float("nan")}, "fraction"),
    "nm": (
        lambda: {"sparsity": 0.5, "pattern": jopt.NM(2, 4)},
        "sparsity must be None for NM",
    ),
    "nm global": (
        lambda: {
            "pattern": jopt.NM(2, 4),
            "allocation": jopt.allocation.global_ranking,
        },
        "allocation must be uniform",
    ),
    "every": (lambda: {"sparsity": 0.5, "every_steps": 0}, "every_steps must be"),
    "begin": (lambda: {"sparsity": 0.5, "begin_step": -1}, "begin_step must be"),
    "end": (
        lambda: {"sparsity": 0.5, "begin_step": 5, "end_step": 4},
        "end_step must be an integer of at least 5, got 4",
    ),
    "half a step": (lambda: {"sparsity": 0.5, "begin_step": 1.5}, "an integer"),
    "update": (lambda: {"sparsity": 0.5, "update": "later"}, "update must be"),
    "allocation": (
        lambda: {"sparsity": 0.5, "allocation": "uniform"},
        "allocation must be a function",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_raise_at_construction(case):
    options, message = ERRORS[case]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        jopt.prune(optax.sgd(0.1), **options())
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_name_the_leaf():
    with pytest.raises(ValueError, match="dense/kernel"):
        jopt.prune(optax.sgd(0.1), pattern=jopt.NM(2, 3)).init(contract.make_params())
    with pytest.raises(ValueError, match="dense/kernel"):
        jopt.prune(optax.sgd(0.1), sparsity=0.5, pattern=jopt.Block((3, 3))).init(
            contract.make_params()
        )


def test_rules_that_match_nothing_name_what_is_near():
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.5, select=jopt.matching("dense/kernal"))
    with pytest.raises(ValueError, match="dense/kernel"):
        tx.init(contract.make_params())
    assert tx.init({}).masks == {}


def test_a_score_of_the_wrong_shape_raises():
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.5, scores=lambda p, g: p.sum())
    params = contract.make_params()
    with pytest.raises(ValueError, match="one score per weight"):
        tx.update(params, tx.init(params), params)


def test_get_masks_without_pruning_raises():
    with pytest.raises(ValueError, match=r"without jopt\.prune"):
        jopt.get_masks(optax.adam(1e-3).init(contract.make_params()))
