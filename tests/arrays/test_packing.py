"""Masks take one bit per element and come back as booleans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays import packing

pack_mask = jax.jit(packing.pack_mask)
unpack_mask = jax.jit(packing.unpack_mask)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(hnp.arrays(bool, st.sampled_from([(), (8,), (3, 16), (2, 7), (4, 0), (0, 8)])))
def test_a_packed_mask_unpacks_to_itself(mask):
    packed = pack_mask(mask)
    assert unpack_mask(packed).dtype == jnp.bool_
    np.testing.assert_array_equal(unpack_mask(packed), mask)


def test_eight_elements_take_one_byte_lowest_bit_first():
    mask = np.arange(32).reshape(2, 16) % 3 == 0
    packed = pack_mask(mask)
    expected = np.packbits(mask, axis=-1, bitorder="little")
    assert packed.dtype == jnp.uint8 and packed.nbytes * 8 == mask.size
    np.testing.assert_array_equal(packed, expected)


@pytest.mark.parametrize("shape", [(), (5, 12), (9,)])
def test_a_last_axis_that_8_does_not_divide_stays_boolean(shape):
    mask = np.ones(shape, bool)
    assert pack_mask(mask).dtype == jnp.bool_ and pack_mask(mask).shape == shape


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_only_booleans_are_packed(dtype):
    with pytest.raises(TypeError, match="mask must be boolean"):
        packing.pack_mask(jnp.ones((8, 8), dtype))


def test_only_bytes_and_booleans_are_unpacked():
    with pytest.raises(TypeError, match="packed must be uint8 or boolean"):
        packing.unpack_mask(jnp.ones((8, 8), jnp.int32))


def test_an_8_by_4_mask_applied_through_storage_is_a_mask():
    """Packed bytes were once multiplied into gradients: updates like -238."""
    mask = np.arange(32).reshape(8, 4) % 2 == 0
    for stored in (pack_mask(mask), pack_mask(mask.reshape(4, 8))):
        kept = jnp.where(unpack_mask(stored), -1.0, 0.0)
        assert set(np.unique(kept)) == {-1.0, 0.0}


def test_unpacking_inside_an_update_needs_no_temporary_memory():
    update = jax.jit(lambda stored, u: jnp.where(packing.unpack_mask(stored), u, 0.0))
    stored = jax.ShapeDtypeStruct((256, 128), jnp.uint8)
    compiled = update.lower(stored, jax.ShapeDtypeStruct((256, 1024), "float32"))
    assert compiled.compile().memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize("spec", [("data", None), (None, "data")])
@pytest.mark.parametrize("mesh_name", ["auto_mesh", "explicit_mesh"])
def test_a_sharded_mask_is_packed_where_it_lies(request, mesh_name, spec):
    mesh = request.getfixturevalue(mesh_name)
    mask = np.random.default_rng(0).random((16, 256)) < 0.5
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(mask, sharding)
        compiled = pack_mask.lower(sharded).compile()
        packed = pack_mask(sharded)
        unpacked = unpack_mask(packed)
    assert "all-gather" not in compiled.as_text()
    assert packed.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(packed, pack_mask(mask))
    np.testing.assert_array_equal(unpacked, mask)


def test_parts_of_an_explicit_mesh_that_8_does_not_divide_stay_boolean(explicit_mesh):
    mask = jnp.arange(64).reshape(2, 32) % 3 == 0
    split = NamedSharding(explicit_mesh, PartitionSpec(None, "data"))
    with jax.set_mesh(explicit_mesh):
        packed = pack_mask(jax.device_put(mask, split))
    assert packed.dtype == jnp.bool_
    np.testing.assert_array_equal(packed, mask)
