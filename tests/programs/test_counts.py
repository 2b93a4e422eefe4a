"""Operations and bytes, against what can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jopt
from tests.programs import zoo

INT8 = jopt.QuantSpec(jopt.formats.int8)


def test_a_product_has_two_operations_per_term():
    params, x = {"w": jnp.ones((64, 32))}, jnp.ones((8, 64))
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    assert jopt.count_flops(apply, params, x) == {"w": 2 * 8 * 64 * 32}
    assert jopt.count_bytes(apply, params, x) == {"w": 4 * (8 * 64 + 64 * 32 + 8 * 32)}


def test_loops_count_every_step_where_xla_counts_one():
    layers, params = 5, {"w": jnp.ones((5, 16, 16))}

    def apply(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x = jnp.ones((4, 16))
    flops = jopt.count_flops(apply, params, x)["w"]
    assert flops == layers * 2 * 4 * 16 * 16
    analysis = jax.jit(apply).lower(params, x).compile().cost_analysis()
    assert analysis["flops"] < flops


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 4), (1, 2)])
def test_convolutions_agree_with_xla(stride, groups):
    params = {"w": jnp.ones((3, 3, 8 // groups, 8))}

    def apply(params, x):
        return lax.conv_general_dilated(
            x,
            params["w"],
            (stride, stride),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    x = jnp.ones((2, 9, 9, 8))
    analysis = jax.jit(apply).lower(params, x).compile().cost_analysis()
    assert jopt.count_flops(apply, params, x)["w"] == analysis["flops"]


def test_the_dearest_branch_counts_in_the_total():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}

    def apply(params, x, flag):
        twice = lambda: (x @ params["a"]) @ params["a"]  # noqa: E731
        return lax.cond(flag, twice, lambda: x @ params["b"])

    table = jopt.sites(apply, params, jnp.ones((4, 8)), True)
    one = 2 * 4 * 8 * 8
    assert table.flops == 2 * one
    counted = jopt.count_flops(apply, params, jnp.ones((4, 8)), True)
    assert counted == {"a": one, "a#1": one, "b": one}


def test_shapes_are_enough():
    model = zoo.ZOO["vit"]()
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (model.params, *model.inputs),
    )
    want = jopt.count_flops(model.apply, model.params, *model.inputs)
    assert jopt.count_flops(model.apply, *shapes) == want


def test_compressed_leaves_count_what_they_are_stored_in():
    params, x = {"w": jnp.ones((64, 32))}, jnp.ones((8, 64))
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    spec = jopt.QuantSpec(jopt.formats.int4, group_size=32)
    packed = jopt.quantize(params, spec, sites=jopt.sites(apply, params, x))
    spared = 4 * 64 * 32 - packed["w"].nbytes
    dense = jopt.count_bytes(apply, params, x)["w"]
    assert jopt.count_bytes(apply, packed, x)["w"] == dense - spared


def test_the_table_says_where_a_leaf_is_decompressed():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8)), "c": jnp.ones((1, 8))}

    def apply(params, x):
        x = x @ params["a"] + params["c"]
        return x @ (params["b"] * 2)

    x = jnp.ones((4, 8))
    packed = jopt.quantize(params, INT8, sites=jopt.sites(apply, params, x))
    table = jopt.sites(apply, packed, x)
    assert table.compressed == {"a": True, "b": False}
    assert "(weight, compressed)" in str(table)
    assert "(weight, decompressed before)" in str(table)
    assert jopt.sites(apply, params, x).compressed == {}
    np.testing.assert_allclose(
        jopt.execute(apply)(packed, x), apply(jopt.dequantize(packed), x), rtol=1e-6
    )
