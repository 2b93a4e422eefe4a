"""Arrays of any dtype are tensors of an ordinary safetensors file."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jopt.trees import container, structure
from jopt.trees.manifest import CheckpointError


@pytest.mark.parametrize("dtype", sorted(structure.DTYPES))
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 2), (7,)])
def test_every_dtype_has_a_tensor(dtype, shape):
    array = (np.arange(np.prod(shape)).reshape(shape) % 2).astype(jnp.dtype(dtype))
    tensor = container.to_tensor(array)
    assert tensor.dtype.name in container.DTYPES
    found = container.from_tensor(tensor, dtype, shape)
    assert found.dtype == array.dtype and found.shape == shape
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "uint4", "float4_e2m1fn"])
def test_small_elements_share_bytes_and_keep_all_values(dtype):
    bits = container._BITS[dtype]
    array = np.arange(2**bits, dtype=np.uint8).view(jnp.dtype(dtype))
    if dtype.startswith("int"):
        array = (np.arange(2**bits) - 2 ** (bits - 1)).astype(jnp.dtype(dtype))
    tensor = container.to_tensor(array)
    assert tensor.nbytes == -(-array.size * bits // 8)
    found = container.from_tensor(tensor, dtype, array.shape)
    assert np.array_equal(found.astype(np.float32), array.astype(np.float32))


def test_a_tensor_of_another_size_is_damage():
    with pytest.raises(CheckpointError, match=r"uint8\[2\] is no int4\[5\]"):
        container.from_tensor(np.zeros(2, np.uint8), "int4", (5,))
    with pytest.raises(CheckpointError, match=r"float32\[2\] is no int8\[2\]"):
        container.from_tensor(np.zeros(2, np.float32), "int8", (2,))


def test_files_of_the_package_are_read_and_the_other_way_round(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.c": np.array(7, np.int64),
        "d/e": np.zeros((0, 4), np.float16),
        "f": np.array([True, False]),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    container.write_file(ours, tensors, {"key": "value"})
    safetensors.numpy.save_file(tensors, theirs, {"key": "value"})
    assert ours.read_bytes() == theirs.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))
    found, metadata = container.read_file(theirs)
    assert metadata == {"key": "value"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert np.array_equal(found[name], tensor)
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1


def test_a_failed_write_leaves_nothing(tmp_path):
    file = tmp_path / "x.safetensors"
    container.write_file(file, {"a": np.ones(1, np.float32)}, {})
    before = file.read_bytes()
    wrong = {"a\ud800": np.ones(1, np.float32)}  # no UTF-8
    with pytest.raises(UnicodeEncodeError):
        container.write_file(file, wrong, {})
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_unknown_dtypes_are_named(tmp_path):
    file = tmp_path / "x.safetensors"
    spec = safetensors.TensorSpec(
        dtype="float4_e2m1fn_x2",
        shape=[2],
        data_ptr=(data := np.zeros(2, np.uint8)).ctypes.data,
        data_len=data.nbytes,
    )
    safetensors.serialize_file({"a": spec}, file)
    with pytest.raises(ValueError, match=r"got \['F4'\]"):
        container.read_file(file)
