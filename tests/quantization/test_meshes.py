"""What moves scales and biases between layers gives on meshes what one device gives."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jopt

MESHES = pytest.mark.parametrize(
    ("kind", "is_set"),
    [(AxisType.Auto, False), (AxisType.Explicit, False), (AxisType.Explicit, True)],
)


def apply(params, x):
    """Two layers that equalization pairs, after a norm that smoothing folds into."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    x = (x - mean) * params["norm"][None]
    x = jax.nn.relu(x @ params["up"] + params["bias"][None])
    return x @ params["down"] + params["last"][None]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def params():
    return {
        "norm": np.exp(draw(16)),
        "up": draw(16, 32, seed=1) * np.exp(2 * draw(32, seed=2)),
        "bias": draw(32, seed=3),
        "down": draw(32, 8, seed=4),
        "last": draw(8, seed=5),
    }


def smooth(params, batches):
    return jopt.smooth(apply, params, batches, progress=False)[1]


def equalize(params, batches):
    return jopt.equalize(apply, params, batches[0])[0]


def correct_bias(params, batches):
    packed = jopt.quantize(params, jopt.QuantSpec(jopt.formats.int3))
    fixed, _ = jopt.correct_bias(apply, params, packed, batches, progress=False)
    return {name: fixed[name] for name in ("bias", "last")}


@pytest.fixture
def placed(kind, is_set, params):
    """Leaves split along outputs or inputs, batches along rows."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {"up": P(None, "model"), "bias": P("model")}
    if kind == AxisType.Auto:  # explicit meshes have no contraction of split axes
        specs["down"] = P("model")

    def place(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    params = {name: place(w, specs.get(name, P())) for name, w in params.items()}
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        yield params, [place(x, P("data")) for x in BATCHES]


BATCHES = [draw(8, 16, seed=6), draw(8, 16, seed=7)]


@MESHES
@pytest.mark.parametrize("method", [smooth, equalize, correct_bias])
def test_the_result_is_that_of_one_device_and_lies_where_leaves_lay(
    method, params, placed
):
    expected, treedef = jax.tree.flatten_with_path(method(params, BATCHES))
    found = method(*placed)
    assert jax.tree.structure(found) == treedef
    for (path, one), other in zip(expected, jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
        like = placed[0].get(path[-1].key)
        if like is not None:
            assert other.sharding.is_equivalent_to(like.sharding, other.ndim)


@MESHES
def test_what_is_scaled_at_run_time_runs_where_it_lies(params, placed):
    _, batches = placed
    smoothed, found = jopt.smooth(apply, *placed, fold=False, progress=False)
    assert set(found["input_scales"]) == {"up", "down"}
    got = jax.jit(smoothed)(found, batches[0])
    np.testing.assert_allclose(got, apply(params, BATCHES[0]), rtol=1e-3, atol=1e-4)
