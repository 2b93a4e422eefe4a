"""A sparsity that is known may be an array: of JAX, of NumPy, or injected by Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt

PARAMS = {"w": jnp.arange(1.0, 33.0).reshape(4, 8)}
SGD = optax.sgd(0.0)
FORMS = {
    "jax": jnp.float32(0.75),
    "bfloat16": jnp.bfloat16(0.75),
    "numpy": np.array(0.75),
    "numpy scalar": np.float32(0.75),
    "rules": {"w": jnp.float32(0.75)},
    "pairs": [("w", np.array(0.75))],
}
WRAPPERS = {
    "prune": jopt.prune,
    "ste": jopt.ste,
    "ac_dc": lambda inner, **options: jopt.ac_dc(
        inner, compressed_steps=1, dense_steps=1, end_step=4, **options
    ),
    "top_kast": lambda inner, **options: jopt.top_kast(
        inner, backward_sparsity=jnp.float32(0.5), **options
    ),
    "rigl": jopt.rigl,
}


def num_kept(tx, params=PARAMS):
    _, state = tx.update(params, tx.init(params), params)
    return int(jopt.get_masks(state)["w"].sum())


@pytest.mark.parametrize("form", FORMS)
def test_an_array_is_the_number_that_it_holds(form):
    assert num_kept(jopt.prune(SGD, sparsity=FORMS[form])) == 8


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_takes_an_array(name):
    assert num_kept(WRAPPERS[name](SGD, sparsity=FORMS["jax"])) == 8


def test_an_array_is_divided_among_leaves_that_compete():
    params = {**PARAMS, "v": PARAMS["w"] / 100}
    each = {"w": jnp.float32(0.5), "v": np.float64(0.5)}
    tx = jopt.prune(
        SGD, sparsity=each, allocation=jopt.allocation.global_ranking
    )  # one budget, because the numbers are equal
    assert num_kept(tx, params) == 32


def test_an_array_that_a_compiled_function_closes_over():
    sparsity = jnp.float32(0.75)

    @jax.jit
    def masks(params):
        tx = jopt.prune(SGD, sparsity=sparsity)
        _, state = tx.update(params, tx.init(params), params)
        mask = jopt.make_mask(params["w"], sparsity=sparsity)
        return jopt.get_masks(state)["w"].sum(), mask.sum()

    assert [int(n) for n in masks(PARAMS)] == [8, 8]


def test_injected_hyperparameters_are_known_outside_of_jit():
    factory = optax.inject_hyperparams(
        jopt.prune, static_args=("inner", "scores", "pattern", "allocation")
    )
    assert num_kept(factory(inner=SGD, sparsity=0.75)) == 8


@pytest.mark.parametrize("form", [jnp.float32, np.array, np.float32])
@pytest.mark.parametrize("number", [1.5, -1.0, float("nan")])
def test_an_array_out_of_range_raises(form, number):
    for sparsity in (form(number), {"w": form(number)}):
        with pytest.raises(ValueError, match=r"sparsity must be a fraction in \[0, 1"):
            jopt.prune(SGD, sparsity=sparsity)


@pytest.mark.parametrize(
    "sparsity", ["0.9", True, jnp.bool_(True), np.array("a"), 1j, [0.5]]
)
def test_what_is_no_number_raises(sparsity):
    with pytest.raises(TypeError, match="sparsity must be"):
        jopt.prune(SGD, sparsity=sparsity)


def test_an_array_of_several_numbers_raises():
    with pytest.raises(ValueError, match=r"sparsity must be a scalar, got .*\(3,\)"):
        jopt.prune(SGD, sparsity=jnp.ones(3))


@pytest.mark.parametrize("name", ["rigl", "set_", "snfs", "static_sparse"])
def test_masks_that_keep_their_count_take_no_schedule(name):
    """It would be asked once, at count 0, and stand still."""
    for sparsity in (lambda count: 0.5, {"w": lambda count: count / 9}):
        with pytest.raises(TypeError, match=f"sparsity must be a number for {name}"):
            getattr(jopt, name)(SGD, sparsity=sparsity)
    with pytest.raises(TypeError, match="sparsity must be a number for make_masks"):
        jopt.make_masks(PARAMS, sparsity=lambda count: 0.5)
