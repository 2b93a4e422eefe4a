"""Trees come back from JSON as they were, or not at all."""

import collections
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.trees import structure

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def through_json(tree):
    node, leaves = structure.encode(tree)
    values = [leaf.value for leaf in leaves]
    return structure.decode(json.loads(json.dumps(node)), values)


def typed(tree):
    """Compare types too: 1 == True == 1.0 is not enough."""
    if isinstance(tree, dict):
        return [(key, typed(value)) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return type(tree), [typed(value) for value in tree]
    if isinstance(tree, float):
        return float, tree.hex()
    return type(tree), tree


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES)
def test_plain_trees_come_back_with_their_types(tree):
    assert typed(through_json(tree)) == typed(tree)


def test_special_floats():
    nan, inf = through_json([math.nan, -math.inf])
    assert math.isnan(nan) and inf == -math.inf


@pytest.mark.parametrize(
    "value",
    [np.float32(0.1), np.int64(2**60), np.bool_(True), ml_dtypes.bfloat16(0.5)],
)
def test_numpy_scalars(value):
    restored = through_json({"x": value})["x"]
    assert type(restored) is type(value) and restored == value


def test_leaves_are_named_as_everywhere():
    state = optax.adam(0.1).init({"w": jnp.ones(2)})
    _, leaves = structure.encode({"opt": state, "data": (np.ones(1),)})
    assert [leaf.path for leaf in leaves] == [
        "opt/0/count",
        "opt/0/mu/w",
        "opt/0/nu/w",
        "data/0",
    ]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": object()}, "got object at 'a'"),
        ({"a": {1.5: 2}}, "str or int dict keys, got 1.5 at 'a'"),
        ({"a": np.array(["text"])}, "at 'a'"),
        ({"a": np.array([object()])}, "at 'a'"),
        ({"a": np.zeros(2, ">f4")}, "at 'a'"),
        ({"a": np.ma.masked_array([1, 2], [True, False])}, "got MaskedArray at 'a'"),
        ({"a": {1, 2}}, "got set at 'a'"),
    ],
)
def test_what_cannot_be_saved_raises(tree, message):
    with pytest.raises(TypeError, match=message):
        structure.encode(tree)


def test_tracers_raise():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(structure.encode)(jnp.ones(2))


def test_custom_nodes_need_a_template():
    ordered = collections.OrderedDict(b=jnp.ones(1), a=[2.0])
    node, leaves = structure.encode({"x": ordered})
    assert structure.needs_like(node) == "the OrderedDict at 'x'"
    restored = structure.decode(node, [leaves[0].value], like={"x": ordered})
    assert restored == {"x": ordered}
    assert structure.needs_like(structure.encode([optax.MaskedNode()])[0]) is None


def test_functions_come_from_the_template():
    node, _ = structure.encode({"f": jax.nn.relu, "n": 1})
    assert structure.needs_like(node) == "the function relu at 'f'"
    restored = structure.decode(node, [], like={"f": jax.nn.gelu, "n": 2})
    assert restored == {"f": jax.nn.gelu, "n": 1}


def match(saved, like):
    return structure.match_like(*structure.encode(saved), *structure.encode(like))


def test_templates_match_in_any_key_order():
    saved = {"a": np.ones(1), "b": jnp.ones(2)}
    matched = match(saved, {"b": jnp.zeros(2), "a": np.zeros(1)})
    assert [leaf.path for leaf in matched] == ["a", "b"]


ADAM = optax.adam(0.1).init({"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("saved", "like", "message"),
    [
        (
            {"a": np.ones(2)},
            {"a": np.ones(3)},
            r"'a': saved float64\[2\], got float64\[3",
        ),
        ({"a": np.ones(2)}, {"a": np.ones(2, "f")}, r"saved float64\[2\], got float32"),
        ({"a": jnp.ones(2)}, {"a": jnp.ones(2, jnp.bfloat16)}, r"got bfloat16\[2\]"),
        ({"a": [1, 2]}, {"a": (1, 2)}, "'a': saved a list, got a tuple"),
        ({"a": [1, 2]}, {"a": [1]}, r"keys at 'a': it lacks \['1'\] and adds \[\]"),
        ({"a": {"b": 1}}, {"a": {"c": 1}}, r"lacks \['b'\] and adds \['c'\]"),
        ({"a": 1}, {"a": jnp.ones(())}, r"saved 1, got float32\[\]"),
        ({"a": None}, {"a": jnp.ones(2)}, r"saved None, got float32\[2\]"),
        ({"a": 1}, {"a": None}, "saved 1, got None"),
        ({"a": 1}, {"a": optax.MaskedNode()}, "saved 1, got a MaskedNode"),
        (ADAM, optax.sgd(0.1).init(jnp.ones(2)), "saved a ScaleByAdamState"),
        (ADAM, optax.adam(0.1).init({"w": jnp.ones(3)}), "'0/mu/w': saved float32"),
        (
            {"k": jax.random.key(0)},
            {"k": jax.random.key(0, impl="rbg")},
            r"saved key<fry>\[\], got key<rbg>\[\]",
        ),
    ],
)
def test_templates_that_do_not_fit_raise(saved, like, message):
    with pytest.raises(ValueError, match=message) as error:
        match(saved, like)
    assert "\n" not in str(error.value)


def test_templates_may_be_abstract_and_hold_other_numbers():
    like = {"step": 0.5, "w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert len(match({"w": jnp.ones(2), "step": 7}, like)) == 1
