"""Scores of weights, gradients and channels against NumPy, alone and in `prune`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

import jopt
from jopt.pruning.scores import ScoreInputs
from tests import contract
from tests.pruning.test_prune import oracle_mask

scores = jopt.scores
DECAY = 0.9


def normal(*shape, seed=0, dtype=jnp.float32):
    drawn = np.random.default_rng(seed).normal(size=shape)
    return jax.device_put(drawn.astype(np.float32).astype(dtype))


def inputs_of(param, grad=None, count=0, stacked_axis=None, context=None):
    mask = jopt.pack_mask(jax.device_put(np.ones(param.shape, np.bool_)))
    return ScoreInputs(
        param,
        grad,
        mask,
        jax.device_put(np.int32(count)),
        jax.random.key(0),
        {},
        stacked_axis=stacked_axis,
        context=context,
    )


def wide(x):
    return np.asarray(x, np.float64)


# ---- oracles, in float64


def oracle_lamp(w):
    """The definition: sort, and add up what is as large or larger."""
    flat = np.abs(wide(w)).ravel()
    order = np.argsort(-flat, kind="stable")
    result, total = np.zeros(flat.size), 0.0
    for i in order:
        total += flat[i] ** 2
        result[i] = flat[i] ** 2 / total if total else 0.0
    return result.reshape(w.shape)


def oracle_fpgm(w, axis=-1):
    rows = np.moveaxis(wide(w), axis, 0).reshape(w.shape[axis], -1)
    alive = np.any(rows != 0, axis=1)
    total = np.array(
        [
            sum(np.linalg.norm(a - b) for b in rows[alive]) if is_alive else 0.0
            for a, is_alive in zip(rows, alive, strict=True)
        ]
    )
    shape = [1] * w.ndim
    shape[axis] = -1
    return np.broadcast_to(total.reshape(shape), w.shape)


def oracle_average(values, decay):
    """Weights (1 - d) d^age, divided by their sum."""
    ages = np.arange(len(values))[::-1]
    weights = (1 - decay) * float(decay) ** ages
    return np.tensordot(weights / weights.sum(), np.stack(values), 1)


NORMS = {
    "l2": lambda s: np.sqrt(np.sum(s**2)),
    "mean": lambda s: np.mean(np.abs(s)),
    "sum": lambda s: np.sum(np.abs(s)),
    "max": lambda s: np.max(np.abs(s)),
}


# ---- plain functions


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_functions_of_one_step(dtype):
    """In float32 whatever the dtype: float16 would underflow at these gradients."""
    w, g = normal(6, 5, dtype=dtype), (1e-4 * normal(6, 5, seed=1)).astype(dtype)
    p, q = wide(w), wide(g)
    for fn, expected in (
        (scores.saliency, np.abs(p * q)),
        (scores.taylor(), (p * q) ** 2),
        (scores.taylor(order=2), np.abs(-p * q + (p * q) ** 2 / 2)),
        (scores.lamp, oracle_lamp(w)),
        (scores.fpgm(), oracle_fpgm(w)),
        (scores.fpgm(axis=0), oracle_fpgm(w, axis=0)),
    ):
        found = fn(w, g)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(scores.magnitude(w), np.abs(np.asarray(w)))


def test_lamp_keeps_the_order_of_magnitude_ties_and_zeros_included():
    rng = np.random.default_rng(0)
    w = rng.normal(size=40_000).astype(np.float32)
    w[::7] = w[1::7][: w[::7].size]  # ties
    w[::11] = 0
    w *= 1e-20  # whose squares are 0 in float32
    w[::13] *= 1e-12
    for share in (0.1, 0.3, 0.5, 0.85):
        kept = jopt.make_mask(scores.lamp(jnp.asarray(w)), sparsity=share)
        np.testing.assert_array_equal(kept, oracle_mask(np.abs(w), share))
    np.testing.assert_allclose(
        scores.lamp(jnp.asarray(w[:500])), oracle_lamp(w[:500]), rtol=1e-5, atol=1e-37
    )


def test_lamp_of_ties_zeros_and_what_is_not_finite():
    np.testing.assert_allclose(scores.lamp(jnp.full(4, -3.0)), 1 / np.arange(1, 5))
    np.testing.assert_array_equal(scores.lamp(jnp.zeros((2, 3))), 0.0)
    found = scores.lamp(jnp.array([1.0, jnp.inf, -2.0, jnp.nan]))
    np.testing.assert_allclose(found, [0.2, np.nan, 1.0, np.nan], rtol=1e-6)
    np.testing.assert_allclose(scores.lamp(jnp.array([1e-30, 2e-30]))[0], 0.2, 1e-6)
    np.testing.assert_allclose(scores.lamp(jnp.array([1e30, 2e30]))[0], 0.2, 1e-6)


def test_fpgm_drops_the_channel_in_the_middle_and_never_revives_zeros():
    w = normal(3, 3, 4, 8, seed=2)
    w = w.at[..., 3].set(0.0).at[..., 5].set(w[..., 6])  # one pruned, two alike
    found = scores.fpgm()(w, None)
    np.testing.assert_allclose(found, oracle_fpgm(w), rtol=1e-4)
    np.testing.assert_array_equal(found[..., 3], 0.0)
    far = w + 1000.0  # distances do not see a shift
    expected = oracle_fpgm(far)
    np.testing.assert_allclose(scores.fpgm()(far, None), expected, rtol=1e-2)
    bad = scores.fpgm()(w.at[0, 0, 0, 0].set(jnp.nan), None)
    assert np.isnan(bad[..., 0]).all() and np.isfinite(bad[..., 1:]).all()
    np.testing.assert_array_equal(scores.fpgm()(jnp.zeros((4, 3)), None), 0.0)


def test_fpgm_makes_no_array_of_channels_squared_times_weights():
    w = jax.ShapeDtypeStruct((16, 256, 64), jnp.float32)
    compiled = jax.jit(lambda w: scores.fpgm()(w, None)).lower(w).compile()
    weights, pairs = 16 * 256 * 64 * 4, 64 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (weights + pairs)


# ---- averages


def averages():
    """Name -> (criterion, oracle of w and the list of all gradients)."""
    return {
        "saliency": (
            scores.saliency(decay=DECAY),
            lambda w, gs: oracle_average([np.abs(w * g) for g in gs], DECAY),
        ),
        "taylor": (
            scores.taylor(decay=DECAY),
            lambda w, gs: oracle_average([(w * g) ** 2 for g in gs], DECAY),
        ),
        "taylor_2": (
            scores.taylor(order=2, decay=DECAY),
            lambda w, gs: np.abs(
                -w * gs[-1] + w**2 * oracle_average([g**2 for g in gs], DECAY) / 2
            ),
        ),
        "fisher": (
            scores.fisher(decay=DECAY),
            lambda w, gs: w**2 * oracle_average([g**2 for g in gs], DECAY) / 2,
        ),
        "movement": (scores.movement(), lambda w, gs: -sum(w * g for g in gs)),
        "movement_leaky": (
            scores.movement(decay=0.5),
            lambda w, gs: -sum(w * g * 0.5**i for i, g in enumerate(gs[::-1])),
        ),
    }


@pytest.mark.parametrize("name", averages())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_averages_over_steps(name, dtype):
    score, oracle = averages()[name]
    w, gs = normal(3, 4, dtype=dtype), normal(5, 3, 4, seed=1, dtype=dtype)

    def step(carry, g):
        state, count = carry
        inputs = inputs_of(w, g, 0)._replace(count=count)
        state = score.update(inputs, state)
        return (state, count + 1), score.scores(inputs, state)

    (state, _), found = jax.lax.scan(step, (score.init(w), jnp.int32(0)), gs)
    assert state.dtype == found.dtype == jnp.float32 and state.shape == w.shape
    expected = np.stack([oracle(wide(w), list(wide(gs[: i + 1]))) for i in range(5)])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_the_correction_has_all_its_digits_at_a_slow_decay():
    score = scores.fisher(decay=0.9999)
    w, g = jnp.full(2, 2.0), jnp.full(2, 3.0)
    state = score.init(w)
    for count in range(3):  # of equal values every average is that value
        state = score.update(inputs_of(w, g, count), state)
        np.testing.assert_allclose(state, 9.0, rtol=1e-6)
    later = score.update(inputs_of(w, 2 * g, 1_000_000), state)
    np.testing.assert_allclose(later, 9.0 + 27.0 * 1e-4, rtol=1e-6)


def test_a_decay_of_0_is_the_last_step_and_one_may_be_traced():
    w, g = normal(3, 4), normal(2, 3, 4, seed=1)

    def run(decay):
        score = scores.saliency(decay=decay)
        state = score.init(w)
        for count in range(2):
            state = score.update(inputs_of(w, g[count], count), state)
        return state

    np.testing.assert_allclose(run(0.0), jnp.abs(w * g[1]), rtol=1e-6)
    together = jax.vmap(run)(jnp.array([0.0, DECAY]))
    np.testing.assert_allclose(together[1], run(DECAY), rtol=1e-5)


# ---- in prune


@pytest.mark.parametrize(
    "name", ["saliency", "taylor_2", "fisher", "movement", "normalized"]
)
def test_scores_with_memory_in_prune(name):
    """Masks are those of the oracle's scores of params and gradients of all steps."""
    score, oracle = averages()["saliency" if name == "normalized" else name]
    score = scores.normalized(score) if name == "normalized" else score
    tx = jopt.prune(optax.lion(0.0), sparsity=0.5, scores=score, begin_step=3)
    params = {"kernel": contract.make_params()["head"]["kernel"]}
    _, state = contract.train(tx, params, num_steps=4)
    gs = [wide(contract.make_grads(params, i)["kernel"]) for i in range(4)]
    expected = oracle_mask(oracle(wide(params["kernel"]), gs), 0.5)
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], expected)


CURVATURE = {
    "fisher": (scores.fisher(), lambda w, g, h: w**2 * h / 2),
    "obd": (scores.obd(), lambda w, g, h: w**2 * h / 2),
    "taylor": (
        scores.taylor(order=2, curvature="nu"),
        lambda w, g, h: np.abs(-w * g + w**2 * h / 2),
    ),
}


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("fisher", "multi_steps"),
        ("obd", "partition"),
        ("taylor", "partition"),
        pytest.param("fisher", "partition", marks=pytest.mark.exhaustive),
        pytest.param("obd", "multi_steps", marks=pytest.mark.exhaustive),
        pytest.param("taylor", "multi_steps", marks=pytest.mark.exhaustive),
    ],
)
def test_curvature_of_the_inner_optimizer(name, inner):
    """From the nu of the step before, however nested, without state of its own."""
    score, oracle = CURVATURE[name]
    adam = optax.adam(1e-3)
    optimizer = {
        "multi_steps": optax.MultiSteps(adam, 1),
        "partition": optax.partition(
            {"a": adam, "b": optax.sgd(1e-3)},
            {"dense": {"kernel": "a", "bias": "b"}, "head": {"kernel": "a"}},
        ),
    }[inner]
    tx = jopt.prune(optimizer, sparsity=0.5, scores=score, begin_step=2, every_steps=9)
    update = jax.jit(tx.update)
    params, state = contract.train(tx, contract.make_params(), 2, update=update)
    grads = contract.make_grads(params, 2)
    _, after = update(grads, state, params)
    nu = optax.tree.get_all_with_path(state.inner_state, "nu")[0][1]
    w, g, h = (wide(x["head"]["kernel"]) for x in (params, grads, nu))
    expected = oracle_mask(oracle(w, g, h), 0.5)
    np.testing.assert_array_equal(jopt.get_masks(after)["head"]["kernel"], expected)
    assert not jax.tree.leaves(state.score_state)


def test_obd_takes_sophias_hessian_and_nothing_negative():
    tx = jopt.prune(
        contrib.sophia(0.0), sparsity=0.5, scores=scores.obd(), begin_step=1
    )
    params = {"kernel": normal(4, 4)}
    scale = np.arange(-7.0, 9.0, dtype=np.float32).reshape(4, 4)

    def loss(params):
        return jnp.sum(scale * params["kernel"] ** 2) / 2

    @jax.jit
    def update(state):
        return tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)[1]

    state = update(update(tx.init(params)))
    hessian = np.maximum(np.asarray(scale), 0)
    expected = oracle_mask(wide(params["kernel"]) ** 2 * hessian / 2, 0.5)
    np.testing.assert_array_equal(jopt.get_masks(state)["kernel"], expected)


def test_curvature_of_a_function():
    curvature = {"kernel": jnp.abs(normal(4, 4, seed=3))}
    score = scores.taylor(order=2, curvature=lambda params, inner_state: curvature)
    w, g = {"kernel": normal(4, 4)}, {"kernel": normal(4, 4, seed=1)}
    mask = jopt.make_masks(w, grads=g, scores=score, sparsity=0.5)["kernel"]
    p, q, h = (wide(x["kernel"]) for x in (w, g, curvature))
    expected = oracle_mask(np.abs(-p * q + p**2 * h / 2), 0.5)
    np.testing.assert_array_equal(mask, expected)


def test_bfloat16_moments_are_widened():
    nu = jnp.full((2, 2), 1e-3, jnp.bfloat16)
    w = jnp.full((2, 2), 1.01, jnp.bfloat16)
    found = scores.obd().scores(inputs_of(w, context=nu), ())
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wide(w) ** 2 * wide(nu) / 2, rtol=1e-6)


# ---- layers


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["lamp", "fpgm", *NORMS])
def test_stacked_layers_are_scored_one_by_one(name, axis):
    w, g = np.asarray(normal(3, 4, 5, seed=4)), np.asarray(normal(3, 4, 5, seed=5))
    w = w * np.array([1.0, 10.0, 0.1], np.float32).reshape(3, 1, 1)
    stacked = jax.device_put((np.moveaxis(w, 0, axis), np.moveaxis(g, 0, axis)))
    if name in NORMS:
        score = scores.normalized(scores.saliency, by=name)

        def oracle(w, g):
            s = np.abs(wide(w) * wide(g))
            return s / NORMS[name](s)
    else:
        score = jopt.pruning.scores.as_score(
            scores.lamp if name == "lamp" else scores.fpgm()
        )

        def oracle(w, g):
            return oracle_lamp(w) if name == "lamp" else oracle_fpgm(w)

    found = score.scores(inputs_of(*stacked, stacked_axis=axis), ())
    expected = np.stack([oracle(w[i], g[i]) for i in range(3)], axis)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alone = score.scores(inputs_of(*jax.device_put((w[1], g[1]))), ())
    np.testing.assert_allclose(alone, oracle(w[1], g[1]), rtol=1e-5)


def test_stacked_and_separate_layers_get_the_same_masks():
    w = normal(3, 8, 8, seed=6) * jnp.array([1.0, 10.0, 0.1]).reshape(3, 1, 1)
    for score in (scores.lamp, scores.normalized(scores.magnitude)):
        options = {
            "scores": score,
            "sparsity": 0.7,
            "allocation": jopt.allocation.global_ranking,
        }
        together = jopt.make_masks({"w": w}, stacked_axes={"w": 0}, **options)
        alone = jopt.make_masks(list(w), **options)
        np.testing.assert_array_equal(together["w"], np.stack(alone))


@pytest.mark.parametrize("by", NORMS)
def test_normalized_scores_of_zeros_tiny_and_negative_numbers(by):
    def score(x):
        raw = scores.normalized(lambda param, grad: param, by=by)
        return raw.scores(inputs_of(x), ())

    np.testing.assert_array_equal(score(jnp.zeros((2, 2))), 0.0)
    x = normal(4, 6, seed=7)
    expected = wide(x) / NORMS[by](wide(x))
    np.testing.assert_allclose(score(x), expected, rtol=1e-5)
    np.testing.assert_allclose(score(1e-30 * x), expected, rtol=1e-5)
    np.testing.assert_allclose(score(1e30 * x), expected, rtol=1e-5)
    assert score(x.astype(jnp.bfloat16)).dtype == jnp.float32
    bad = score(x.at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf))
    assert not np.isfinite(bad[0, :2]).any() and np.isfinite(bad[1:]).all()


def test_normalized_keeps_randomness_and_context():
    score = scores.normalized(scores.random())
    with pytest.raises(ValueError, match="key must be given"):
        jopt.prune(optax.sgd(1.0), sparsity=0.5, scores=score)
    assert scores.normalized(scores.obd()).context is not None


# ---- batch norms


def norm_params():
    return {
        "conv1": {"kernel": normal(3, 3, 2, 4)},
        "conv2": {"kernel": normal(3, 3, 4, 4, seed=1)},
        "norm1": {"scale": jnp.array([0.1, -2.0, 0.0, 1.0], jnp.bfloat16)},
        "blocks": {"kernel": normal(5, 2, 4, 3), "scale": normal(2, 4, seed=8)},
    }


def test_batch_norm_scale_scores_whole_channels():
    params = norm_params()
    score = scores.batch_norm_scale({"conv1/kernel": "norm1/scale"})
    contexts = score.context(params, ())
    inputs = inputs_of(params["conv1"]["kernel"], context=contexts["conv1"]["kernel"])
    gamma = np.abs(wide(params["norm1"]["scale"]))
    np.testing.assert_array_equal(
        score.scores(inputs, ()), np.broadcast_to(gamma, (3, 3, 2, 4))
    )
    tx = jopt.prune(
        optax.sgd(0.0),
        sparsity=0.5,
        scores=score,
        pattern=jopt.Channel(),
        select=jopt.matching("conv1/kernel"),
    )
    _, state = contract.train(tx, params, num_steps=1)
    mask = jopt.get_masks(state)["conv1"]["kernel"]
    np.testing.assert_array_equal(mask[0, 0, 0], [False, True, False, True])


def test_batch_norm_scale_of_stacked_kernels():
    params = norm_params()
    score = scores.batch_norm_scale({"blocks/kernel": "blocks/scale"}, axis=1)
    context = score.context(params, ())["blocks"]["kernel"]
    inputs = inputs_of(params["blocks"]["kernel"], stacked_axis=1, context=context)
    gamma = np.abs(wide(params["blocks"]["scale"]))
    expected = np.broadcast_to(gamma[None, :, :, None], (5, 2, 4, 3))
    np.testing.assert_allclose(score.scores(inputs, ()), expected)


def test_batch_norm_scale_names_what_is_missing():
    params = norm_params()

    def masks(scale_of, **options):
        jopt.make_masks(
            params,
            sparsity=0.5,
            scores=scores.batch_norm_scale(scale_of),
            pattern=jopt.Channel(),
            **options,
        )

    with pytest.raises(ValueError, match=r"'conv1/kernle'.*near names: 'conv1/kernel'"):
        masks({"conv1/kernle": "norm1/scale"})
    with pytest.raises(ValueError, match=r"'norm2/scale'.*near names: 'norm1/scale'"):
        masks({"conv1/kernel": "norm2/scale"})
    with pytest.raises(ValueError, match="got none for 'conv2/kernel'"):
        masks({"conv1/kernel": "norm1/scale"}, select=jopt.matching("conv./kernel"))
    with pytest.raises(
        ValueError, match=r"of shape \(4,\), one number.*got shape \(2, 4\)"
    ):
        masks({"conv1/kernel": "blocks/scale"}, select=jopt.matching("conv1/kernel"))
    with pytest.raises(TypeError, match="scale_of must map"):
        scores.batch_norm_scale([("a", "b")])


# ---- on meshes


def take_two_steps(tx, params):
    """Return the state after two steps whose gradients are the params."""
    step = contract.make_step(tx)
    carry = params, tx.init(params)
    return jax.lax.scan(lambda c, _: step(c, c[0]), carry, length=2)[0][1]


LAYER = {
    "saliency": lambda: scores.saliency(decay=DECAY),
    "fisher": lambda: scores.fisher(),
    "normalized": lambda: scores.normalized(scores.magnitude, by="max"),
    "l2": lambda: scores.normalized(scores.magnitude),
    "batch_norm_scale": lambda: scores.batch_norm_scale(
        {"rows": "scale", "columns": "scale", "stack": "scales"}
    ),
    "lamp": lambda: scores.lamp,
    "fpgm": lambda: scores.fpgm(),
}
GATHERS = {"lamp", "fpgm"}  # as documented
SPECS = {
    "rows": PartitionSpec("data", None),
    "columns": PartitionSpec(None, "data"),
    "stack": PartitionSpec("data"),
    "scale": PartitionSpec(),
    "scales": PartitionSpec(),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(
            name,
            kind,
            # Averages, one of them here, and what is divided by, one of them here.
            marks=pytest.mark.exhaustive
            if kind == "auto_mesh" or name in ("fisher", "normalized")
            else (),
        )
        for name in LAYER
        for kind in ("explicit_mesh", "auto_mesh")
    ],
)
def test_sharded_masks_equal_those_of_one_device(name, kind, request):
    mesh = request.getfixturevalue(kind)
    params = {
        "rows": normal(64, 128),
        "columns": normal(64, 128, seed=1),
        "stack": normal(8, 32, 128, seed=2),
        "scale": normal(128, seed=3),
        "scales": normal(8, 128, seed=4),
    }
    is_channel = name in ("fpgm", "batch_norm_scale")
    tx = jopt.prune(
        optax.adam(1e-2),
        sparsity=0.5,
        scores=LAYER[name](),
        begin_step=1,
        pattern=jopt.Channel() if is_channel else jopt.Unstructured(),
        select=jopt.matching("rows", "columns", "stack"),
        stacked_axes={"stack": 0},
    )
    shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    sharded = jax.tree.map(jax.device_put, params, shardings)

    @jax.jit
    def two_steps(params):
        state = take_two_steps(tx, params)
        return jopt.get_masks(state), state.score_state

    alone, _ = two_steps(params)
    with jax.set_mesh(mesh):
        compiled = two_steps.lower(sharded).compile()
        together, memory = compiled(sharded)
    for key in ("rows", "columns", "stack"):
        np.testing.assert_array_equal(together[key], alone[key])
    if name == "saliency":
        for key in ("rows", "columns", "stack"):
            wanted = NamedSharding(mesh, SPECS[key])
            assert memory[key].sharding.is_equivalent_to(wanted, params[key].ndim)
    if name not in GATHERS:
        gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text())
        sizes = [np.prod([int(d) for d in dims.split(",") if d]) for dims in gathered]
        assert max(sizes, default=0) < 64 * 128 // 4


@pytest.mark.parametrize("kind", ["auto_mesh", "explicit_mesh"])
def test_fpgm_adds_partial_sums_where_the_weights_are_split(kind, request):
    mesh = request.getfixturevalue(kind)
    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    w = jax.device_put(normal(512, 16), sharding)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda w: scores.fpgm()(w, None)).lower(w).compile()
        found = compiled(w)
    np.testing.assert_allclose(found, oracle_fpgm(normal(512, 16)), rtol=1e-5)
    assert "all-gather" not in compiled.as_text()
    if kind == "explicit_mesh":
        assert found.sharding.is_equivalent_to(sharding, 2)


def test_an_ensemble_under_vmap():
    """vmap over the whole training step equals one member after another."""
    tx = jopt.prune(
        optax.adam(1e-2),
        sparsity=0.5,
        scores=scores.normalized(scores.saliency(decay=DECAY)),
        allocation=jopt.allocation.global_ranking,
    )

    def two_steps(params):
        return jopt.get_masks(take_two_steps(tx, params))

    members = {"a": normal(2, 8, 8), "b": 9 * normal(2, 4, 8, seed=1)}
    together = jax.jit(jax.vmap(two_steps))(members)
    alone = jax.jit(two_steps)
    for i in range(2):
        contract.assert_same(
            jax.tree.map(lambda m, i=i: m[i], together),
            alone(jax.tree.map(lambda x, i=i: x[i], members)),
        )


# ---- errors


def test_what_is_wrong_raises_at_construction():
    for make in (scores.fisher, scores.saliency, scores.taylor):
        for decay in (1.0, -0.1, 2):
            with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
                make(decay=decay)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        scores.movement(decay=1.5)
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        scores.taylor(order=3)
    with pytest.raises(ValueError, match="curvature must stand for"):
        scores.taylor(curvature="nu")
    with pytest.raises(ValueError, match="curvature must stand for"):
        scores.taylor(order=2, curvature="nu", decay=0.9)
    with pytest.raises(ValueError, match="by must be one of"):
        scores.normalized(scores.magnitude, by="l1")
    with pytest.raises(TypeError, match="saliency needs param and grad, or decay="):
        scores.saliency()
    with pytest.raises(ValueError, match="fpgm must have an axis of channels"):
        scores.fpgm(axis=2)(jnp.ones((2, 2)), None)


@pytest.mark.parametrize(
    "name", ["movement", "fpgm", "fisher", "obd", "taylor", "random", "normalized"]
)
def test_a_criterion_that_was_not_called_raises(name):
    with pytest.raises(TypeError, match=rf"scores=jopt.scores.{name}\(...\)"):
        jopt.prune(optax.sgd(1.0), sparsity=0.5, scores=getattr(scores, name))


def test_an_optimizer_without_the_moment_raises():
    params = contract.make_params()
    tx = jopt.prune(optax.sgd(1.0), sparsity=0.5, scores=scores.fisher())
    with pytest.raises(ValueError, match=r"inner must keep 'nu'.*optax.adam.*decay="):
        tx.update(params, tx.init(params), params)
    muon = jopt.prune(contrib.muon(1.0), sparsity=0.5, scores=scores.obd())
    with pytest.raises(ValueError, match=r"'nu' of shape \(8, 16\) for 'dense/kernel'"):
        muon.update(params, muon.init(params), params)


@pytest.mark.parametrize("name", ["fisher", "batch_norm_scale"])
def test_host_updates_equal_those_of_the_step(name):
    """Contexts pass into programs of their own, holes included."""
    params = {"k": normal(8, 16), "b": normal(16, seed=1)}
    score = {
        "fisher": scores.fisher(),
        "batch_norm_scale": scores.batch_norm_scale({"k": "b"}),
    }[name]
    inner = optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)}, dict(k="a", b="b")
    )
    options = {"sparsity": 0.5, "scores": score, "begin_step": 1}
    expected, _ = contract.train(jopt.prune(inner, **options), params, num_steps=3)
    tx = jopt.prune(inner, **options, update="host")
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        grads = contract.make_grads(params, step)
        state = jopt.update_masks(tx, state, params, grads=grads)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    contract.assert_same(params, expected)
