"""Every optimizer of Optax inside every wrapper: aliases and contrib, a few steps each.

Each wrapper must land where it promises whatever the inner optimizer keeps in its
state, and keep that state's structure, shapes and dtypes.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jopt
from tests import contract

RATE = 1e-2
# By name where learning_rate is all that is needed.
ALIASES = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "amsgrad",
    "fromage",
    "lamb",
    "lars",
    "lion",
    "nadam",
    "nadamw",
    "novograd",
    "optimistic_adam_v2",
    "optimistic_gradient_descent",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sign_sgd",
    "signum",
    "sm3",
    "yogi",
]
CONTRIB = [
    "acprop",
    "ademamix",
    "adopt",
    "cocob",
    "dadapt_adamw",
    "dog",
    "dowg",
    "galore",
    "madgrad",
    "momo",
    "momo_adam",
    "muon",
    "prodigy",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "simplified_ademamix",
    "sophia",
]
OPTIMIZERS = {
    **{
        name: getattr(optax, name)(RATE)
        for name in ALIASES
        if name != "optimistic_adam"
    },
    **{name: getattr(contrib, name)(RATE) for name in CONTRIB},
    "noisy_sgd": optax.noisy_sgd(RATE, key=jax.random.key(0)),
    "lbfgs": optax.lbfgs(RATE, linesearch=None),
    "polyak_sgd": optax.polyak_sgd(RATE),
    "mechanize": contrib.mechanize(optax.adam(RATE)),
    "sam": contrib.sam(optax.sgd(RATE), optax.sgd(RATE), sync_period=2),
    "schedule_free": contrib.schedule_free(optax.adam(RATE), RATE),
    "reduce_on_plateau": optax.chain(optax.adam(RATE), contrib.reduce_on_plateau()),
    "lookahead_inner": optax.chain(optax.ema(0.9), optax.sgd(RATE)),
    "multi_steps": optax.MultiSteps(optax.adamw(RATE), 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "bfloat16_moments": optax.adam(RATE, mu_dtype=jnp.bfloat16),
}
# Not transformations of gradients like params: of gradients per example, of pairs of
# params, of complex numbers; or deprecated names of what is here.
LEFT_OUT = {"dpsgd", "optimistic_adam"}
# A pattern of few operations: the masks are not what is in doubt here.
NM = {"pattern": jopt.NM(2, 4)}
SPARSE = {
    "prune": lambda inner: jopt.prune(inner, **NM),
    "static_sparse": lambda inner: jopt.static_sparse(inner, **NM),
    "set": contract.moving(jopt.set_, **NM),
    "rigl": contract.moving(jopt.rigl, **NM),
    "snfs": contract.moving(jopt.snfs, **NM),
    "sr_ste": contract.WRAPPERS["sr_ste"],
    "top_kast": lambda inner: jopt.top_kast(
        inner, backward_sparsity=0.25, every_steps=2, **NM
    ),
    "rewind": lambda inner: jopt.rewind(jopt.prune(inner, begin_step=1, **NM)),
    "ac_dc": lambda inner: jopt.ac_dc(
        inner, compressed_steps=1, dense_steps=1, end_step=2, **NM
    ),
    "proximal": lambda inner: jopt.proximal(
        inner, jopt.proximal_maps.hard_threshold(0.1), end_step=2
    ),
}
PARAMS = contract.make_grads({"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
LOWEST = {"xla_backend_optimization_level": 0}  # compiling is what takes the time


def loss(params):
    """A quadratic whose curvature differs from weight to weight."""
    scale = np.arange(1.0, 65.0, dtype=np.float32).reshape(8, 8)
    return jnp.sum(scale * (params["kernel"] - 1) ** 2) / 64


def test_no_optimizer_is_left_out():
    for module, listed in ((optax, ALIASES), (contrib, CONTRIB)):
        for name in dir(module):
            fn = getattr(module, name)
            if not inspect.isfunction(fn) or name.startswith(("_", "scale_by")):
                continue
            if "learning_rate" in inspect.signature(fn).parameters:
                assert name in {*listed, *OPTIMIZERS, *LEFT_OUT}, name


def extra_args(name, params):
    """What some optimizers want beside params."""
    value, grad = jax.value_and_grad(loss)(params)
    if name == "sophia":
        return grad, {"obj_fn": loss}
    if name == "sam":  # takes none
        return grad, {}
    return grad, {"value": value}


def shapes_of(state):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state)


def step_of(tx, name):
    def step(params, state):
        grad, extra = extra_args(name, params)
        updates, state = tx.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run(wrapper, name, num_steps=3):
    tx = wrapper(OPTIMIZERS[name])
    params, state = PARAMS, tx.init(PARAMS)
    shapes = shapes_of(state)
    lowered = jax.jit(step_of(tx, name)).lower(params, state)
    compiled = lowered.compile(compiler_options=LOWEST)
    for _ in range(num_steps):
        params, state = compiled(params, state)
    assert shapes_of(state) == shapes
    assert np.isfinite(params["kernel"]).all()
    return tx, params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rewinding_keeps_the_types_of_every_state(name):
    """Both branches, on and back to the start, are traced: what `init` makes fits."""
    tx = SPARSE["rewind"](OPTIMIZERS[name])
    state = jax.eval_shape(tx.init, PARAMS)
    _, after = jax.eval_shape(step_of(tx, name), PARAMS, state)
    assert shapes_of(after) == shapes_of(state)


# `rigl` finds and resets the moments of each; `rewind`, which is also traced around all
# above, starts any state anew alike.
IN_ALL = ("prune", "rigl")
IN_SOME = {"rewind": ("adamw", "multi_steps", "schedule_free_sgd")}


@pytest.mark.parametrize(
    ("wrapper", "name"),
    [
        pytest.param(
            wrapper,
            name,
            marks=()
            if wrapper in IN_ALL or name in IN_SOME.get(wrapper, ())
            else pytest.mark.exhaustive,
        )
        for wrapper in SPARSE
        for name in OPTIMIZERS
    ],
)
def test_keeps_exact_zeros(wrapper, name):
    tx, params, state = run(SPARSE[wrapper], name)
    mask = np.asarray(jopt.get_masks(state)["kernel"])
    assert mask.sum() == 32 or wrapper == "proximal"
    assert not np.any(np.asarray(params["kernel"])[~mask])
    same = optax.tree.map_params(tx, lambda x: x, state)
    contract.assert_same(same, state)
