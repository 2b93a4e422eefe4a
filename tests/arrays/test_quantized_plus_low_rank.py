"""Codes plus thin matrices: the numbers they stand for, whatever is done to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jopt
from jopt.arrays.quantized import quantize_array
from jopt.arrays.quantized_plus_low_rank import QuantizedPlusLowRank

RNG = np.random.default_rng(3)
INT4 = jopt.QuantSpec(jopt.formats.int4)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def make(*lead, rank=2, dtype=jnp.float32):
    """Matrices [16, 32], with leading axes."""
    w = draw(*lead, 16, 32).astype(dtype)
    spec = jopt.QuantSpec(jopt.formats.int4, axis=(*range(len(lead)), -1))
    return QuantizedPlusLowRank(
        quantize_array(w, spec),
        draw(*lead, 16, rank).astype(jnp.bfloat16),
        draw(*lead, rank, 32).astype(jnp.bfloat16),
        (-2,),
        (-1,),
    )


def by_numpy(w):
    wide = dataclasses.replace(w.residual, dtype=jnp.dtype("float32")).to_array()
    parts = (np.asarray(x, np.float64) for x in (w.lora_a, w.lora_b))
    return np.asarray(wide, np.float64) + np.matmul(*parts)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_the_numbers_are_those_of_numpy(lead):
    w = make(*lead)
    assert w.shape == (*lead, 16, 32) and w.rank == 2
    np.testing.assert_allclose(w.to_array(), by_numpy(w), atol=1e-5)
    bits = 4 + 16 * (2 * (16 + 32) + 32) / (16 * 32)
    assert w.bits_per_weight == pytest.approx(bits)
    assert "rank=2" in repr(w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_halves_are_rounded_once(dtype):
    w = make(dtype=dtype)
    assert w.to_array().dtype == w.dtype == dtype
    exact = by_numpy(w).astype(dtype)
    np.testing.assert_array_equal(w.to_array(), exact)


VIEWS = {
    "cast": lambda w, i: w.astype(jnp.bfloat16),
    "layer": lambda w, i: w[1],
    "traced layer": lambda w, i: w[i],
    "layers": lambda w, i: w[1:3],
    "every layer": lambda w, i: list(w)[2],
    "transposed": lambda w, i: jnp.swapaxes(w, 1, 2),
    "columns": lambda w, i: w[:, :, 4:8],
    "rows": lambda w, i: w[:, 4:8],
    "merged": lambda w, i: w.reshape(-1, 32),
}
KEPT = {"cast", "layer", "traced layer", "layers", "every layer", "transposed"}


@pytest.mark.parametrize("name", VIEWS)
def test_views_have_the_very_numbers(name):
    """Nothing but what is listed stays in few bits, and all of it is right."""
    w = make(3)
    kinds = []

    def look(use):
        kinds.append(type(use.weight).__name__)
        return use.run()

    def apply(params, x, i):
        v = VIEWS[name](params["w"], i)
        return jnp.matmul(x.astype(v.dtype)[: v.shape[-1]].T, jnp.swapaxes(v, -1, -2))

    x = draw(32, 2)
    want = jax.jit(apply)({"w": w.to_array()}, x, 2)
    got = jopt.rewrite(apply, jopt.Handler(look))({"w": w}, x, 2)
    np.testing.assert_array_equal(getattr(got, "result", got), want)
    assert (kinds[0] == "QuantizedPlusLowRank") == (name in KEPT)


def test_scan_and_vmap_take_layers():
    w, x = make(3), draw(4, 16)
    dense = w.to_array()
    _, each = jax.lax.scan(lambda _, layer: (None, x @ layer.to_array()), None, w)
    np.testing.assert_allclose(each, x[None] @ dense, atol=1e-5)
    mapped = jax.vmap(lambda layer: x @ layer.to_array())(w)
    np.testing.assert_allclose(mapped, x[None] @ dense, atol=1e-5)


@pytest.mark.parametrize("split", ["inputs", "outputs", "gathered", "gathered columns"])
def test_devices_get_their_shards_in_few_bits(split, auto_mesh):
    """A whole array in a shard_map is split as its floats would be."""
    spec = P("data", None) if split in ("inputs", "gathered") else P(None, "data")
    axis = 0 if split == "gathered" else 1

    def apply(params, x):
        w = params["w"]
        if split.startswith("gathered"):
            return x @ jax.lax.all_gather(w, "data", axis=axis, tiled=True)
        y = x @ w
        return jax.lax.psum(y, "data") if split == "inputs" else y

    run = jax.shard_map(
        apply,
        mesh=auto_mesh,
        in_specs=(
            {"w": spec},
            P(None, "data") if split == "inputs" else P(*["data"] * (split[0] == "g")),
        ),
        out_specs={"inputs": P(), "outputs": P(None, "data")}.get(split, P("data")),
    )
    w, x = make(), draw(8, 16)
    want = run({"w": w.to_array()}, x)
    fast = jax.jit(jopt.execute(run))
    np.testing.assert_allclose(fast({"w": w}, x), want, atol=1e-4)
    text = fast.lower({"w": w}, x).as_text()
    # Codes are packed along the inputs, whose halves of bytes no device can have.
    is_split = split not in ("inputs", "gathered")
    assert (text.count("stablehlo.dot_general") == 3) == is_split
    if split == "gathered columns":
        gathers = [line for line in text.splitlines() if "all_gather" in line]
        assert any("xui8>" in line or "xi8>" in line for line in gathers)
        assert not any("16x32xf32>" in line for line in gathers)


def test_leaves_of_a_tree_are_decoded():
    w = make()
    tree = jopt.dequantize({"w": w, "b": 1})
    np.testing.assert_array_equal(tree["w"], w.to_array())
    assert tree["b"] == 1
    same = functools.reduce(lambda v, _: jax.tree.map(lambda x: x, v), range(2), w)
    assert same.inputs == w.inputs and same.outputs == w.outputs
