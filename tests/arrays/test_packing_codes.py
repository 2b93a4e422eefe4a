"""Codes of 1 to 8 bits make a little-endian bit stream along one axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays import packing

pack_codes = jax.jit(packing.pack_codes, static_argnames=("bits", "axis"))
unpack_codes = jax.jit(
    packing.unpack_codes, static_argnames=("bits", "size", "axis", "signed")
)
widths = pytest.mark.parametrize("bits", range(1, 9))
signs = pytest.mark.parametrize("signed", [True, False])


def bit_stream(codes, bits, axis):
    """Write the bits of a line of codes one after the other, lowest first."""

    def line(values):
        stream = [(int(v) >> b) & 1 for v in values for b in range(bits)]
        stream += [0] * (-len(stream) % 8)
        return np.uint8(
            [
                sum(bit << b for b, bit in enumerate(stream[i : i + 8]))
                for i in range(0, len(stream), 8)
            ]
        )

    return np.apply_along_axis(line, axis, codes)


def random_codes(shape, bits, signed, seed=0):
    low = -(2 ** (bits - 1)) if signed else 0
    dtype = np.int8 if signed else np.uint8
    rng = np.random.default_rng(seed)
    return rng.integers(low, low + 2**bits, shape).astype(dtype)


@widths
@signs
def test_every_code_comes_back(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = np.arange(low, low + 2**bits).astype(np.int8 if signed else np.uint8)
    packed = pack_codes(codes, bits)
    np.testing.assert_array_equal(packed, bit_stream(codes, bits, -1))
    restored = unpack_codes(packed, bits, codes.size, signed=signed)
    assert restored.dtype == codes.dtype
    np.testing.assert_array_equal(restored, codes)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.booleans(),
    st.lists(st.integers(1, 11), min_size=1, max_size=3),
    st.integers(-3, 2),
)
def test_any_size_along_any_axis_is_the_naive_stream(bits, signed, shape, axis):
    axis = max(min(axis, len(shape) - 1), -len(shape))
    codes = random_codes(shape, bits, signed, seed=bits)
    packed = pack_codes(codes, bits, axis=axis)
    assert packed.dtype == jnp.uint8
    assert packed.shape[axis] == -(-shape[axis] * bits // 8)
    np.testing.assert_array_equal(packed, bit_stream(codes, bits, axis))
    restored = unpack_codes(packed, bits, shape[axis], axis=axis, signed=signed)
    np.testing.assert_array_equal(restored, codes)


@widths
def test_a_thousand_codes_take_their_bits_and_no_more(bits):
    codes = random_codes((16, 1000), bits, True)
    assert pack_codes(codes, bits).nbytes == 16 * 1000 * bits // 8


@widths
def test_nothing_packs_to_nothing(bits):
    packed = pack_codes(np.zeros((0, 3), np.int8), bits, axis=0)
    assert packed.shape == (0, 3)
    assert unpack_codes(packed, bits, 0, axis=0, signed=True).shape == (0, 3)


@pytest.mark.parametrize("bits", [3, 4])
def test_packing_maps_over_layers(bits):
    codes = random_codes((3, 20, 5), bits, True)
    stacked = jax.vmap(functools.partial(pack_codes, bits=bits, axis=-2))(codes)
    np.testing.assert_array_equal(stacked, pack_codes(codes, bits, axis=-2))


@pytest.mark.parametrize("mesh_name", ["auto_mesh", "explicit_mesh"])
@pytest.mark.parametrize("spec", [("data", None), (None, "data")])
@pytest.mark.parametrize("bits", [3, 4])
def test_sharded_codes_are_packed_where_they_lie(request, mesh_name, spec, bits):
    mesh = request.getfixturevalue(mesh_name)
    codes = random_codes((128, 64), bits, True)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(codes, sharding)
        compiled = pack_codes.lower(sharded, bits, axis=-2).compile()
        assert "all-gather" not in compiled.as_text()
        packed = pack_codes(sharded, bits, axis=-2)
    assert packed.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(packed, bit_stream(codes, bits, 0))


def test_unpacking_nibbles_needs_no_temporary_memory():
    packed = jax.ShapeDtypeStruct((512, 256), jnp.uint8)
    unpack = jax.jit(
        lambda p: unpack_codes(p, 4, 1024, axis=0, signed=True).astype(jnp.float32)
    )
    compiled = unpack.lower(packed).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0


def test_what_is_wrong_is_said():
    with pytest.raises(TypeError, match="codes must be int8 or uint8, got int32"):
        packing.pack_codes(np.ones(8, np.int32), 4)
    with pytest.raises(TypeError, match="packed must be uint8, got int8"):
        packing.unpack_codes(np.ones(8, np.int8), 4, 16, signed=True)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        packing.pack_codes(np.ones(8, np.int8), 9)
    with pytest.raises(ValueError, match="a scalar has no line"):
        packing.pack_codes(np.int8(1), 4)
    with pytest.raises(ValueError, match=r"axis must be an axis.*got axis 1"):
        packing.pack_codes(np.ones(8, np.int8), 4, axis=1)
    with pytest.raises(ValueError, match="size must fill"):
        packing.unpack_codes(np.ones(8, np.uint8), 4, 17, signed=True)
