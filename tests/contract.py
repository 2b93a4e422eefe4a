"""Every transformation that the contract suite covers, and what its params must
satisfy.

A new wrapper gets a line in `WRAPPERS`; the tests in test_contract*.py take it from
here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt

INT8 = jopt.QuantSpec(jopt.formats.int8)
INT4 = jopt.QuantSpec(jopt.formats.int4, group_size=4)


def quarter_grid(latent):
    """Snap to multiples of a quarter, a projection without memory."""
    return jax.tree.map(
        lambda x: (
            (jnp.round(x * 4) / 4).astype(x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        latent,
    )


def sparse(**options):
    return lambda inner: jopt.prune(inner, **options)


def snapped(spec, **options):
    return lambda inner: jopt.quantize_weights(inner, spec, **options)


def moving(wrapper, **options):
    """Drop and grow half of what is kept on every other count."""
    options = {"drop_fraction": 0.5, "every_steps": 2, **options}
    return lambda inner: wrapper(inner, **options)


WRAPPERS = {
    "project": lambda inner: jopt.project(inner, quarter_grid),
    "prune": sparse(sparsity=0.5),
    "prune_ramp": sparse(
        sparsity=jopt.schedules.cubic_sparsity(0.0, 0.75, begin_step=1, end_step=4),
        every_steps=2,
        begin_step=1,
        end_step=4,
    ),
    "prune_global": sparse(sparsity=0.5, allocation=jopt.allocation.global_ranking),
    "prune_nm": sparse(pattern=jopt.NM(2, 4)),
    "prune_block": sparse(sparsity=0.5, pattern=jopt.Block((4, 4))),
    "prune_channel": sparse(sparsity=0.5, pattern=jopt.Channel(-1)),
    "prune_saliency": sparse(sparsity=0.5, scores=jopt.scores.saliency),
    "prune_random": sparse(
        sparsity=0.5, scores=jopt.scores.random(), key=jax.random.key(7)
    ),
    "prune_host": sparse(sparsity=0.5, update="host"),
    "prune_average": sparse(sparsity=0.5, scores=jopt.scores.saliency(decay=0.9)),
    "static_sparse": lambda inner: jopt.static_sparse(
        inner, sparsity=0.5, allocation=jopt.allocation.uniform
    ),
    "rigl": moving(jopt.rigl, sparsity=0.5, allocation=jopt.allocation.uniform),
    "set": moving(jopt.set_, sparsity=0.5),
    "snfs": moving(jopt.snfs, sparsity=0.5),
    "ste": lambda inner: jopt.ste(inner, sparsity=0.5, every_steps=2),
    "sr_ste": lambda inner: jopt.sr_ste(inner, decay=0.1, pattern=jopt.NM(2, 4)),
    "top_kast": lambda inner: jopt.top_kast(
        inner, sparsity=0.5, backward_sparsity=0.25, penalty=0.1, every_steps=2
    ),
    "ac_dc": lambda inner: jopt.ac_dc(
        inner, sparsity=0.5, compressed_steps=2, dense_steps=1, end_step=5
    ),
    "rewind": lambda inner: jopt.rewind(jopt.prune(inner, sparsity=0.5, begin_step=1)),
    "proximal": lambda inner: jopt.proximal(
        inner, jopt.proximal_maps.l1(0.05), end_step=3
    ),
    "proximal_group": lambda inner: jopt.proximal(
        inner, jopt.proximal_maps.group_lasso(0.9, jopt.Block((4, 4))), end_step=1
    ),
    "quantize": snapped(INT8),
    "quantize_groups": snapped(INT4),
    "quantize_asymmetric": snapped(
        jopt.QuantSpec(jopt.formats.uint4, symmetric=False), begin_step=1
    ),
    "quantize_float4": snapped(jopt.QuantSpec(jopt.formats.fp4_e2m1)),
    "quantize_static": snapped(INT8, scales="static"),
    "quantize_moving": snapped(INT8, scales="moving", begin_step=2),
    "quantize_learned": snapped(INT8, scales="learned"),
    "quantize_bits": snapped(
        INT8, bits_schedule=jopt.schedules.gradual_bits(8, 4, end_step=4)
    ),
    "quantize_stochastic": snapped(
        INT8, rounding=jopt.rounding.stochastic, key=jax.random.key(3)
    ),
    "quantize_binary_relax": snapped(
        INT8, projection=jopt.projections.binary_relax(optax.linear_schedule(1, 0, 4))
    ),
    "quantize_parq": snapped(
        jopt.QuantSpec(jopt.formats.ternary, axis=()),
        projection=jopt.projections.parq(
            jopt.schedules.sigmoid_softness(begin_step=1, end_step=4)
        ),
    ),
    "quantize_frozen_oscillations": snapped(
        INT4,
        projection=jopt.projections.freeze_oscillations(0.3, momentum=0.5),
        begin_step=1,
    ),
    "quantize_full_range": snapped(
        jopt.QuantSpec(jopt.formats.int4, narrow_range=False)
    ),
    "quantize_damped": snapped(INT8, scales="static", damping=0.1),
    "cluster": lambda inner: jopt.cluster_weights(inner, 4, begin_step=1),
    "cluster_zeros": lambda inner: jopt.cluster_weights(
        jopt.prune(inner, sparsity=0.5), 4, preserve_zeros=True
    ),
    "dorefa": lambda inner: jopt.dorefa(inner, 2, begin_step=1),
    "freeze": lambda inner: jopt.freeze(
        inner, fraction=optax.piecewise_constant_schedule(0.25, {2: 2.0})
    ),
    "freeze_layers": lambda inner: jopt.freeze(inner, from_step=3),
    "quantize_freeze": lambda inner: jopt.quantize_weights(
        jopt.freeze(inner, fraction=0.5), INT8, scales="static"
    ),
    "quantize_prune": lambda inner: jopt.quantize_weights(
        jopt.prune(inner, sparsity=0.5), INT8
    ),
    "prune_quantize": lambda inner: jopt.prune(
        jopt.quantize_weights(inner, INT8), sparsity=0.5
    ),
}
# One of each mechanism, for products of wrappers with many other things.
REPRESENTATIVES = [
    "project",
    "prune_ramp",
    "prune_global",
    "rigl",
    "ste",
    "rewind",
    "quantize",
    "quantize_learned",
    "quantize_prune",
]
# Wrappers whose params hold exact zeros, and how many of each 8 x 16 leaf after 6
# steps.
HALF = 64
ZEROS = {
    "cluster_zeros": HALF,
    "prune": HALF,
    "prune_ramp": 96,
    "prune_nm": HALF,
    "prune_block": HALF,
    "prune_channel": HALF,
    "prune_saliency": HALF,
    "prune_random": HALF,
    "prune_average": HALF,
    "static_sparse": HALF,
    "rigl": HALF,
    "set": HALF,
    "ste": HALF,
    "sr_ste": HALF,
    "top_kast": HALF,
    "ac_dc": HALF,
    "rewind": HALF,
}


def with_exhaustive(names, always=(), but=()):
    """Mark all but those of one mechanism each: too many to compile on every Python."""
    always = {*REPRESENTATIVES, *always} - {*but}
    return [
        pytest.param(name, marks=() if name in always else pytest.mark.exhaustive)
        for name in names
    ]


# Wrappers that add up or mix weights, which on a mesh are added in another order, or
# multiplied and added in one rounding.
ROUNDED = {"proximal_group", "quantize_binary_relax"}
# Wrappers whose k-means sees the numbers of a leaf as one list, which a mesh gathers.
GATHERED = {"cluster", "cluster_zeros"}


def make_params(dtype=jnp.float32):
    """Two kernels and a bias."""
    # A seed without a bias below a half, which a coarse grid would round to zero.
    rng = np.random.default_rng(103)

    def draw(scale, *shape):
        # Where `jnp.asarray` would compile a program for each shape.
        return jax.device_put((scale * rng.normal(size=shape)).astype(dtype))

    return {
        "dense": {"bias": draw(1.0, 16), "kernel": draw(1.0, 8, 16)},
        "head": {"kernel": draw(0.1, 8, 16)},
    }


def make_grads(params, step=0):
    """Return gradients that differ per step."""
    rng = np.random.default_rng((1, step))
    return jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype)), params
    )


def stack_grads(params, num_steps):
    """Stack the gradients of steps along a new first axis, for `jax.lax.scan`."""
    grads = [make_grads(params, step) for step in range(num_steps)]
    return jax.tree.map(lambda *g: jax.device_put(np.stack(g)), *grads)


def make_step(tx):
    """Return `((params, state), grads) -> (params, state), None`, to jit or to scan."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return step


def train(tx, params, num_steps=6, state=None, begin=0, update=None, **extra):
    """Take steps as a user would; `update` is a jitted `tx.update`."""
    update = jax.jit(tx.update) if update is None else update
    state = tx.init(params) if state is None else state
    for step in range(begin, begin + num_steps):
        updates, state = update(make_grads(params, step), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(actual, expected, message=""):
    """Assert that two trees have one structure and are equal bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), message
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, message
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=message)
