"""Blocks are read right from any sharding, and shardings come back from JSON."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding

from jopt.trees import placement

VALUES = np.arange(16 * 8).reshape(16, 8).astype(np.float32)
SPECS = [(), ("a",), ("b", "a"), (("a", "b"),), (None, "b")]


def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_cover_the_array_once(spec):
    array = jax.device_put(VALUES, NamedSharding(mesh(), jax.P(*spec)))
    seen = np.zeros(VALUES.shape, int)
    for block, values in placement.blocks_of(array):
        place = tuple(slice(*part) for part in block)
        np.testing.assert_array_equal(values, VALUES[place])
        seen[place] += 1
    assert np.all(seen == 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(SPECS), st.lists(st.integers(0, 8), min_size=4, max_size=4))
def test_any_block_reads_right(spec, bounds):
    array = jax.device_put(VALUES, NamedSharding(mesh(), jax.P(*spec)))
    rows, columns = sorted(2 * b for b in bounds[:2]), sorted(bounds[2:])
    block = (tuple(rows), tuple(columns))
    expected = VALUES[slice(*rows), slice(*columns)]
    np.testing.assert_array_equal(placement.read_block(array, block), expected)
    np.testing.assert_array_equal(placement.read_block(VALUES, block), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", SPECS)
def test_shardings_come_back(spec, kind):
    grid = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    sharding = NamedSharding(grid, jax.P(*spec))
    node = placement.encode_sharding(jax.device_put(VALUES, sharding))
    found = placement.decode_sharding(json.loads(json.dumps(node)))
    assert found == sharding
    assert found.mesh.axis_types == grid.axis_types


def test_missing_devices_mean_the_default_device():
    array = jax.device_put(VALUES, NamedSharding(mesh(), jax.P("a")))
    node = placement.encode_sharding(array)
    assert placement.decode_sharding({**node, "devices": list(range(8, 16))}) is None
    assert placement.decode_sharding(99) is None
    assert placement.decode_sharding(None) is None
