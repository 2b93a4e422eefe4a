"""How latents land on the grid: chance, annealing, freezing, damping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import contract

F = jopt.formats
INT3 = jopt.QuantSpec(F.int3, scale_dtype=jnp.float32)
TERNARY = jopt.QuantSpec(F.ternary, axis=(), scale_dtype=jnp.float32)
RNG = np.random.default_rng(0)


def land(spec, latent, **options):
    """Return params after one step of size zero."""
    tx = jopt.quantize_weights(optax.sgd(0.0), spec, **options)
    params = {"w": jnp.asarray(latent)}
    updates, state = tx.update({"w": 0 * params["w"]}, tx.init(params), params)
    return np.asarray(optax.apply_updates(params, updates)["w"]), state


def levels_of(spec, scale):
    """All points of a grid, in float64."""
    table = {
        "int3": np.arange(-3.0 - (not spec.is_narrow), 4.0),
        "ternary": np.arange(-1.0, 2.0),
        "fp4_e2m1": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        "nf4": np.array(F.nf4.values),
    }[spec.format.name]
    if spec.format is F.fp4_e2m1:
        table = np.unique(np.concatenate([-table, table]))
    return np.sort(table * float(np.asarray(scale, np.float32)))


def parq_in_numpy(u, q, s):
    """Flat at the levels, of slope 1/s around the middles between them."""
    i = np.clip(np.searchsorted(q, u), 1, len(q) - 1)
    below, above = q[i - 1], q[i]
    outside = (u < q[0]) | (u > q[-1])
    below = np.where(outside, np.where(u < q[0], q[0], q[-1]), below)
    above = np.where(outside, below, above)
    middle = (below + above) / 2
    return np.clip(middle + (u - middle) / s, below, above)


ONE_SCALE = [
    jopt.QuantSpec(F.int3, axis=(), scale_dtype=jnp.float32),
    TERNARY,
    jopt.QuantSpec(F.fp4_e2m1, axis=()),
    jopt.QuantSpec(F.nf4, axis=()),
    jopt.QuantSpec(F.int3, axis=(), scale_dtype=jnp.float32, narrow_range=False),
]


@pytest.mark.parametrize("softness", [1.0, 0.7, 0.2, 0.01])
@pytest.mark.parametrize("spec", ONE_SCALE, ids=repr)
def test_parq_is_the_map_of_the_paper(spec, softness):
    u = RNG.normal(size=(32, 8)).astype(np.float32)
    # Of a full range the scale is below zero where the largest magnitude is above.
    u[0, 0] = 4.0 if softness > 0.5 else -4.0
    got, state = land(spec, u, projection=jopt.projections.parq(softness))
    scale = jopt.get_scales(state)["w"].scale.astype(jnp.float32).item()
    want = parq_in_numpy(u.astype(np.float64), levels_of(spec, scale), softness)
    np.testing.assert_allclose(got, want, atol=3e-6 / softness)


@pytest.mark.parametrize("softness", [1.0, 0.7, 0.2])
@pytest.mark.parametrize("spec", ONE_SCALE[:2], ids=repr)
def test_binary_relax_mixes_latent_and_level(spec, softness):
    u = RNG.normal(size=(32, 8)).astype(np.float32)
    projection = jopt.projections.binary_relax(softness)
    got, state = land(spec, u, projection=projection)
    q = levels_of(spec, jopt.get_scales(state)["w"].scale.item())
    nearest = q[np.argmin(np.abs(u[..., None] - q), -1)]
    if softness == 1:
        np.testing.assert_allclose(got, u, rtol=1e-6)
    else:
        weight = 1 / softness - 1  # lambda of the paper
        want = (u + weight * nearest) / (1 + weight)
        np.testing.assert_allclose(got, want, atol=1e-6)


SOFT = {
    "parq": jopt.projections.parq,
    "binary_relax": jopt.projections.binary_relax,
}


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("spec", [contract.INT8, contract.INT4, TERNARY], ids=repr)
def test_params_end_on_the_grid_exactly(name, spec):
    softness = jopt.schedules.sigmoid_softness(begin_step=1, end_step=4)
    tx = jopt.quantize_weights(optax.adam(1e-2), spec, projection=SOFT[name](softness))
    params, update = contract.make_params(), jax.jit(tx.update)
    state = tx.init(params)
    for step in range(7):
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
        packed = jopt.quantize(params, spec, scales=jopt.get_scales(state))
        kernel = params["dense"]["kernel"]
        is_on_grid = bool(jnp.all(jopt.dequantize(packed)["dense"]["kernel"] == kernel))
        assert is_on_grid == (step > 4) or step == 4, step  # landing takes a step
        if step <= 1:
            latent = state.latent["dense"]["kernel"]
            if spec.format is not F.ternary:  # which clips what is beyond its scale
                # A bfloat16 scale clips the largest by up to 2^-8.
                np.testing.assert_allclose(kernel, latent, rtol=4e-3, atol=1e-5)


def test_a_projection_of_my_own_sees_latent_grid_and_count():
    seen = []

    def half_way(latent, grid, count):
        seen.append((latent.shape, grid.spec.format, count.shape))
        return (latent + grid.snap(latent)) / 2

    u = RNG.normal(size=(8, 4)).astype(np.float32)
    got, _ = land(INT3, u, projection=half_way)
    want, _ = land(INT3, u)
    np.testing.assert_allclose(got, (u + want) / 2, rtol=1e-6)
    assert seen[0] == ((8, 4), F.int3, ())
    with pytest.raises(TypeError, match="projection must be one of"):
        jopt.quantize_weights(optax.sgd(0.1), INT3, projection="parq")
    with pytest.raises(ValueError, match="projection must land on the nearest"):
        jopt.quantize_weights(
            optax.sgd(0.1), INT3, projection=half_way, scales="learned"
        )
    with pytest.raises(ValueError, match="softness must be in"):
        jopt.projections.parq(2.0)


# Stochastic rounding


def test_stochastic_rounding_is_right_on_average_and_moves_to_neighbours():
    u = RNG.normal(size=(16, 4)).astype(np.float32)
    spec = jopt.QuantSpec(F.int3, scale_dtype=jnp.float32)
    tx = jopt.quantize_weights(
        optax.sgd(0.0), spec, rounding=jopt.rounding.stochastic, key=jax.random.key(0)
    )
    params = {"w": jnp.asarray(u)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update({"w": 0 * params["w"]}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["w"]

    (_, state), draws = jax.lax.scan(step, (params, tx.init(params)), None, 4000)
    draws, scale = np.asarray(draws, np.float64), jopt.get_scales(state)["w"].scale
    deviation = draws.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - u) < 5 * deviation + 1e-5)
    assert np.abs(draws[1:] - u).max() < np.max(scale) * 1.001
    assert {len(np.unique(draws[1:, i, 0].round(4))) for i in range(16)} <= {1, 2}


def test_random_numbers_of_a_leaf_depend_on_its_path_alone():
    u = RNG.normal(size=(16, 4)).astype(np.float32)

    def draw(tree):
        tx = jopt.quantize_weights(
            optax.sgd(0.0),
            INT3,
            rounding=jopt.rounding.stochastic,
            key=jax.random.key(0),
        )
        params = jax.tree.map(jnp.asarray, tree)
        state, found = tx.init(params), []
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
            found.append(params)
        return found

    alone, both = draw({"a": u}), draw({"a": u, "b": u})
    np.testing.assert_array_equal(alone[1]["a"], both[1]["a"])
    assert np.any(both[1]["a"] != both[1]["b"])
    assert np.any(alone[0]["a"] != alone[1]["a"])


def test_stochastic_rounding_needs_a_key_and_no_learned_scales():
    stochastic = jopt.rounding.stochastic
    with pytest.raises(ValueError, match="key must be a PRNG key"):
        jopt.quantize_weights(optax.sgd(0.1), INT3, rounding=stochastic)
    with pytest.raises(ValueError, match="rounding must be None"):
        jopt.quantize_weights(
            optax.sgd(0.1),
            INT3,
            rounding=stochastic,
            key=jax.random.key(0),
            scales="learned",
        )


# Oscillations


def frequencies_in_numpy(latents, scale, momentum, thresholds):
    """Algorithm 1 of Nagel et al., weight by weight."""
    size = latents.shape[1]
    f, average = np.zeros(size), np.zeros(size)
    frozen, last = np.full(size, np.nan), np.zeros(size)
    before, history = None, []
    for w, limit in zip(latents, thresholds, strict=True):
        x = np.clip(np.round(w / scale), -3, 3)
        x = np.where(np.isnan(frozen), x, frozen)
        if before is None:
            average = x.copy()
        else:
            moved = x != before
            direction = np.sign(x - before)
            o = moved & (direction != last) & (last != 0)
            f = momentum * o + (1 - momentum) * f
            last = np.where(moved, direction, last)
            average = momentum * x + (1 - momentum) * average
        freezes = np.isnan(frozen) & (f > limit)
        frozen = np.where(freezes, np.round(average), frozen)
        before = np.where(freezes, frozen, x)
        history.append((before.copy(), f.copy(), ~np.isnan(frozen)))
    return history


def test_frequencies_and_freezing_follow_the_algorithm():
    """Latents walk where we send them; frozen ones stay."""
    rng = np.random.default_rng(3)
    steps, size, momentum = 40, 24, 0.2
    scale = 1.0  # the static range is that of the first latents: 3 at the largest
    start = rng.uniform(-2.5, 2.5, size)
    start[0] = 3.0
    walk = start + 0.6 * rng.choice([-1, 1], (steps, size)) * rng.random((steps, size))
    thresholds = np.linspace(0.8, 0.45, steps)
    limits = jnp.asarray(thresholds, jnp.float32)
    tx = jopt.quantize_weights(
        optax.sgd(1.0),
        jopt.QuantSpec(F.int3, axis=()),
        scales="static",
        projection=jopt.projections.freeze_oscillations(
            lambda count: limits[count], momentum=momentum
        ),
    )
    params = {"w": jnp.asarray(start, jnp.float32)[None]}
    state, update = tx.init(params), jax.jit(tx.update)
    targets, seen = [], []
    for step in range(steps):
        target = np.clip(walk[step], -3.4, 3.4).astype(np.float32)
        grads = {"w": state.latent["w"] - target[None]}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        targets.append(target)
        memory = state.projection_state.memory
        frozen = np.asarray(memory.frozen["w"][0]) != np.iinfo(np.int16).min
        frequency = np.asarray(memory.frequency["w"][0])
        seen.append((np.asarray(params["w"][0]), frequency, frozen))
        held = np.asarray(state.latent["w"][0])[frozen]
        np.testing.assert_array_equal(held, np.asarray(params["w"][0])[frozen])
    history = frequencies_in_numpy(np.array(targets), scale, momentum, thresholds)
    for (level, f, frozen), (w, frequency, is_frozen) in zip(
        history, seen, strict=True
    ):
        np.testing.assert_array_equal(w, level)
        np.testing.assert_allclose(np.maximum(frequency, 0), f, atol=1e-6)
        np.testing.assert_array_equal(is_frozen, frozen)
    assert 3 < history[-1][2].sum() < size


def ramp(inner):
    schedule = jopt.schedules.cubic_sparsity(0.0, 0.7, begin_step=2, end_step=8)
    return jopt.prune(inner, sparsity=schedule, every_steps=2)


def moving(inner):
    return jopt.rigl(inner, sparsity=0.5, drop_fraction=0.3, every_steps=3)


INT4 = jopt.QuantSpec(F.int4)
OFTEN = jopt.projections.freeze_oscillations(0.02, momentum=0.2)
FROZEN = {
    "oscillating": lambda inner: jopt.quantize_weights(inner, INT4, projection=OFTEN),
    "largest": lambda inner: jopt.quantize_weights(
        jopt.freeze(inner, fraction=0.5), INT4, scales="static"
    ),
    "whole leaves": lambda inner: jopt.quantize_weights(
        jopt.freeze(inner, from_step=4), INT4
    ),
    "floats": lambda inner: jopt.freeze(inner, fraction=0.5),
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("sparse", [ramp, moving])
def test_what_is_pruned_is_zero_frozen_or_not(name, sparse):
    """Masks that grow, and masks that move, after weights froze at other levels."""
    tx = FROZEN[name](sparse(optax.adamw(0.05)))
    params = {"w": jnp.asarray(RNG.normal(size=(32, 16)), jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(12):
        grads = np.random.default_rng(step).normal(size=(32, 16))
        updates, state = update({"w": jnp.asarray(grads, jnp.float32)}, state, params)
        before, params = params, optax.apply_updates(params, updates)
        mask = jopt.get_masks(state)["w"]
        assert not np.any(np.asarray(params["w"])[~mask]), step
    held = np.asarray(mask & (params["w"] == before["w"]) & (params["w"] != 0))
    assert held.mean() > 0.05  # the others still are frozen


def test_freezing_needs_levels_that_can_be_averaged():
    with pytest.raises(ValueError, match="integer format for 'w'"):
        land(
            jopt.QuantSpec(F.fp4_e2m1),
            np.ones((4, 4), np.float32),
            projection=jopt.projections.freeze_oscillations(0.1),
        )
    with pytest.raises(ValueError, match="momentum must be"):
        jopt.projections.freeze_oscillations(0.1, momentum=0.0)


def test_damping_is_the_gradient_of_the_squared_distance_to_the_level():
    """Equation 6: clipped latents against their levels, which are held constant."""
    rng = np.random.default_rng(4)
    start = rng.normal(size=(16, 2)).astype(np.float32)
    strength = optax.linear_schedule(0.0, 0.5, 4)
    tx = jopt.quantize_weights(optax.sgd(1.0), INT3, scales="static", damping=strength)
    params = {"w": jnp.asarray(start)}
    state = tx.init(params)
    scale = np.abs(start.astype(np.float64)).max(0) / 3
    latent = start.astype(np.float64)
    for step in range(4):
        g = 0.3 * rng.normal(size=start.shape)
        level = scale * np.clip(np.round(latent / scale), -3, 3)
        inside = np.abs(latent / scale) <= 3.5
        pull = 2 * 0.125 * step * (np.clip(latent, -3 * scale, 3 * scale) - level)
        latent = latent - (g * (inside if step else 1) + (pull if step else 0))
        updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(state.latent["w"], latent, atol=1e-5)


# Freezing


def test_growing_portions_freeze_the_largest_and_never_move_again():
    portions = optax.piecewise_constant_schedule(0.25, {2: 2.0, 4: 1.5})
    tx = jopt.quantize_weights(
        jopt.freeze(optax.adam(1e-2), fraction=portions),
        contract.INT8,
        scales="static",
    )
    params, update = contract.make_params(), jax.jit(tx.update)
    state, before, frozen = tx.init(params), None, None
    size = np.abs(np.asarray(params["dense"]["kernel"]))
    for step in range(8):
        updates, state = update(contract.make_grads(params, step), state, params)
        new = optax.apply_updates(params, updates)
        w = np.asarray(new["dense"]["kernel"])
        now = jopt.unpack_mask(state.inner_state.frozen["dense"]["kernel"])
        assert int(now.sum()) == [32, 32, 64, 64, 96, 96, 96, 96][min(step, 7)] or (
            int(now.sum()) == round(float(portions(step)) * 128)
        )
        if step == 0:
            assert size[np.asarray(now)].min() >= size[~np.asarray(now)].max()
        else:
            assert bool(jnp.all(now | ~frozen))
        if step > 1:  # the first landing may miss by an ulp
            np.testing.assert_array_equal(
                w[np.asarray(frozen)], before[np.asarray(frozen)]
            )
            assert np.any(w[~np.asarray(now)] != before[~np.asarray(now)]) or step > 5
        params, before, frozen = new, w, now
    packed = jopt.quantize(params, contract.INT8, scales=jopt.get_scales(state))
    contract.assert_same(jopt.dequantize(packed), params)


@pytest.mark.parametrize("scales", ["current", "static"])
def test_layers_freeze_at_their_step(scales):
    inner = jopt.freeze(optax.adam(1e-2), from_step={"dense/.*": 2, "head/.*": 4})
    tx = jopt.quantize_weights(inner, contract.INT4, scales=scales)
    params, update = contract.make_params(), jax.jit(tx.update)
    state, seen = tx.init(params), []
    for step in range(7):
        updates, state = update(contract.make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    for path, begin in (("dense", 2), ("head", 4)):
        assert jnp.any(
            seen[begin - 2][path]["kernel"] != seen[begin - 1][path]["kernel"]
        )
        for later in seen[begin:]:
            np.testing.assert_array_equal(
                later[path]["kernel"], seen[begin][path]["kernel"]
            )
    assert jnp.any(seen[5]["dense"]["bias"] != seen[6]["dense"]["bias"])


def test_each_stacked_layer_has_a_portion_of_its_own():
    w = jnp.stack([jnp.arange(1.0, 9.0).reshape(2, 4), jnp.ones((2, 4)) * 100])
    tx = jopt.freeze(optax.sgd(1.0), fraction=0.5, stacked_axes=0)
    updates, _ = tx.update({"w": 0 * w + 1}, tx.init({"w": w}), {"w": w})
    np.testing.assert_array_equal((updates["w"] == 0).sum((1, 2)), [4, 4])


def test_what_cannot_be_frozen_raises():
    with pytest.raises(ValueError, match="from_step or fraction, and not both"):
        jopt.freeze(optax.sgd(0.1))
    with pytest.raises(ValueError, match="fraction must be in"):
        jopt.freeze(optax.sgd(0.1), fraction=1.5)
    with pytest.raises(ValueError, match="from_step must be"):
        jopt.freeze(optax.sgd(0.1), from_step=-1)
    part = jopt.freeze(optax.sgd(0.1), fraction=0.5)
    for scales in ("current", "moving", "learned"):
        tx = jopt.quantize_weights(part, contract.INT8, scales=scales)
        with pytest.raises(ValueError, match="scales must be 'static'"):
            tx.init(contract.make_params())
