"""The promises of every transformation: Optax's protocol, tracing, dtypes, states."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import contract

every_wrapper = pytest.mark.parametrize("name", contract.WRAPPERS)
each_mechanism = pytest.mark.parametrize(
    "name", contract.with_exhaustive(contract.WRAPPERS)
)
representatives = pytest.mark.parametrize("name", contract.REPRESENTATIVES)


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
            zeros = int((params[module]["kernel"] == 0).sum())
            assert zeros == contract.ZEROS[name]
    assert int(np.count_nonzero(params["dense"]["bias"])) == 16
    for leaf in jax.tree.leaves(params):
        assert bool(jnp.isfinite(leaf).all())


@each_mechanism
def test_scan_equals_a_python_loop(name):
    tx = contract.WRAPPERS[name](optax.sgd(1e-2, momentum=0.9))
    params = contract.make_params()
    grads = jax.tree.map(
        lambda *g: jnp.stack(g), *[contract.make_grads(params, i) for i in range(4)]
    )

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.jit(lambda c, g: jax.lax.scan(step, c, g))(
        (params, tx.init(params)), grads
    )
    looped, _ = contract.train(tx, params, num_steps=4)
    for a, b in zip(jax.tree.leaves(scanned[0]), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@each_mechanism
def test_one_state_type_under_cond(name):
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params = contract.make_params()
    state = tx.init(params)

    @jax.jit
    def maybe(flag):
        return jax.lax.cond(
            flag,
            lambda: tx.update(contract.make_grads(params), state, params),
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
        )

    contract.assert_same(maybe(False)[1], state)
    assert int(optax.tree.get(maybe(True)[1], "count", filtering=outermost)) == 1


def outermost(path, value):
    del value
    return len(path) == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.bfloat16) for name in contract.WRAPPERS]
    + [(name, jnp.float16) for name in contract.REPRESENTATIVES],
)
def test_keeps_dtypes_of_half_precision_params(name, dtype):
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params, state = contract.train(tx, contract.make_params(dtype), num_steps=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    updates, _ = jax.eval_shape(tx.update, contract.make_grads(params), state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    if name in contract.ZEROS and name != "prune_ramp":
        for module in ("dense", "head"):
            zeros = int((params[module]["kernel"] == 0).sum())
            assert zeros == contract.ZEROS[name]


@pytest.mark.parametrize("name", [*contract.ZEROS, "quantize_prune"])
def test_gradients_of_low_precision_leave_exact_zeros(name):
    """The steps of sgd are bfloat16 here; so must not be the -w that prunes."""
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params, state, update = contract.make_params(), None, jax.jit(tx.update)
    state = tx.init(params)
    for step in range(6):
        grads = contract.make_grads(params, step)
        grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grads)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    zeros = int((params["dense"]["kernel"] == 0).sum())
    if name == "quantize_prune":
        assert zeros >= contract.HALF
    else:
        assert zeros == contract.ZEROS[name]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["prune_ramp", "prune_global", "quantize_prune"])
def test_works_with_x64_enabled(name, dtype):
    with jax.enable_x64(True):
        tx = contract.WRAPPERS[name](optax.adam(1e-2))
        params, _ = contract.train(tx, contract.make_params(dtype))
        kernel = params["dense"]["kernel"]
        assert kernel.dtype == dtype
        zeros = int((kernel == 0).sum())
        assert zeros >= contract.ZEROS.get(name, 1)


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


@representatives
@pytest.mark.parametrize("combinator", COMBINATORS)
def test_composes_with_combinators(name, combinator):
    tx = COMBINATORS[combinator](contract.WRAPPERS[name](optax.sgd(1e-2)))
    params, state = contract.train(tx, contract.make_params(), num_steps=12)
    if name in contract.ZEROS:
        assert int((params["dense"]["kernel"] == 0).sum()) == contract.ZEROS[name]
        masks = jopt.get_masks(state)
        np.testing.assert_array_equal(
            masks["dense"]["kernel"], params["dense"]["kernel"] != 0
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
@pytest.mark.parametrize("name", ["prune", "quantize", "quantize_prune"])
def test_wraps_any_optimizer(name, optimizer):
    tx = contract.WRAPPERS[name](INNER[optimizer])
    params, _ = contract.train(tx, contract.make_params(), num_steps=3)
    kernel = params["dense"]["kernel"]
    if name == "prune":
        assert int((kernel == 0).sum()) == contract.HALF
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
    tx.update(contract.make_grads(params), tx.init(params), params, value=3.0)
    assert seen == [3.0]


@every_wrapper
def test_needs_params(name):
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    params = contract.make_params()
    with pytest.raises(ValueError, match=r"needs params"):
        tx.update(contract.make_grads(params), tx.init(params))


@every_wrapper
def test_tree_map_params(name):
    tx = contract.WRAPPERS[name](optax.adam(1e-2))
    state = tx.init(contract.make_params())
    same = optax.tree.map_params(tx, lambda x: x, state)
    contract.assert_same(same, state)
    mapped = optax.tree.map_params(tx, lambda x: "param", state)
    inner = dict(optax.tree.get_all_with_path(mapped, "mu"))
    assert any(mu["dense"]["kernel"] == "param" for mu in inner.values())
    if name != "quantize_learned":
        assert len(inner) == 1


@every_wrapper
def test_empty_tree(name):
    tx = contract.WRAPPERS[name](optax.adam(1e-2))
    state = tx.init({})
    updates, _ = jax.jit(tx.update)({}, state, {})
    assert updates == {}


@each_mechanism
def test_donated_params_and_state(name):
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))

    def step(params, state):
        updates, state = tx.update(contract.make_grads(params), state, params)
        return optax.apply_updates(params, updates), state

    donated = jax.jit(step, donate_argnums=(0, 1))
    params = contract.make_params()
    state = tx.init(params)
    for _ in range(2):
        params, state = donated(params, state)
    plain = contract.make_params()
    plain_state = tx.init(plain)
    for _ in range(2):
        plain, plain_state = jax.jit(step)(plain, plain_state)
    contract.assert_same(params, plain)


@each_mechanism
def test_vmapped_ensemble(name):
    if name == "prune_host":
        pytest.skip("a host call is outside of vmap")
    tx = contract.WRAPPERS[name](optax.sgd(1e-2))
    members = [
        contract.make_params(),
        jax.tree.map(lambda x: -2 * x, contract.make_params()),
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)

    def two_steps(params):
        state = tx.init(params)
        for step in range(2):
            updates, state = tx.update(contract.make_grads(params, step), state, params)
            params = optax.apply_updates(params, updates)
        return params

    together = jax.jit(jax.vmap(two_steps))(stacked)
    alone = [jax.jit(two_steps)(member) for member in members]
    for i, member in enumerate(alone):
        for a, b in zip(
            jax.tree.leaves(together), jax.tree.leaves(member), strict=True
        ):
            np.testing.assert_allclose(a[i], b, rtol=2e-6, atol=1e-6)
