"""Wrong arguments raise one sentence that names them and what would be right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt

SGD = optax.sgd(0.1)
HALF = {"sparsity": 0.5}
PARAMS = {"w": jnp.arange(1.0, 65.0).reshape(8, 8)}
X = jnp.eye(8)
NAN = float("nan")
ALLOCATION = jopt.allocation
MAPS = jopt.proximal_maps


def apply(params, x):
    return x @ params["w"]


def step(tx):
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def other(tx):
    """Step with the state of another optimizer."""
    return tx.update(PARAMS, optax.adam(0.1).init(PARAMS), PARAMS)


def one_shot(method="sparsegpt", *, fn=apply, params=PARAMS, batches=(X,), **options):
    return getattr(jopt, method)(fn, params, batches, **{**HALF, **options})


class Once:
    """Batches that are there once."""

    def __init__(self):
        self.is_read = False

    def __iter__(self):
        found = [] if self.is_read else [X]
        self.is_read = True
        return iter(found)


def prune(**options):
    return jopt.prune(SGD, **{**HALF, **options})


def kast(**options):
    return jopt.top_kast(SGD, **{**HALF, "backward_sparsity": 0.25, **options})


def ac_dc(**options):
    phases = {"compressed_steps": 1, "dense_steps": 1, "end_step": 4}
    return jopt.ac_dc(SGD, **{**HALF, **phases, **options})


WRONG = [
    # That passed silently.
    (lambda: step(kast(sparsity={"w": 0.5}, backward_sparsity=0.7)), "0.7 at 'w'"),
    (lambda: step(kast(backward_sparsity={"w": 0.7})), "at most sparsity=0.5, got 0.7"),
    (
        lambda: step(kast(sparsity=lambda c: 0.5, backward_sparsity=lambda c: 0.7)),
        "at most sparsity=0.5, got 0.7 at 'w'",
    ),
    (lambda: kast(backward_sparsity=jnp.float32(0.75)), "at most sparsity=0.5"),
    (lambda: kast(penalty=NAN), "penalty must be at least 0 and"),
    (lambda: prune(stacked_axes=True), "stacked_axes must be an integer"),
    (lambda: prune(stacked_axes={"w": False}), "stacked_axes must be an integer"),
    (lambda: jopt.Channel(1.5), "Channel needs an integer axis, got axis=1.5"),
    (lambda: jopt.NM(True, 2), "NM needs integers"),
    (lambda: jopt.Block((1.5, 2)), "positive sizes"),
    (lambda: jopt.sr_ste(SGD, decay=NAN, **HALF), "decay must be at least 0 and"),
    (lambda: MAPS.l1(NAN), "strength must be at least 0 and"),
    (lambda: MAPS.group_lasso(NAN, jopt.Channel()), "strength must be at least 0"),
    (lambda: MAPS.hard_threshold(float("inf")), "strength must be at least 0 and"),
    (lambda: MAPS.l1("much"), "strength must be a number, got 'much'"),
    (lambda: ac_dc(end_step=None), "end_step must be an integer"),
    (lambda: prune(every_steps=True), "every_steps must be an integer"),
    (lambda: prune(every_steps=None), "every_steps must be an integer"),
    (lambda: prune(every_steps="1"), "every_steps must be an integer"),
    (lambda: prune(every_steps=jnp.int32(0)), "every_steps must be an integer of at"),
    (lambda: jopt.rigl(SGD, drop_fraction="a", **HALF), "drop_fraction must be a num"),
    (lambda: jopt.snfs(SGD, decay="a", **HALF), "decay must be a number"),
    (lambda: one_shot(block_size=True), "block_size must be an integer"),
    (lambda: one_shot(error_propagation="no"), "error_propagation must be True or"),
    (lambda: one_shot("wanda", errors="no"), "errors must be True or False, got 'no'"),
    # That raised something else.
    (lambda: prune(allocation=ALLOCATION.owl), r"called first: jopt.allocation.owl\("),
    (lambda: prune(allocation=ALLOCATION.sensitivity), r"allocation.sensitivity\("),
    (lambda: one_shot(allocation=ALLOCATION.owl), "allocation must take"),
    (lambda: one_shot("wanda", allocation=ALLOCATION.sensitivity), "must take"),
    (lambda: jopt.proximal(SGD, MAPS.l1), r"called first: jopt.proximal_maps.l1\("),
    (lambda: jopt.proximal(SGD, MAPS.group_lasso), "proximal_map must take"),
    (lambda: one_shot(block_size=1.5), "block_size must be an integer"),
    (lambda: one_shot(damping="a"), "damping must be a number, got 'a'"),
    (lambda: one_shot(damping=NAN), "damping must be at least 0 and"),
    (lambda: one_shot(fn="x"), "apply must be a function"),
    (
        lambda: jax.jit(lambda params: one_shot(params=params)[0])(PARAMS),
        "sparsegpt must be called outside of jax.jit",
    ),
    (
        lambda: jax.jit(lambda x: one_shot("wanda", batches=[x])[0])(X),
        "wanda must be called outside of jax.jit",
    ),
    (lambda: one_shot(batches=Once()), "got none in pass 2"),
    (lambda: one_shot("wanda", batches=Once()), "batches must give the same items"),
    (lambda: one_shot(batches=[]), "batches must have at least one item"),
    (lambda: step(prune(scores=lambda p, g: None)), "one score per weight, .* None"),
    (lambda: step(prune(scores=lambda p, g: 3)), "one score per weight, .* got 3"),
    (lambda: prune(stacked_axes="0"), "stacked_axes must be an integer .* got '0'"),
    (lambda: prune(stacked_axes=[0]), "stacked_axes must be one value or ordered rul"),
    (lambda: jopt.NM(1, 2, axis=-1.0), "NM needs an integer axis"),
    (lambda: prune(key=3), "key must be one PRNG key, got 3"),
    (lambda: jopt.rigl(SGD, key="k", **HALF), "key must be one PRNG key, got 'k'"),
    (
        lambda: jopt.make_masks(
            PARAMS, key=jax.random.split(jax.random.key(0)), **HALF
        ),
        r"key must be one PRNG key, got an array key<fry>\[2\]",
    ),
    (lambda: other(prune()), "state must be what init of prune"),
    (lambda: other(jopt.ste(SGD, **HALF)), "state must be what init of ste"),
    (lambda: other(kast()), "state must be what init of top_kast"),
    (
        lambda: other(jopt.proximal(SGD, MAPS.l1(0.1))),
        "state must be what init of prox",
    ),
    (lambda: other(jopt.project(SGD, lambda x: x)), "state must be what init of proj"),
    (
        lambda: kast().update(PARAMS, jopt.ste(SGD, **HALF).init(PARAMS), PARAMS),
        "init of top_kast .* got a PruneState",
    ),
    (
        lambda: jopt.iterative_masks(apply, PARAMS, pattern=jopt.NM(1, 2), **HALF),
        "pattern must not be N:M for iterative_masks",
    ),
    (
        lambda: jopt.iterative_masks(apply, PARAMS, sparsity={"w": 0.5}),
        "sparsity must be a number for iterative_masks",
    ),
    (
        lambda: jopt.static_sparse(SGD, masks={"w": np.ones((8, 8))}).init(PARAMS),
        "as bool, or packed as uint8, got float64",
    ),
    (lambda: jopt.apply_masks(PARAMS, {"w": jnp.ones((8, 8))}), "as bool, or packed"),
    (lambda: jopt.apply_masks(PARAMS, {"w": 3}), "masks must fit 'w' .* got 3"),
    (lambda: prune(pattern="2:4"), r"pattern must be Unstructured.* got '2:4'; NM\(2,"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_is_wrong_is_named(case):
    call, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value) and "'scores'" not in str(error.value)


@pytest.mark.parametrize(
    "rules", [{"sparsity": {".*": None}}, {"pattern": {".*": None}}]
)
def test_rules_that_leave_everything_alone_warn(rules):
    with pytest.warns(UserWarning, match="prune selects none of 1 leaves"):
        prune(**rules).init(PARAMS)


def test_a_schedule_may_cross_the_backward_sparsity():
    """B is A until the ramp has passed it."""
    tx = kast(sparsity=lambda count: 0.25 * (count + 1), backward_sparsity=0.375)
    state = tx.init(PARAMS)
    forward, backward = state.projection_state.forward, state.projection_state
    assert int(jopt.unpack_mask(forward.masks["w"]).sum()) == 48
    assert int(jopt.unpack_mask(backward.backward_masks["w"]).sum()) == 48
