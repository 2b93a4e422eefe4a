"""Rules resolve in order and never miss in silence."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.trees import paths, rules

PARAMS = {
    "block_0": {"attn": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
    "layers": jnp.ones((4, 2, 2)),
    "norms": jnp.ones((4, 2)),
    "steps": jnp.ones((2, 2), jnp.int32),
}
PATHS = ["block_0/attn/bias", "block_0/attn/kernel", "layers", "norms", "steps"]


def chosen(select, **kwargs):
    flags = rules.select_leaves(select, PARAMS, **kwargs)
    return [path for path, flag in zip(PATHS, flags, strict=True) if flag]


def test_first_match_wins_and_default_fills():
    ordered = [(".*/kernel", 4), ("block_0/.*", 8)]
    assert rules.resolve(ordered, PARAMS) == [8, 4, None, None, None]
    assert rules.resolve(dict(reversed(ordered)), PARAMS, default=0) == [8, 8, 0, 0, 0]


def test_pattern_matches_the_whole_path():
    with pytest.raises(
        ValueError,
        match=r"'block_0/attn/kernel'; .* whole paths, so try '\.\*kernel\.\*'",
    ):
        rules.resolve({"kernel": 4}, PARAMS)


def test_unmatched_pattern_lists_near_names():
    with pytest.raises(ValueError, match=r"'block_0/atn/kernel'.*near.*attn/kernel"):
        rules.resolve({"block_0/atn/kernel": 4, "layers": 8}, PARAMS)
    with pytest.raises(ValueError, match="regular expressions, got '\\[a' "):
        rules.resolve({"[a": 4}, PARAMS)


@pytest.mark.parametrize("tree", [{}, [], None, optax.MaskedNode()])
def test_a_tree_without_leaves_raises_nothing(tree):
    assert rules.resolve({"typo": 4}, tree) == []
    assert rules.select_leaves(rules.matching("typo"), tree) == []
    assert rules.stacked_axis_of({"typo": 0}, tree) == []


def test_default_selection_is_float_matrices():
    assert chosen(None) == ["block_0/attn/kernel", "layers", "norms"]
    stacked = {"layers": 0, "norms": 0}
    assert chosen(None, stacked_axes=stacked) == ["block_0/attn/kernel", "layers"]


def test_default_selection_passes_over_what_is_no_array():
    mlp = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    flags = rules.select_leaves(None, mlp)
    names = [p for p, f in zip(paths.leaf_paths(mlp), flags, strict=True) if f]
    assert names == ["layers/0/weight", "layers/1/weight"]
    assert (
        rules.select_leaves(None, {"k": jax.random.key(0), "s": "text"}) == [False] * 2
    )


def test_predicates():
    assert chosen(lambda path, leaf: leaf.ndim == 1) == ["block_0/attn/bias"]
    assert chosen(rules.matching(".*/bias", "layers")) == PATHS[:1] + ["layers"]
    with pytest.raises(ValueError, match="near names: 'layers'"):
        chosen(rules.matching("layer"))
    with pytest.raises(ValueError, match="stacked_axes must be an axis of some leaf"):
        rules.stacked_axis_of(5, {"layers": np.ones((2, 3))})
    with pytest.raises(ValueError, match="at least one pattern"):
        rules.matching()


def test_selecting_what_is_no_float_raises():
    with pytest.raises(ValueError, match=r"float arrays, got int32\[2, 2\] at 'steps'"):
        chosen(lambda path, leaf: True)


def test_trees_of_bools_and_prefixes():
    full = paths.map_with_path(lambda path, leaf: path == "norms", PARAMS)
    assert chosen(full) == ["norms"]
    prefix = {"block_0": True, "layers": False, "norms": np.True_, "steps": False}
    assert chosen(prefix) == PATHS[:2] + ["norms"]
    assert chosen(False) == []
    with pytest.raises(ValueError, match="shaped as params"):
        chosen({"block_0": True})
    with pytest.raises(TypeError, match="tree of bools, got ArrayImpl"):
        chosen({**prefix, "norms": jnp.ones(3)})


def test_callable_module_of_bools_is_a_tree():
    mlp = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    flags = jax.tree.map(lambda leaf: leaf.ndim == 2, mlp)
    assert rules.select_leaves(flags, mlp) == [True, False, True, False]


def test_stacked_axes():
    assert rules.stacked_axis_of(None, PARAMS) == [None] * 5
    assert rules.stacked_axis_of(-1, PARAMS) == [0, 1, 2, 1, 1]
    assert rules.stacked_axis_of(2, PARAMS) == [None, None, 2, None, None]
    found = rules.stacked_axis_of({"layers": -3, ".*": None}, PARAMS)
    assert found == [None, None, 0, None, None]
    with pytest.raises(ValueError, match=r"axis of 'norms', got axis 2 for float32\[4"):
        rules.stacked_axis_of({"norms": 2}, PARAMS)


NAMES = st.text("ab.[(/", min_size=1, max_size=4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, st.integers(), max_size=4), NAMES)
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_an_error_is_always_a_sentence(tree, pattern):
    try:
        values = rules.resolve({pattern: 1}, tree)
    except ValueError as error:
        assert repr(pattern) in str(error)
    else:
        assert 1 in values or not tree
