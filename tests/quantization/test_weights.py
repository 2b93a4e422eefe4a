"""`quantize_weights`: grids, scales, bits, begin, LSQ gradients, deployment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import contract

GRIDS = {
    "int8": jopt.QuantSpec(jopt.formats.int8),
    "int4_groups": jopt.QuantSpec(jopt.formats.int4, group_size=4),
    "int3_tensor": jopt.QuantSpec(jopt.formats.int3, axis=()),
    "uint8": jopt.QuantSpec(jopt.formats.uint8, symmetric=False),
    "ternary": jopt.QuantSpec(jopt.formats.ternary),
    "binary": jopt.QuantSpec(jopt.formats.binary),
    "fp8": jopt.QuantSpec(jopt.formats.fp8_e4m3),
    "fp4": jopt.QuantSpec(jopt.formats.fp4_e2m1),
}


def kernels(params):
    return [params["dense"]["kernel"], params["head"]["kernel"]]


@pytest.mark.parametrize("name", GRIDS)
def test_params_are_the_weights_that_ship(name):
    """Bit for bit: params == dequantize(quantize(params)) with the scales in use."""
    tx = jopt.quantize_weights(optax.adam(1e-2), GRIDS[name])
    params, state = contract.train(tx, contract.make_params(), num_steps=4)
    packed = jopt.quantize(params, GRIDS[name], scales=jopt.get_scales(state))
    contract.assert_same(jopt.dequantize(packed), params)
    assert isinstance(packed["dense"]["kernel"], jopt.QuantizedArray)
    assert packed["dense"]["bias"] is params["dense"]["bias"]


@pytest.mark.parametrize("name", ["int8", "int4_groups", "int3_tensor", "fp8"])
def test_current_scales_need_not_be_kept(name):
    tx = jopt.quantize_weights(optax.adam(1e-2), GRIDS[name])
    params, _ = contract.train(tx, contract.make_params(), num_steps=4)
    again = jopt.dequantize(jopt.quantize(params, GRIDS[name]))
    contract.assert_same(again, params)


@pytest.mark.parametrize("mode", ["static", "moving", "learned"])
def test_trained_scales_ship(mode):
    tx = jopt.quantize_weights(optax.adam(3e-2), GRIDS["int8"], scales=mode)
    params, state = contract.train(tx, contract.make_params(), num_steps=5)
    packed = jopt.quantize(params, GRIDS["int8"], scales=jopt.get_scales(state))
    contract.assert_same(jopt.dequantize(packed), params)


def test_latents_follow_the_inner_optimizer():
    """Current scales never clip, so the latent takes the plain steps."""
    tx = jopt.quantize_weights(optax.sgd(0.1, momentum=0.9), GRIDS["int8"])
    _, state = contract.train(tx, contract.make_params(), num_steps=4)
    plain, _ = contract.train(
        optax.sgd(0.1, momentum=0.9), contract.make_params(), num_steps=4
    )
    np.testing.assert_allclose(
        state.latent["dense"]["kernel"], plain["dense"]["kernel"], rtol=1e-6
    )


def test_rules_choose_formats_by_path():
    rules = {"head/.*": None, ".*/kernel": jopt.QuantSpec(jopt.formats.int2)}
    tx = jopt.quantize_weights(optax.sgd(0.1), rules)
    params, state = contract.train(tx, contract.make_params(), num_steps=2)
    levels = np.unique(params["dense"]["kernel"][:, 0])
    assert len(levels) <= 3
    assert len(np.unique(params["head"]["kernel"][:, 0])) == 8
    assert isinstance(state.latent["head"]["kernel"], optax.MaskedNode)
    assert isinstance(jopt.get_scales(state)["head"]["kernel"], optax.MaskedNode)


def test_static_scales_do_not_move_and_clip_gradients():
    tx = jopt.quantize_weights(optax.sgd(1.0), GRIDS["int8"], scales="static")
    params = {"w": jnp.array([[1.0, 1.0], [-1.0, 0.5]])}
    state = tx.init(params)
    first = jopt.get_scales(state)["w"].scale
    for _ in range(3):  # push the first weight of column 0 far out of the range
        updates, state = tx.update({"w": jnp.array([[-1.0, 0.0]] * 2)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(jopt.get_scales(state)["w"].scale, first)
    assert float(state.latent["w"][0, 0]) == 2.0  # one step out, then no gradient
    np.testing.assert_allclose(params["w"][0, 0], 1.0, rtol=1e-2)


def test_moving_scales_are_the_average_of_ranges():
    tx = jopt.quantize_weights(
        optax.sgd(0.1), GRIDS["int8"], scales="moving", decay=0.75
    )
    params = {"w": jnp.array([[1.0], [-2.0]])}
    state = tx.init(params)
    expected = 2.0
    for _ in range(3):
        updates, state = tx.update({"w": jnp.array([[0.0], [5.0]])}, state, params)
        params = optax.apply_updates(params, updates)
        expected = 0.75 * expected + 0.25 * float(-state.latent["w"][1, 0])
    np.testing.assert_allclose(
        state.projection_state.low["w"][0, 0], -expected, rtol=1e-6
    )


def test_learned_scales_follow_equation_3():
    """In NumPy, with its scaling of section 2.2; by calls of users, clipped weights."""
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=(64, 3)).astype(np.float32) for _ in range(2))
    spec = jopt.QuantSpec(jopt.formats.int3, scale_dtype=jnp.float32)
    sgd = optax.sgd(1.0)
    tx = jopt.quantize_weights(sgd, spec, scales="learned", scale_optimizer=sgd)
    params = {"w": jnp.asarray(w)}
    state = tx.init(params)
    log_scale = state.projection_state.log_scale["w"] - 0.7
    memory = state.projection_state._replace(log_scale={"w": log_scale})
    state = state._replace(projection_state=memory)
    updates, state = tx.update({"w": jnp.zeros_like(w)}, state, params)
    params = optax.apply_updates(params, updates)
    _, new = tx.update({"w": jnp.asarray(g)}, state, params)

    s = np.exp(np.asarray(log_scale, np.float64))
    ratio = w / s
    is_inside = np.abs(ratio) <= 3
    assert np.any(~is_inside & (np.abs(ratio) < 3.5))  # round to the end all the same
    ds = np.where(is_inside, np.rint(ratio) - ratio, np.sign(ratio) * 3)
    step = (g * ds).sum(0, keepdims=True) * s / np.sqrt(64 * 3)
    moved = new.projection_state.log_scale["w"] - log_scale
    np.testing.assert_allclose(moved, -step, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new.latent["w"], w - g * is_inside, atol=1e-6)


def test_learned_scales_reduce_the_error_that_they_are_trained_on():
    """One heavy outlier makes the largest magnitude a bad scale for three bits."""
    rng = np.random.default_rng(1)
    target = rng.normal(size=(256, 1)).astype(np.float32)
    target[0] = 12.0
    spec = jopt.QuantSpec(jopt.formats.int3)
    errors = {}
    for mode in ("current", "learned"):
        tx = jopt.quantize_weights(
            optax.sgd(0.05), spec, scales=mode, scale_optimizer=optax.adam(0.05)
        )
        params = {"w": jnp.asarray(target)}
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(150):
            grads = {"w": 2 * (params["w"] - target)}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        errors[mode] = float(jnp.mean((params["w"] - target) ** 2))
    assert errors["learned"] < 0.7 * errors["current"]


def test_bits_schedule_narrows_the_grid():
    schedule = jopt.schedules.stepwise_bits({0: 8, 2: 3})
    tx = jopt.quantize_weights(optax.sgd(0.0), GRIDS["int8"], bits_schedule=schedule)
    params = contract.make_params()
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(4):
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
        levels = max(len(np.unique(np.abs(c))) for c in params["dense"]["kernel"].T)
        assert levels <= 4 if step >= 2 else levels > 4
    narrow = jopt.QuantSpec(jopt.formats.int3)
    packed = jopt.quantize(params, narrow, scales=jopt.get_scales(state))
    contract.assert_same(jopt.dequantize(packed), params)


def test_pruned_zeros_survive_and_both_hold_together():
    tx = contract.WRAPPERS["quantize_prune"](optax.adam(1e-2))
    params, state = contract.train(tx, contract.make_params(), num_steps=4)
    masks = jopt.get_masks(state)
    for kernel, mask in zip(kernels(params), jax.tree.leaves(masks), strict=True):
        assert int(mask.sum()) == 64
        assert bool((kernel[~mask] == 0).all())
        again = jopt.dequantize(jopt.quantize(kernel, contract.INT8))
        np.testing.assert_array_equal(kernel, again)


ERRORS = {
    "mode": (lambda: {"scales": "best"}, "scales must be one of"),
    "begin": (lambda: {"begin_step": -1}, "begin_step must be"),
    "decay": (lambda: {"decay": 1.0}, "decay must be in"),
    "learned bits": (
        lambda: {
            "scales": "learned",
            "bits_schedule": jopt.schedules.gradual_bits(8, 4, end_step=3),
        },
        "bits_schedule must be None",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_raise_at_construction(case):
    options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        jopt.quantize_weights(optax.sgd(0.1), GRIDS["int8"], **options())


LEAF_ERRORS = {
    "group": (jopt.QuantSpec(jopt.formats.int4, group_size=3), {}, "dense/kernel"),
    "learned asymmetric": (GRIDS["uint8"], {"scales": "learned"}, "dense/kernel"),
    "learned mx": (
        jopt.QuantSpec(jopt.formats.nvfp4),
        {"scales": "learned"},
        "dense/kernel",
    ),
    "bits of a float": (
        GRIDS["fp8"],
        {"bits_schedule": jopt.schedules.gradual_bits(8, 4, end_step=3)},
        "dense/kernel",
    ),
    "rule": ({"dense/kernal": GRIDS["int8"]}, {}, "near names"),
    "name": ("int8", {}, "spec_or_rules must be a jopt.QuantSpec"),
    "format": (jopt.formats.int8, {}, "spec_or_rules must be a jopt.QuantSpec"),
}


@pytest.mark.parametrize("case", LEAF_ERRORS)
def test_what_does_not_fit_a_leaf_names_it(case):
    spec, options, message = LEAF_ERRORS[case]
    tx = jopt.quantize_weights(optax.sgd(0.1), spec, **options)
    params = contract.make_params()
    params = jax.tree.map(
        lambda x: jnp.concatenate([x, x]) if x.ndim > 1 else x, params
    )
    with pytest.raises((ValueError, TypeError), match=message):
        tx.init(params)


def test_get_scales_without_quantization_raises():
    with pytest.raises(ValueError, match=r"without jopt\.quantize_weights"):
        jopt.get_scales(optax.adam(1e-3).init(contract.make_params()))


def test_quantize_a_bare_array_or_a_tree():
    w = contract.make_params()["dense"]["kernel"]
    spec = GRIDS["int4_groups"]
    bare, tree = jopt.quantize(w, spec), jopt.quantize({"w": w, "b": w[0]}, spec)
    contract.assert_same(tree["w"], bare)
    np.testing.assert_array_equal(tree["b"], w[0])
    vector = jopt.quantize(w[0], jopt.QuantSpec(jopt.formats.int8))
    assert isinstance(vector, jopt.QuantizedArray)
    with pytest.raises(TypeError, match="bare array"):
        jopt.quantize(w, {".*": spec})


@pytest.mark.parametrize("mode", ["static", "moving", "learned"])
def test_zeros_have_no_range_to_measure(mode):
    params = contract.make_params()
    params["head"]["kernel"] *= 0
    tx = jopt.quantize_weights(optax.sgd(0.1), GRIDS["int8"], scales=mode)
    for init in (lambda: tx.init(params), jax.jit(lambda: tx.init(params))):
        with pytest.raises(ValueError, match="head/kernel"):
            init()
    later = jopt.quantize_weights(
        optax.sgd(0.1), GRIDS["int8"], scales=mode, begin_step=1
    )
    later.init(params)


def test_learned_scales_start_their_optimizer_when_they_start():
    """Adam's first steps are as large as they would have been at count 0."""
    moved = []
    for begin in (0, 20):
        tx = jopt.quantize_weights(
            optax.sgd(0.0), GRIDS["int8"], scales="learned", begin_step=begin
        )
        params = contract.make_params()
        params, state = contract.train(tx, params, begin + 1)
        first = state.projection_state.log_scale["dense"]["kernel"]
        update = jax.jit(tx.update)
        for step in range(5):
            grads = contract.make_grads(params, step)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        last = state.projection_state.log_scale["dense"]["kernel"]
        moved.append(np.asarray(last - first))
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-5, atol=1e-7)


def test_hyperparameters_can_be_injected():
    tx = optax.inject_hyperparams(
        jopt.quantize_weights, static_args=("inner", "spec_or_rules", "scales")
    )(optax.sgd(0.1), GRIDS["int8"], scales="moving", begin_step=2, decay=0.9)
    params, state = contract.train(tx, contract.make_params(), num_steps=4)
    assert state.hyperparams["decay"] == np.float32(0.9)
    # As the plain transformation, to the rounding of a float32 decay.
    plain = jopt.quantize_weights(
        optax.sgd(0.1), GRIDS["int8"], scales="moving", begin_step=2, decay=0.9
    )
    expected, _ = contract.train(plain, contract.make_params(), num_steps=4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), params, expected
    )


def test_scales_of_another_spec_or_shape_are_refused():
    tree = {"w": jax.random.normal(jax.random.key(0), (32, 8))}
    groups = jopt.QuantSpec(jopt.formats.int4, group_size=16)
    tx = jopt.quantize_weights(optax.sgd(0.1), groups, scales="static")
    scales = jopt.get_scales(tx.init(tree))
    jopt.quantize(tree, groups, scales=scales)
    wider = {"w": jnp.ones((64, 8))}
    for params, spec in ((wider, groups), (tree, jopt.QuantSpec(jopt.formats.int4))):
        with pytest.raises(ValueError, match=r"scale must have the shape .* 'w'"):
            jopt.quantize(params, spec, scales=scales)


def test_nothing_to_quantize_warns():
    tx = jopt.quantize_weights(optax.sgd(0.1), GRIDS["int8"])
    with pytest.warns(UserWarning, match="quantize_weights selects none of 1 leaves"):
        tx.init({"bias": jnp.ones(4)})


@pytest.mark.parametrize("mode", ["static", "moving", "learned"])
def test_known_params_may_be_measured_inside_a_program(mode):
    params, begin = {"w": jnp.array([[1.0, 3.0], [-2.0, 0.5]])}, jnp.int32(0)

    def scales():
        tx = jopt.quantize_weights(
            optax.sgd(0.1), GRIDS["int8"], scales=mode, begin_step=begin
        )
        return jopt.get_scales(tx.init(params))["w"].scale

    np.testing.assert_array_equal(jax.jit(scales)(), scales())
