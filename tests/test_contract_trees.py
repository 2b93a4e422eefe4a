"""The promises on every kind of tree: containers, frameworks, stacked layers."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jopt
from tests import contract

KERNEL = contract.make_params()["dense"]["kernel"]
BIAS = contract.make_params()["dense"]["bias"]


def linen():
    shapes = jax.eval_shape(nn.Dense(16).init, jax.random.key(0), np.ones((1, 8)))
    return contract.make_grads(shapes["params"])


def nnx_state():
    model = nnx.eval_shape(lambda: nnx.Linear(8, 16, rngs=nnx.Rngs(0)))
    return contract.make_grads(nnx.state(model, nnx.Param))


def equinox_module():
    model = eqx.filter_eval_shape(eqx.nn.Linear, 8, 16, key=jax.random.key(0))
    return contract.make_grads(model)


TREES = {
    "list": lambda: [KERNEL, BIAS],
    "tuple": lambda: (KERNEL, {"deep": [BIAS]}),
    "linen": linen,
    "nnx": nnx_state,
    "equinox": equinox_module,
    "array": lambda: KERNEL,
    "none_leaf": lambda: {"kernel": KERNEL, "absent": None},
    "integer_leaf": lambda: {
        "kernel": KERNEL,
        "table": jnp.asarray(np.arange(32).reshape(4, 8)),
    },
}


def kernels(tree):
    return [
        x
        for x in jax.tree.leaves(tree)
        if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating)
    ]


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("name", contract.REPRESENTATIVES)
def test_every_kind_of_tree_keeps_its_structure(name, kind):
    """Traced alone: of what kind a tree is does not reach the program."""
    params = TREES[kind]()
    tx = contract.WRAPPERS[name](optax.sgd(1e-2, momentum=0.9))

    def two_steps(params):
        carry, step = (params, tx.init(params)), contract.make_step(tx)
        for i in range(2):
            carry, _ = step(carry, contract.make_grads(params, i))
        return carry[0]

    new = jax.eval_shape(two_steps, params)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape


@pytest.mark.parametrize(
    ("name", "kind"),
    [("prune_nm", kind) for kind in TREES]
    + [
        pytest.param(
            name,
            kind,
            marks=()
            if kind == "nnx" and name in contract.REPRESENTATIVES
            else pytest.mark.exhaustive,
        )
        for name in contract.WRAPPERS
        for kind in (TREES if name in contract.REPRESENTATIVES else ["nnx"])
        if name != "prune_nm"
    ],
)
def test_on_every_kind_of_tree(name, kind):
    params = TREES[kind]()
    tx = contract.WRAPPERS[name](optax.sgd(1e-2, momentum=0.9))
    carry, step = (params, tx.init(params)), jax.jit(contract.make_step(tx))
    for i in range(2):
        carry, _ = step(carry, contract.make_grads(params, i))
    new, state = carry
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    if name in contract.ZEROS and name not in ("prune_ramp", "prune_host"):
        (kernel,) = kernels(new)
        assert int((kernel == 0).sum()) == contract.HALF
        (mask,) = jax.tree.leaves(jopt.get_masks(state))
        np.testing.assert_array_equal(mask, kernel != 0)
        masked = jopt.apply_masks(new, jopt.get_masks(state))
        contract.assert_same(masked, new)


def test_nnx_optimizer():
    """Masks are found in the state that `nnx.Optimizer` keeps."""
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.clip(1.0), jopt.prune(optax.adamw(1e-2), sparsity=0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: (m(jnp.ones((1, 8))) ** 2).sum())(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    kernel = model.kernel[...]
    assert int((kernel == 0).sum()) == 64
    masks = jopt.get_masks(optimizer.opt_state)
    (mask,) = jax.tree.leaves(masks)
    np.testing.assert_array_equal(mask, kernel != 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers_are_ranked_each_by_itself(axis):
    """Layers of very different size, as one leaf, as JaxPruner ranked away."""
    layers = jnp.stack([KERNEL, 10 * KERNEL, 100 * KERNEL], axis=axis)
    tx = jopt.prune(optax.sgd(0.0), sparsity=0.75, stacked_axes={"layers": axis})
    params = {"layers": layers, "head": KERNEL}
    _, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    masks = jopt.get_masks(state)
    alone = jopt.make_mask(jnp.abs(KERNEL), sparsity=0.75)
    for i in range(3):
        np.testing.assert_array_equal(jnp.take(masks["layers"], i, axis=axis), alone)
    np.testing.assert_array_equal(masks["head"], alone)


def test_stacked_layers_keep_scales_of_their_own():
    layers = jnp.stack([KERNEL, 100 * KERNEL])
    for spec in (
        contract.INT8,
        contract.INT4,
        jopt.QuantSpec(jopt.formats.int8, axis=()),
    ):
        tx = jopt.quantize_weights(optax.sgd(0.0), spec, stacked_axes={"layers": 0})
        params = {"layers": layers}
        updates, state = tx.update({"layers": 0 * layers}, tx.init(params), params)
        together = optax.apply_updates(params, updates)["layers"]
        for i in range(2):
            np.testing.assert_allclose(
                together[i],
                jopt.dequantize(jopt.quantize(layers[i], spec)),
                rtol=1e-6,
            )
        scale = jopt.get_scales(state)["layers"].scale
        assert scale.shape[0] == 2 and scale.ndim == 3


def test_a_stacked_vector_is_not_a_kernel():
    """[layers, features] of a scanned norm has one axis of its own."""
    params = {"layers": {"scale": jnp.ones((4, 16)), "kernel": jnp.ones((4, 8, 16))}}
    tx = jopt.prune(optax.sgd(0.1), sparsity=0.5, stacked_axes={"layers/.*": 0})
    masks = jopt.get_masks(tx.init(params))
    assert isinstance(masks["layers"]["scale"], optax.MaskedNode)
    assert masks["layers"]["kernel"].shape == (4, 8, 16)
