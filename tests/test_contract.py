"""The promises of every transformation: Optax's protocol, tracing, dtypes, states."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import contract

every_wrapper = pytest.mark.parametrize("name", contract.WRAPPERS)


class Loop(NamedTuple):
    """A wrapper, compiled: what scan, cond, vmap and donation must be equal to."""

    name: str
    tx: optax.GradientTransformation
    init: object
    step: object

    def run(self, params, num_steps):
        """Take steps one by one, and return params and state."""
        carry = params, self.init(params)
        for i in range(num_steps):
            carry, _ = self.step(carry, contract.make_grads(params, i))
        return carry


@pytest.fixture(scope="module", params=contract.with_exhaustive(contract.WRAPPERS))
def loop(request):
    tx = contract.WRAPPERS[request.param](optax.sgd(1e-2, momentum=0.9))
    step = jax.jit(contract.make_step(tx))
    return Loop(request.param, tx, jax.jit(tx.init), step)


def num_zeros(leaf):
    return int(np.sum(np.asarray(leaf) == 0))


def tree_shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@every_wrapper
def test_compiles_once_and_keeps_its_promises_under_jit(name):
    tx = contract.WRAPPERS[name](optax.adamw(1e-2))
    params = contract.make_params()
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    before = tree_shapes(tx.init(params))
    params, state = contract.train(tx, params, update=update)
    assert tree_shapes(state) == before
    assert tree_shapes(params) == tree_shapes(contract.make_params())
    if name in contract.ZEROS:
        for module in ("dense", "head"):
            assert num_zeros(params[module]["kernel"]) == contract.ZEROS[name]
    assert num_zeros(params["dense"]["bias"]) == 0
    for leaf in jax.tree.leaves(params):
        assert np.isfinite(leaf).all()


def test_scan_equals_a_python_loop(loop):
    params = contract.make_params()
    scan = jax.jit(functools.partial(jax.lax.scan, contract.make_step(loop.tx)))
    carry = params, loop.init(params)
    (scanned, _), _ = scan(carry, contract.stack_grads(params, 4))
    looped, _ = loop.run(params, 4)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_one_state_type_under_cond(loop):
    params = contract.make_params()
    grads, state = contract.make_grads(params), loop.init(params)

    @jax.jit
    def maybe(flag):
        return jax.lax.cond(
            flag,
            lambda: loop.tx.update(grads, state, params),
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
        )

    contract.assert_same(maybe(False)[1], state)
    assert int(optax.tree.get(maybe(True)[1], "count", filtering=outermost)) == 1


def outermost(path, value):
    del value
    return len(path) == 1


def test_donated_params_and_state(loop):
    donated = jax.jit(contract.make_step(loop.tx), donate_argnums=0)
    params = contract.make_params()
    grads = [contract.make_grads(params, i) for i in range(2)]
    # As users call it: what init does not copy would be donated twice.
    carry = params, loop.tx.init(params)
    for i in range(2):
        carry, _ = donated(carry, grads[i])
    plain, _ = loop.run(contract.make_params(), 2)
    contract.assert_same(carry[0], plain)


def test_vmapped_ensemble(loop):
    if loop.name == "prune_host":
        pytest.skip("a host call is outside of vmap")
    first = jax.tree.map(np.asarray, contract.make_params())
    members = [first, jax.tree.map(lambda x: -2 * x, first)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *members)
    grads = contract.stack_grads(members[0], 2)

    @jax.jit
    @jax.vmap
    def two_steps(params):
        carry = params, loop.tx.init(params)
        return jax.lax.scan(contract.make_step(loop.tx), carry, grads)[0][0]

    together = jax.tree.map(np.asarray, two_steps(stacked))
    for i, member in enumerate(members):
        alone, _ = loop.run(member, 2)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=() if name in defaults else pytest.mark.exhaustive,
        )
        for dtype, names, defaults in (
            (jnp.bfloat16, contract.WRAPPERS, contract.REPRESENTATIVES),
            (
                jnp.float16,
                contract.REPRESENTATIVES,
                ["prune_global", "quantize_learned"],
            ),
        )
        for name in names
    ],
)
def test_keeps_dtypes_of_half_precision_params(name, dtype):
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params, state = contract.train(tx, contract.make_params(dtype), num_steps=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    updates, _ = jax.eval_shape(tx.update, contract.make_grads(params), state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    if name in contract.ZEROS and name != "prune_ramp":
        for module in ("dense", "head"):
            assert num_zeros(params[module]["kernel"]) == contract.ZEROS[name]


@pytest.mark.parametrize(
    "name", contract.with_exhaustive([*contract.ZEROS, "quantize_prune"])
)
def test_gradients_of_low_precision_leave_exact_zeros(name):
    """The steps of sgd are bfloat16 here; so must not be the -w that prunes."""
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params, low = contract.make_params(), contract.make_params(jnp.bfloat16)
    carry, step = (params, tx.init(params)), jax.jit(contract.make_step(tx))
    for i in range(6):
        carry, _ = step(carry, contract.make_grads(low, i))
    zeros = num_zeros(carry[0]["dense"]["kernel"])
    if name == "quantize_prune":
        assert zeros >= contract.HALF
    else:
        assert zeros == contract.ZEROS[name]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("prune_ramp", jnp.float32),
        ("prune_global", jnp.float64),
        ("quantize_prune", jnp.float32),
        ("quantize_prune", jnp.float64),
        pytest.param("prune_ramp", jnp.float64, marks=pytest.mark.exhaustive),
        pytest.param("prune_global", jnp.float32, marks=pytest.mark.exhaustive),
    ],
)
def test_works_with_x64_enabled(name, dtype):
    with jax.enable_x64(True):
        tx = contract.WRAPPERS[name](optax.adam(1e-2))
        params, _ = contract.train(tx, contract.make_params(dtype))
        kernel = params["dense"]["kernel"]
        assert kernel.dtype == dtype
        assert num_zeros(kernel) >= contract.ZEROS.get(name, 1)


COMBINATORS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    # Wide: steps of one size would bring some weights back to exactly zero.
    "named_chain": lambda tx: optax.named_chain(
        ("clip", optax.clip(9.0)), ("jopt", tx)
    ),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda x: True, p)),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(1e-2)},
        lambda p: (
            {"dense": "a", "head": {"kernel": "b"}} if isinstance(p, dict) else "a"
        ),
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
}


@pytest.mark.parametrize(
    ("name", "combinator"),
    # Every combinator with masks, cheaply made, and with a state of learned scales;
    # every mechanism with updates that are put off.
    [(name, c) for name in ("prune_nm", "quantize_learned") for c in COMBINATORS]
    + [
        pytest.param(
            name, c, marks=() if c == "multi_steps" else pytest.mark.exhaustive
        )
        for name in contract.REPRESENTATIVES
        for c in COMBINATORS
        if name != "quantize_learned"
    ],
)
def test_composes_with_combinators(name, combinator):
    tx = COMBINATORS[combinator](contract.WRAPPERS[name](optax.sgd(1e-2)))
    params, state = contract.train(tx, contract.make_params(), num_steps=12)
    if name in contract.ZEROS:
        assert num_zeros(params["dense"]["kernel"]) == contract.ZEROS[name]
        masks = jopt.get_masks(state)
        np.testing.assert_array_equal(
            masks["dense"]["kernel"], np.asarray(params["dense"]["kernel"]) != 0
        )
        assert isinstance(masks["dense"]["bias"], optax.MaskedNode)


INNER = {
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-3), 2),
    "schedule_free": optax.contrib.schedule_free_sgd(1e-2),
    "muon": optax.contrib.muon(1e-3),
    "lookahead_free_adamw": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3)
    ),
}


@pytest.mark.parametrize("optimizer", INNER)
@pytest.mark.parametrize(
    "name",
    # All of Optax is inside `prune` in test_contract_optimizers.
    [
        "quantize",
        pytest.param("prune", marks=pytest.mark.exhaustive),
        pytest.param("quantize_prune", marks=pytest.mark.exhaustive),
    ],
)
def test_wraps_any_optimizer(name, optimizer):
    tx = contract.WRAPPERS[name](INNER[optimizer])
    params, _ = contract.train(tx, contract.make_params(), num_steps=3)
    kernel = params["dense"]["kernel"]
    if name == "prune":
        assert num_zeros(kernel) == contract.HALF
    else:
        again = jopt.dequantize(jopt.quantize(kernel, contract.INT8))
        np.testing.assert_array_equal(kernel, again)


@every_wrapper
def test_forwards_extra_args(name):
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    tx = contract.WRAPPERS[name](inner)
    params = contract.make_params()
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(functools.partial(tx.update, value=3.0), params, state, params)
    assert seen == [3.0]


@every_wrapper
def test_needs_params(name):
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params = contract.make_params()
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match=r"needs params"):
        tx.update(contract.make_grads(params), state)


@every_wrapper
def test_tree_map_params(name):
    tx = contract.WRAPPERS[name](optax.adam(1e-2))
    state = jax.eval_shape(tx.init, contract.make_params())
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert jax.tree.leaves(same) == jax.tree.leaves(state)
    mapped = optax.tree.map_params(tx, lambda x: "param", state)
    inner = dict(optax.tree.get_all_with_path(mapped, "mu"))
    assert any(mu["dense"]["kernel"] == "param" for mu in inner.values())
    if name != "quantize_learned":
        assert len(inner) == 1


@every_wrapper
def test_empty_tree(name):
    tx = contract.WRAPPERS[name](optax.adam(1e-2))
    state = jax.eval_shape(tx.init, {})
    updates, after = jax.eval_shape(tx.update, {}, state, {})
    assert updates == {} and tree_shapes(after) == tree_shapes(state)
