"""Paths read the same in every framework."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

from jopt.arrays import formats, quantized
from jopt.trees import paths, rules

KEY = jax.random.key(0)
SEVENS = jnp.full((8, 2), 7.0)


class Pair(NamedTuple):
    value: object
    other: object


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])


class NnxBlock(NnxStack):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)


class EqxBlock(eqx.Module):
    layers: list[eqx.nn.Linear]
    value: jax.Array

    def __init__(self):
        self.layers = [eqx.nn.Linear(2, 2, use_bias=False, key=KEY) for _ in range(2)]
        self.value = jnp.ones(2)


LAYERS = [f"layers/{i}/{name}" for i in range(2) for name in ("bias", "kernel")]


def plain(leaf=0.0):
    return {"layers": [{"kernel": leaf, "bias": leaf} for _ in range(2)]}


@pytest.mark.parametrize(
    "tree",
    [
        plain(),
        FrozenDict(plain()),
        {"layers": {i: {"kernel": 0.0, "bias": 0.0} for i in range(2)}},
        {"layers": tuple(plain()["layers"])},
        nnx.state(NnxStack(nnx.Rngs(0))),
        nnx.to_pure_dict(nnx.state(NnxStack(nnx.Rngs(0)))),
        NnxStack(nnx.Rngs(0)),
    ],
    ids=["dict", "frozen", "numbers", "tuple", "state", "pure", "module"],
)
def test_paths_read_the_same(tree):
    assert sorted(paths.leaf_paths(tree)) == LAYERS


def test_nnx_module_and_state_read_alike():
    module = NnxBlock(nnx.Rngs(0))
    expected = [*LAYERS, "norm/bias", "norm/mean", "norm/scale", "norm/var"]
    assert paths.leaf_paths(module) == expected
    assert paths.leaf_paths(nnx.state(module)) == expected
    assert paths.leaf_paths(nnx.to_pure_dict(nnx.state(module))) == expected


def test_linen_variables_boxed_or_not():
    bare = nn.Dense(3).init(KEY, jnp.ones((1, 2)))
    init = nn.with_partitioning(nn.initializers.ones, (None, "x"))
    boxed = nn.Dense(3, kernel_init=init).init(KEY, jnp.ones((1, 2)))
    assert paths.leaf_paths(bare) == ["params/bias", "params/kernel"]
    assert paths.leaf_paths(boxed) == ["params/bias", "params/kernel"]


def test_equinox_attributes_keep_a_field_named_value():
    expected = ["layers/0/weight", "layers/1/weight", "value"]
    assert paths.leaf_paths(EqxBlock()) == expected


def test_named_tuples_read_by_field():
    assert paths.leaf_paths(Pair(1.0, (2.0,))) == ["value", "other/0"]
    assert paths.leaf_paths(Pair(1.0, None)) == ["value"]
    state = optax.adam(0.1).init({"w": jnp.ones(2)})
    assert paths.leaf_paths(state) == ["0/count", "0/mu/w", "0/nu/w"]


def test_holes_have_no_path():
    tree = {"a": None, "b": optax.MaskedNode(), "c": 1.0, "d": {}, "e": []}
    assert paths.leaf_paths(tree) == ["c"]
    assert paths.leaf_paths({}) == []
    assert paths.leaf_paths(1.0) == [""]


@pytest.mark.parametrize(
    "tree",
    [plain(), nnx.state(NnxBlock(nnx.Rngs(0))), EqxBlock(), Pair(1.0, [2.0])],
    ids=["dict", "nnx", "equinox", "namedtuple"],
)
def test_order_and_structure_are_those_of_jax(tree):
    pairs, treedef = paths.flatten_with_path(tree)
    assert [id(leaf) for _, leaf in pairs] == [id(x) for x in jax.tree.leaves(tree)]
    assert treedef == jax.tree.structure(tree)
    named = paths.map_with_path(lambda path, leaf: path, tree)
    assert jax.tree.structure(named) == treedef
    assert jax.tree.leaves(named) == paths.leaf_paths(tree)


def test_a_quantized_array_is_one_leaf():
    spec = quantized.QuantSpec(formats.int4)
    tree = {"a": {"kernel": quantized.quantize_array(SEVENS, spec)}, "b": 1.0}
    assert paths.leaf_paths(tree) == ["a/kernel", "b"]
    back = paths.map_with_path(lambda path, leaf: quantized.dequantize(leaf), tree)
    assert jnp.array_equal(back["a"]["kernel"], SEVENS)
    assert rules.select_leaves(None, tree) == [False, False]


def test_map_with_path_maps_several_trees():
    masks = {"w": True, "b": optax.MaskedNode()}
    out = paths.map_with_path(
        lambda path, x, mask: (path, x, mask), {"w": 1, "b": 2}, masks
    )
    assert out == {"w": ("w", 1, True), "b": ("b", 2, optax.MaskedNode())}


def test_fold_path_is_the_same_in_every_process():
    data = jax.random.key_data(paths.fold_path(jax.random.key(7), "block/kernel"))
    assert data.tolist() == [2198445331, 3745140552]
    folded = jax.jit(lambda key: paths.fold_path(key, "block/kernel"))
    assert jnp.array_equal(jax.random.key_data(folded(jax.random.key(7))), data)
