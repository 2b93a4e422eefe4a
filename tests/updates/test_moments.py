"""`find_moment`: however the optimizer nests its state, and what it says of holes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jopt
from jopt.updates.moments import Missing, find_moment, read_moment
from tests import contract

RATE = 1e-2


def is_kernel(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def labels(params):
    return jax.tree.map(lambda k: "kernels" if k else "rest", is_kernel(params))


# Optimizers whose first nu is (1 - b2) g^2 with b2 = 0.999, over the given gradients.
NESTED = {
    "adam": optax.adam(RATE),
    "adamw": optax.adamw(RATE),
    "nadam": optax.nadam(RATE),
    "amsgrad": optax.amsgrad(RATE),
    "lamb": optax.lamb(RATE),
    "radam": optax.radam(RATE),
    "ademamix": contrib.ademamix(RATE),
    "bfloat16_mu": optax.adam(RATE, mu_dtype=jnp.bfloat16),
    "chain": optax.chain(optax.trace(0.9, nesterov=False), optax.adam(RATE)),
    "multi_steps": optax.MultiSteps(optax.adam(RATE), 1),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "masked_all": optax.masked(optax.adam(RATE), True),
    "finite": optax.apply_if_finite(optax.adam(RATE), 3),
    "project": jopt.project(optax.adam(RATE), contract.quarter_grid),
    "prune": jopt.prune(optax.adam(RATE), sparsity=0.5),
    "quantize": jopt.quantize_weights(
        jopt.prune(optax.MultiSteps(optax.adam(RATE), 1), sparsity=0.5), contract.INT8
    ),
    "partition": optax.partition(
        {"kernels": optax.adamw(RATE), "rest": optax.adam(RATE)}, labels
    ),
}
THROUGH_MOMENTUM = {"chain"}


@pytest.mark.parametrize("name", NESTED)
def test_finds_nu_at_any_depth(name):
    tx, params = NESTED[name], contract.make_params()
    grads = contract.make_grads(params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    found = find_moment(state, params, "nu")
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for nu, g in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(nu, 0.001 * np.square(g), rtol=2e-4)


def test_finds_other_fields_and_sophias_hessian():
    params = contract.make_params()
    grads = contract.make_grads(params)
    for tx, field, factor, power in (
        (optax.trace(0.9), "trace", 1.0, 1),
        (optax.rmsprop(RATE, decay=0.9), "nu", 0.1, 2),
        (optax.adagrad(RATE, initial_accumulator_value=0.0), "sum_of_squares", 1.0, 2),
    ):
        _, state = tx.update(grads, tx.init(params), params)
        found = find_moment(state, params, field)
        for nu, g in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(nu, factor * np.power(g, power), rtol=2e-4)
    state = contrib.sophia(RATE).init(params)
    contract.assert_same(
        find_moment(state, params, "nu"), jax.tree.map(jnp.zeros_like, params)
    )


@pytest.mark.parametrize("kind", ["partition", "masked", "prefix"])
def test_a_hole_is_named_when_it_is_read(kind):
    tx = {
        "partition": optax.partition(
            {"kernels": optax.adam(RATE), "rest": optax.sgd(RATE)}, labels
        ),
        "masked": optax.masked(optax.adam(RATE), is_kernel),
        "prefix": optax.masked(optax.adam(RATE), {"dense": False, "head": True}),
    }[kind]
    params = contract.make_params()
    found = find_moment(tx.init(params), params, "nu")
    assert found["head"]["kernel"].shape == (8, 16)
    assert isinstance(found["dense"]["bias"], Missing)
    with pytest.raises(ValueError, match=r"'dense/bias', got none; optax.adam keeps"):
        read_moment(found["dense"]["bias"])


def test_a_moment_of_another_shape_is_named_when_it_is_read():
    params = {"kernel": jnp.ones((256, 256))}
    for tx, field in (
        (optax.adafactor(RATE), "v"),
        (optax.novograd(RATE), "nu"),
    ):
        found = find_moment(tx.init(params), params, field)
        with pytest.raises(
            ValueError, match=r"of shape \(256, 256\) for 'kernel', got"
        ):
            read_moment(found["kernel"])


@pytest.mark.parametrize("tx", [optax.sgd(RATE), optax.flatten(optax.adam(RATE))])
def test_no_moment_raises(tx):
    params = contract.make_params()
    with pytest.raises(ValueError, match=r"inner must keep 'nu'.*decay="):
        find_moment(tx.init(params), params, "nu")


def test_two_moments_raise():
    params = contract.make_params()
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_rms())
    with pytest.raises(
        ValueError, match=r"one 'nu' per weight, got 2 for 'dense/bias'"
    ):
        find_moment(tx.init(params), params, "nu")


def test_params_with_the_name_of_the_moment_are_no_moments():
    params = {"nu": {"w": jnp.ones(3)}, "w": jnp.ones(3), "mu": {"nu": jnp.ones(2)}}
    grads = jax.tree.map(lambda x: 2 * x, params)
    tx = optax.adam(RATE)
    _, state = tx.update(grads, tx.init(params), params)
    found = find_moment(state, params, "nu")
    for nu in jax.tree.leaves(found):
        np.testing.assert_allclose(nu, 0.004, rtol=1e-4)
    assert jax.tree.structure(found) == jax.tree.structure(params)


def test_lists_tuples_bare_arrays_and_the_empty_tree():
    for params in ([jnp.ones(2), (jnp.ones(3),)], jnp.ones(4), (jnp.ones(2),), {}):
        state = optax.adam(RATE).init(params)
        found = find_moment(state, params, "nu")
        contract.assert_same(found, jax.tree.map(jnp.zeros_like, params))


def test_reading_widens():
    assert read_moment(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    codes = jopt.quantize(jnp.array([[1.0, -2.0]]), jopt.QuantSpec(jopt.formats.int8))
    np.testing.assert_allclose(read_moment(codes), [[1.0, -2.0]], rtol=1e-2)
