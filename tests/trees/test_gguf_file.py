"""GGUF tensors come as quantized arrays of the very numbers that gguf reads."""

import importlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt.trees import gguf_file

RNG = np.random.default_rng(0)
TYPES = gguf.GGMLQuantizationType


def write(path, tensors):
    """Write name -> (array, type) with the package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü"])
    writer.add_string("general.name", "small")
    for name, (array, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(*shape):
    w = RNG.normal(size=shape).astype(np.float32)
    w.reshape(-1)[:32] = 0  # a block of zeros
    w.reshape(-1)[32:64] *= 1e-6  # with a subnormal float16 scale
    return w


MATRIX = weights(6, 96)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("gguf") / "model.gguf",
        {
            "blk.0.q4.weight": (MATRIX, TYPES.Q4_0),
            "blk.0.q8.weight": (MATRIX, TYPES.Q8_0),
            "blk.1.line.weight": (weights(64), TYPES.Q4_0),
            "blk.1.experts.weight": (weights(2, 3, 64), TYPES.Q8_0),
            "norm.weight": (MATRIX[0], None),
            "half.weight": (MATRIX.astype(np.float16), None),
            "brain.weight": (MATRIX, TYPES.BF16),
            "index": (np.arange(3, dtype=np.int64), None),
            "double": (MATRIX.astype(np.float64), None),
        },
    )


@pytest.fixture(scope="module")
def read(file):
    return jopt.read_gguf(file)


def as_bits(array):
    return np.asarray(array, np.float32).view(np.uint32)


def test_numbers_are_those_of_the_package(file, read):
    tensors, _ = read
    for tensor in gguf.GGUFReader(file).tensors:
        found = tensors[tensor.name]
        if tensor.tensor_type.name in ("F64", "I64"):  # JAX would cut them
            assert type(found) is np.ndarray and found.dtype == tensor.data.dtype
            assert np.array_equal(found, tensor.data)
            continue
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert found.shape == wanted.shape
        assert np.array_equal(as_bits(jopt.dequantize(found)), as_bits(wanted))
    assert tensors["half.weight"].dtype == jnp.float16
    assert tensors["brain.weight"].dtype == jnp.bfloat16


def test_codes_stay_small_and_reach_the_lowest(read):
    q4, q8 = (read[0][f"blk.0.{name}.weight"] for name in ("q4", "q8"))
    assert (q4.spec.format.name, q4.spec.group_size) == ("int4", 32)
    assert (q4.bits_per_weight, q8.bits_per_weight) == (5, 9)  # float32 scales
    assert q4.codes.nbytes == MATRIX.size // 2 and q8.codes.dtype == jnp.int8
    levels = jopt.dequantize(q4).reshape(6, 3, 32) / np.asarray(q4.scale)[..., None]
    assert float(np.nanmin(levels)) == -8.0
    assert float(jnp.min(q4.scale)) < 0


def test_every_bit_pattern_of_a_block(tmp_path):
    """Blocks of random bytes, written raw: any code with any finite scale."""
    raw = RNG.integers(0, 256, (64, 18 * 4), dtype=np.uint8)
    wide = RNG.integers(0, 256, (64, 34 * 4), dtype=np.uint8)
    for data, size in ((raw, 18), (wide, 34)):
        data[:, 1::size] &= 0xBB  # no infinity, no NaN
    writer = gguf.GGUFWriter(tmp_path / "raw.gguf", "llama")
    writer.add_tensor("q4", raw, raw_dtype=TYPES.Q4_0)
    writer.add_tensor("q8", wide, raw_dtype=TYPES.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors, _ = jopt.read_gguf(tmp_path / "raw.gguf")
    for name, data, kind in (("q4", raw, TYPES.Q4_0), ("q8", wide, TYPES.Q8_0)):
        found = as_bits(jopt.dequantize(tensors[name]))
        assert np.array_equal(found, as_bits(gguf.dequantize(data, kind)))


def test_metadata(read):
    assert read[1] == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "tokenizer.ggml.tokens": ["a", "ü"],
        "general.name": "small",
    }


def test_transposed_matrices_multiply(file, read):
    pattern = jopt.matching(r"blk\.0\..*")
    tensors, _ = jopt.read_gguf(file, select=pattern, transposed=pattern)
    assert tensors.keys() == {"blk.0.q4.weight", "blk.0.q8.weight"}
    x = jnp.asarray(RNG.normal(size=(5, 96)), jnp.float32)
    for name, q in tensors.items():
        assert q.shape == (96, 6) and q.order == "nk"
        assert np.array_equal(q.codes, read[0][name].codes)
        dense = jopt.dequantize(read[0][name])
        assert np.array_equal(jopt.dequantize(q), dense.T)
        y = jax.jit(jopt.execute(lambda p, x: x @ p["w"]))({"w": q}, x)
        np.testing.assert_allclose(y, x @ dense.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"choose matrices, got 'blk\.1\.experts"):
        jopt.read_gguf(file, transposed=jopt.matching(".*experts.*"))


def test_they_are_saved_as_any_tree(read, tmp_path):
    jopt.save(tmp_path / "model.safetensors", read[0], metadata=read[1])
    found, metadata = jopt.restore(tmp_path / "model.safetensors", with_metadata=True)
    assert metadata == read[1]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(read[0]), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_other_types_are_named_and_can_be_left_out(tmp_path):
    path = write(
        tmp_path / "x.gguf",
        {
            "a": (MATRIX, TYPES.Q4_0),
            "b": (MATRIX, TYPES.Q5_1),
            "c": (weights(2, 256), TYPES.TQ1_0),
        },
    )
    with pytest.raises(ValueError, match=r"got Q5_1, TQ1_0, in 2 tensors such as 'b'"):
        jopt.read_gguf(path)
    assert jopt.read_gguf(path, select=jopt.matching("a"))[0].keys() == {"a"}


def test_selecting(file, tmp_path):
    tensors, _ = jopt.read_gguf(file, select=lambda name, leaf: leaf.shape == (96,))
    assert tensors.keys() == {"norm.weight"}
    with pytest.raises(ValueError, match="rules must match at least one leaf each"):
        jopt.read_gguf(file, select=jopt.matching("blck.*"))
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        jopt.read_gguf(tmp_path / "none.gguf")


def test_cut_files_and_others_are_refused(file, tmp_path):
    data = file.read_bytes()
    for size in [*range(1, 900, 7), len(data) // 2, len(data) - 64]:
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(jopt.CheckpointError, match=r"whole GGUF file, got .*cut"):
            jopt.read_gguf(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(jopt.CheckpointError, match="GGUF magic invalid"):
        jopt.read_gguf(tmp_path / "other.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(jopt.CheckpointError):
        jopt.read_gguf(tmp_path / "empty.gguf")


def test_without_the_package_it_says_what_to_install(file, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'jopt\[gguf\]'"):
        gguf_file.read_gguf(file)
