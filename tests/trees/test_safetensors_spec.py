"""A reader written from docs/safetensors.md alone: NumPy, and nothing of this library.

It decodes the golden files and the vectors of the page to the numbers that
`jopt.restore` and `jopt.dequantize` give, bit for bit.
"""

import json
import pathlib
import re
import struct
import zlib

import jax
import numpy as np
import pytest

import jopt
from tests.trees.golden.make import everything, vectors
from tests.trees.test_checkpoint import assert_same

HERE = pathlib.Path(__file__).parent / "golden"
SPEC = (pathlib.Path(__file__).parents[2] / "docs" / "safetensors.md").read_text()
VECTORS = json.loads(re.search(r"```json\n(.*?)```", SPEC, re.S)[1])

# ---- the reader ----------------------------------------------------------------------

PLAIN = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U32": "<u4",
    "I32": "<i4",
    "I64": "<i8",
    "F32": "<f4",
}
TABLES = {
    name: [float(value) for value in values.split(",")]
    for name, values in re.findall(r"^\| `(\w+)` \| (-?\d[^|]*, [^|]*) \|$", SPEC, re.M)
}
TABLES |= {"mxfp4": TABLES["fp4_e2m1"], "nvfp4": TABLES["fp4_e2m1"]}
BITS = {"nf4": 4, "fp4_e2m1": 4, "mxfp4": 4, "nvfp4": 4, "ternary": 2, "binary": 1}


def bits_of(format):
    return BITS[format] if format in BITS else int(format.lstrip("uint"))


def tensor(data, row):
    """Return the elements of a tensor as NumPy has them, small floats as float32."""
    start, stop = row["data_offsets"]
    data, shape, dtype = data[start:stop], row["shape"], row["dtype"]
    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    if dtype == "F8_E8M0":
        return np.exp2(np.frombuffer(data, "u1") - 127.0).astype("f4").reshape(shape)
    if dtype == "F8_E4M3":
        byte = np.frombuffer(data, "u1").astype(int)
        exponent, mantissa = (byte >> 3) & 15, byte & 7
        size = np.where(
            exponent == 0,
            mantissa * 2.0**-9,
            (8 + mantissa) * 2.0 ** (exponent - 10.0),
        )
        return np.where(byte & 128, -size, size).astype("f4").reshape(shape)
    return np.frombuffer(data, PLAIN[dtype]).reshape(shape)


def open_file(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    text = header.pop("__metadata__")["jopt"]
    content = json.loads(text)
    zeroed = text.replace(content["crc32"], "00000000", 1)
    assert zlib.crc32(zeroed.encode()) == int(content["crc32"], 16)
    assert content["version"] == 1
    for name, saved in zip(sorted(header), content["checksums"], strict=True):
        row = header[name]
        shape = ",".join(str(size) for size in row["shape"])
        text = f"{name}\n{row['dtype']}\n{shape}\n".encode()
        start, stop = row["data_offsets"]
        assert zlib.crc32(text + data[start:stop]) == saved
    return {name: tensor(data, row) for name, row in header.items()}, content


def unpack(stream, bits, size, axis, *, signed):
    lines = np.moveaxis(stream, axis, -1)
    each = np.unpackbits(np.ascontiguousarray(lines), axis=-1, bitorder="little")
    each = each[..., : bits * size].reshape(*lines.shape[:-1], size, bits)
    codes = (each.astype(int) << np.arange(bits)).sum(-1)
    if signed:
        codes = np.where(codes >> (bits - 1), codes - (1 << bits), codes)
    return np.moveaxis(codes, -1, axis)


def spread(part, shape):
    for axis, size in enumerate(shape):
        part = np.repeat(part, size // part.shape[axis], axis)
    return part


def decode(parts, row, spec):
    """Return unpacked codes and the float32 values of a quantized array."""
    format, codes = spec["format"], parts["codes"]
    if "packed_axis" in row:
        signed = format.startswith("int")
        size, axis = row["packed_size"], row["packed_axis"]
        codes = unpack(codes, bits_of(format), size, axis, signed=signed)
    unpacked = codes
    if row.get("order") == "nk":
        codes = np.swapaxes(codes, -1, -2)
    levels = np.array(TABLES[format], "f4")[codes] if format in TABLES else codes
    levels = levels.astype("f4")
    if "zero_point" in parts:
        levels = levels - spread(parts["zero_point"].astype("f4"), codes.shape)
    scale = parts["scale"].astype("f4")
    if "outer_scale" in parts:
        scale = scale * spread(parts["outer_scale"], scale.shape)
    values = levels * spread(scale, codes.shape)
    if "permutation" in parts:
        kept = spec["axis"] if isinstance(spec["axis"], list) else [spec["axis"]]
        kept = [-1] if spec["axis"] is None else kept
        axis = max(a for a in range(-codes.ndim, 0) if a not in kept)
        right = np.empty_like(values)
        place = [slice(None)] * values.ndim
        place[axis] = parts["permutation"]
        right[tuple(place)] = values
        values = right
    if "input_scale" in parts:
        values = values / parts["input_scale"]
    return unpacked, values


def read_quantized(tensors, content, name):
    row = content["quantized"][name]
    parts = row.get("parts", ["codes", "scale"])
    found = {part: tensors[f"{name}.{part}"] for part in parts}
    return decode(found, row, content["specs"][row["spec"]])


# ---- what it must find ---------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return open_file(HERE / "vectors.safetensors")


@pytest.mark.parametrize("name", vectors())
def test_golden_vectors_decode_without_the_library(golden, name):
    _, values = read_quantized(*golden, name)
    wanted = np.asarray(jopt.dequantize(vectors()[name]))
    assert values.dtype == wanted.dtype == np.float32
    assert np.array_equal(values.view("u4"), wanted.view("u4"))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors_of_the_page(golden, vector):
    tensors, content = golden
    stored = tensors[f"{vector['name']}.codes"]
    assert list(stored.shape) == vector["stored"]["shape"]
    assert stored.tobytes() == bytes.fromhex(vector["stored"]["bytes"])
    row = content["quantized"][vector["name"]]
    for key in ("packed_axis", "packed_size"):
        assert row[key] == vector[key]
    assert row.get("order", "kn") == vector["order"]
    assert content["specs"][row["spec"]]["format"] == vector["format"]
    for part in row.get("parts", ["codes", "scale"])[1:]:
        assert tensors[f"{vector['name']}.{part}"].tolist() == vector[part]
    codes, values = read_quantized(tensors, content, vector["name"])
    assert codes.tolist() == vector["codes"]
    assert values.tolist() == vector["values"]


def test_golden_files_restore_and_are_written_the_same_today(tmp_path):
    for name, tree in [("vectors", vectors()), ("everything", everything())]:
        file = HERE / f"{name}.safetensors"
        found, metadata = jopt.restore(file, with_metadata=True)
        assert_same(found, tree)
        # A change of the format without a new version would break readers.
        jopt.save(tmp_path / file.name, tree, metadata=metadata)
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_all_that_is_not_quantized_reads_by_its_path():
    tensors, content = open_file(HERE / "everything.safetensors")
    tree = everything()
    assert np.array_equal(tensors["layers/1/kernel"], tree["layers"][1]["kernel"])
    assert np.array_equal(tensors["half"], tree["half"].astype("float32"))
    assert np.array_equal(tensors["eighth"], tree["eighth"].astype("float32"))
    assert np.array_equal(tensors["mask"], tree["mask"])
    assert np.array_equal(tensors["numpy"], tree["numpy"])
    assert tensors["empty/2"].shape == (0, 2)
    assert tensors["a/b"].tolist() == [1.0] and tensors["a/b#1"].tolist() == [0.0]
    about = content["arrays"]["bits"]
    assert about == {"dtype": "int4", "shape": [2, 3]}
    codes = unpack(tensors["bits"], 4, 6, 0, signed=True).reshape(about["shape"])
    assert codes.tolist() == [[1, -2, 3], [-8, 7, 0]]
    assert np.array_equal(tensors["wide"].view("c16"), tree["wide"])
    assert np.array_equal(tensors["key"], jax.random.key_data(tree["key"]))
    assert content["metadata"] == {"note": "all kinds"}
    outline = content["tree"]
    assert outline["index"] == ["dict", [7], ["seven"]]
    assert outline["tuple"][:4] == ["tuple", 1, ["float", "0x1.4000000000000p+1"], None]
    assert outline["layers"] == ["list", *[{"kernel": [], "bias": []}] * 2]
    assert outline["empty"] == ["list", {}, ["tuple"], []]
