"""An outline says in few words what the structure of a tree says in many."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt.trees import outline, structure

Q = jopt.quantize(jnp.ones((32, 2)), jopt.QuantSpec(jopt.formats.int4, group_size=32))


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": 1, "c": None}, "d": [1.5, (True, "list")], "e": {}, "f": []},
        {1: np.float32(2), "1": np.dtype("int8"), 2: b"x", 3: 1j},
        {"state": optax.adam(0.1).init({"w": jnp.ones(2)}), "f": jnp.tanh},
        {"q": Q, "more": [Q, {"q": Q}], "hole": optax.MaskedNode()},
        Q,
        jnp.ones(1),
        7,
    ],
)
def test_the_structure_comes_back(tree):
    node, leaves = structure.encode(tree)
    content, names = outline.write(node, leaves)
    content = json.loads(json.dumps(content))
    found, tensors = outline.read(content)
    assert found == json.loads(json.dumps(node))
    assert [tensor.name for tensor in tensors] == names
    assert [tensor.path for tensor in tensors] == [leaf.path for leaf in leaves]
    assert len(set(names)) == len(names)


def test_specs_are_written_once_and_arrays_in_few_bytes():
    tree = {f"layer_{i}": {"kernel": Q, "bias": jnp.ones(2)} for i in range(8)}
    node, leaves = structure.encode(tree)
    content, _ = outline.write(node, leaves)
    assert content["specs"] == [
        {
            "format": "int4",
            "axis": None,
            "group_size": 32,
            "symmetric": True,
            "scale_dtype": "bfloat16",
        }
    ]
    assert content["quantized"]["layer_0/kernel"] == {
        "spec": 0,
        "dtype": "float32",
        "packed_axis": -2,
        "packed_size": 32,
    }
    assert len(json.dumps(content)) < len(json.dumps(node)) / 5
