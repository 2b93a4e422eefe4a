"""Layers that make up for what those before them did to their inputs, in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jopt
from tests.quantization.by_hand import all_codes, gptq_by_hand, round_by_hand

F = jopt.formats
INT3 = jopt.QuantSpec(F.int3)
METHODS = {"rtn": jopt.rtn, "gptq": jopt.gptq}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(name, apply, params, batches, spec=INT3, **options):
    return METHODS[name](apply, params, batches, spec, progress=False, **options)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def mlp(params, x):
    h = jnp.tanh(x @ params["a"])
    h = jnp.tanh(h @ params["b"])
    return h @ params["c"]


def mlp_params(seed=0):
    a, b, c = (draw(8, 8, seed=seed + i) for i in range(3))
    return {"a": a, "b": 0.4 * b, "c": c}


def corrected(w, x, floats, share):
    """W + share (X^T X + damping)^-1 X^T (X' - X) W, in float64."""
    w, x, floats = (a.astype(np.float64) for a in (w, x, floats))
    h = x.T @ x
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    return w + share * np.linalg.solve(h, x.T @ (floats - x)) @ w


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_mlp_is_corrected_as_by_hand(name, share):
    params = mlp_params()
    batches = [draw(40, 8, seed=3), draw(25, 8, seed=4)]
    spec = jopt.QuantSpec(F.int4, group_size=2)
    packed, report = run(name, mlp, params, iter(batches), spec, correction=share)
    x = floats = np.concatenate(batches)
    for key in "abc":
        w = corrected(params[key], x, floats, share)
        if name == "rtn":
            q = round_by_hand(w, all_codes(spec))[0]
        else:
            q = gptq_by_hand(w, x.T @ x, all_codes(spec))[0]
        close(packed[key].to_array(), q)
        lost = np.sum((x @ (w - q)) ** 2) / np.sum((x @ w) ** 2)
        np.testing.assert_allclose(report[key].error, lost, rtol=1e-3)
        x, floats = np.tanh(x @ q), np.tanh(floats @ params[key])


@pytest.mark.parametrize("name", METHODS)
def test_models_lose_less_on_inputs_that_they_have_not_seen(name):
    x, unseen, evaluate = draw(400, 8, seed=3), draw(400, 8, seed=4), jax.jit(mlp)
    lost = np.zeros(3)
    for seed in (0, 10, 20, 30):  # of one model rounding is a matter of luck
        params, first = mlp_params(seed), None
        right = evaluate(params, unseen)
        for i, share in enumerate((0.0, 0.5, 1.0)):
            packed, _ = run(name, mlp, params, [x], correction=share)
            y = evaluate(jopt.dequantize(packed), unseen)
            lost[i] += np.sum(np.square(np.asarray(y) - right))
            first = packed["a"].codes if first is None else first
            np.testing.assert_array_equal(packed["a"].codes, first)  # nothing before it
    assert lost[1] < 0.9 * lost[0]
    assert lost[2] < lost[1]


def stacked(params, x):
    def layer(h, one):
        return h + jnp.tanh(h @ one["q"]) @ one["out"], None

    x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
    return lax.cond(x[0, 0] > 1e9, lambda x: x, lambda x: x @ params["head"], x)


def unstacked(params, x):
    for one in params["blocks"]:
        x = x + jnp.tanh(x @ one["q"]) @ one["out"]
    return x @ params["head"]


def test_scans_remat_and_branches_are_corrected_as_a_python_loop():
    layers = {"q": 0.5 * draw(2, 8, 8), "out": 0.5 * draw(2, 8, 8, seed=2)}
    params = {"layers": layers, "head": draw(8, 8, seed=3)}
    split = [{k: v[i] for k, v in layers.items()} for i in range(2)]
    apart = {"blocks": split, "head": params["head"]}
    batches = [draw(20, 8, seed=4), draw(20, 8, seed=5)]
    packed, _ = run("gptq", stacked, params, batches, correction=0.7)
    other, _ = run("gptq", unstacked, apart, batches, correction=0.7)
    plain, _ = run("gptq", unstacked, apart, batches)
    floats, others = jopt.dequantize(packed), jopt.dequantize(other)
    for key in layers:
        for i in range(2):
            close(floats["layers"][key][i], others["blocks"][i][key])
    close(floats["head"], others["head"])
    assert np.any(others["head"] != plain["head"].to_array())


@pytest.mark.parametrize("method", [jopt.adaround, jopt.autoround])
def test_learned_rounding_starts_from_corrected_weights(method):
    params, x = mlp_params(), draw(64, 8, seed=3)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    lost, evaluate = [], jax.jit(mlp)
    right = np.asarray(evaluate(params, x))
    for share in (0.0, 1.0):
        options = {"num_steps": 20, "correction": share, "progress": False}
        packed, _ = method(mlp, half, [x], INT3, **options)
        y = np.asarray(evaluate(jopt.dequantize(packed), x), np.float32)
        lost.append(np.sum(np.square(y - right)))
        assert packed["b"].dtype == jnp.bfloat16
    assert lost[1] < 0.9 * lost[0]


def test_where_inputs_are_not_side_by_side_it_raises():
    def sorted_by_expert(params, x, sizes):
        return lax.ragged_dot(x, params["w"], sizes)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    def sharded(params, x):
        return x @ params["w"]

    batch = (draw(12, 6), jnp.array([5, 0, 7]))
    with pytest.raises(ValueError, match="'w', which is a ragged_dot"):
        run("gptq", sorted_by_expert, {"w": draw(3, 6, 4)}, [batch], correction=0.5)
    with pytest.raises(ValueError, match="'w', which is inside of a shard_map"):
        run("gptq", sharded, {"w": draw(6, 4)}, [draw(16, 6)], correction=0.5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_it_is_as_on_one_device(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType[kind],))
    params = {"a": draw(8, 8), "b": draw(8, 8, seed=1)}
    batches = [np.rint(3 * draw(24, 8, seed=i)) for i in (4, 5)]

    def apply(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    placed = jax.device_put(params, NamedSharding(mesh, P(None, None)))
    spread = jax.device_put(batches, NamedSharding(mesh, P("data")))
    packed, _ = run("gptq", apply, placed, spread, correction=0.5)
    alone, _ = run("gptq", apply, params, batches, correction=0.5)
    for key in params:
        close(packed[key].to_array(), alone[key].to_array())


def test_wrong_arguments_raise():
    params, x = mlp_params(), draw(20, 8, seed=3)
    for match, options in {
        r"correction must be in \[0, 1\], got 2": {"correction": 2},
        "error_propagation must be True for a correction": {
            "correction": 0.5,
            "error_propagation": False,
        },
    }.items():
        with pytest.raises(ValueError, match=match):
            run("gptq", mlp, params, [x], **options)
    with pytest.raises(ValueError, match="axis must keep a scale per output"):
        run("rtn", mlp, params, [x], jopt.QuantSpec(F.int4, axis=()), correction=0.5)
