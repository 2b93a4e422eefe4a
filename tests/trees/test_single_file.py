"""One safetensors file holds a tree, is as small as its weights, and never lies."""

import dataclasses
import json
import pathlib
import signal
import struct
import subprocess
import sys
import time
import zlib

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

import jopt
from jopt.arrays import formats, packing, quantized
from jopt.trees import paths, single_file
from tests.trees.test_checkpoint import (
    FORMATS,
    LARGE,
    Custom,
    assert_same,
    of_dtype,
    zeros_like,
)

SPEC = jopt.QuantSpec(formats.int4, group_size=32)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def round_trip(file, tree, *, like=None):
    jopt.save(file, tree, overwrite=True)
    found = jopt.restore(file, like=like)
    assert_same(found, tree)
    return found


def test_plain_tree_of_everything(file):
    tree = {
        "params": [{"w": jnp.asarray(LARGE), "b": jnp.ones(3, jnp.bfloat16)}],
        "step": 17,
        "count": jnp.int32(3),
        "big": 2**70,
        "lr": np.float32(0.1),
        "best": float("inf"),
        "note": ("text", b"bytes", None, True, 2j),
        "words": ["list", "dict", "leaf", "float", [], {}],
        "numpy": np.arange(3, dtype=np.int64),
        "columns": np.asfortranarray(LARGE).astype(np.float64),
        "empty": ({}, [], (), jnp.zeros((0, 3)), np.zeros(0, np.int16)),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
        "weak": jnp.asarray(2.0),
        "index": {0: 1, 5: jnp.ones(1)},
        "hole": optax.MaskedNode(),
        "mask": packing.pack_mask(jnp.arange(16) % 3 == 0),
    }
    found = round_trip(file, tree)
    assert jax.random.key_impl(found["keys"]) == "rbg"
    assert found["weak"].weak_type and not found["count"].weak_type
    found["numpy"] += 1
    # Every plain leaf is a plain tensor to the package.
    others = safetensors.numpy.load_file(file)
    assert np.array_equal(others["params/0/w"], LARGE)
    assert others["columns"].dtype == np.float64


@pytest.mark.parametrize("numpy", [False, True])
def test_every_dtype(file, numpy):
    names = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
    names += ["float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    names += ["float4_e2m1fn", "int2", "uint2", "int4", "uint4", "int8", "uint8"]
    names += ["int16", "uint16", "int32", "uint32", "bool", "complex64"]
    tree = {name: of_dtype(name) for name in names}
    tree |= {f"odd_{name}": of_dtype(name)[0, :3] for name in names}
    if numpy:
        tree = jax.tree.map(np.asarray, tree)
        tree |= {"complex128": np.ones((2, 3), np.complex128)}
    round_trip(file, tree)


@pytest.mark.parametrize("tree", [{}, [], None, 3, jnp.ones(2), jnp.zeros(0), "text"])
def test_roots_of_any_kind(file, tree):
    round_trip(file, tree)


def test_negative_zero_nan_payload_and_subnormals(file):
    words = np.array([0x80000000, 0x7FC00001, 0xFFC12345, 1], np.uint32)
    round_trip(file, {"w": jnp.asarray(words.view(np.float32))})


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_quantized_leaves_need_no_template(file, format):
    symmetric = format.signed or format.kind != "integer"
    spec = jopt.QuantSpec(format, symmetric=symmetric)
    tree = {"q": jopt.quantize(jnp.asarray(LARGE), spec), "b": jnp.ones(2)}
    found = round_trip(file, tree)
    assert found["q"].spec == spec and hash(found["q"].spec) == hash(tree["q"].spec)
    assert_same(jopt.dequantize(found), jopt.dequantize(tree))


def test_quantized_leaves_with_all_fields(file):
    spec = jopt.QuantSpec(formats.uint4, group_size=32, symmetric=False)
    q = quantized.quantize_array(jnp.asarray(LARGE), spec, order="nk")
    q = dataclasses.replace(
        q, permutation=jnp.arange(256)[::-1], input_scale=jnp.full((256, 1), 2.0)
    )
    own = dataclasses.replace(formats.nf4, name="own", values=formats.nf4.values[:15])
    tree = {
        "q": [q],
        "stacked": jopt.quantize(jnp.ones((2, 64, 8)), SPEC),
        "numpy": jax.tree.map(np.asarray, q),
        "own": jopt.quantize(jnp.asarray(LARGE), jopt.QuantSpec(own, axis=(0, 1)[:1])),
    }
    assert round_trip(file, tree)["own"].spec.format == own
    with pytest.raises(ValueError, match="at 'q/0/order': saved 'nk', got 'kn'"):
        jopt.restore(file, like={**tree, "q": [dataclasses.replace(q, order="kn")]})
    # Parts that are no arrays (here: of a kind that a tree may hold) are kept too.
    round_trip(file, dataclasses.replace(q, scale=2.0, zero_point=None))


def test_names_that_would_be_the_same(file):
    q = jopt.quantize(jnp.ones((32, 2)), SPEC)
    names = [
        "a/b",
        "a.b",
        "",
        "..",
        "ü x",
        "#",
        "__metadata__",
        "root",
        'q"\n',
        "a" * 99,
    ]
    tree = {name: jnp.full(2, float(i)) for i, name in enumerate(names)}
    tree |= {"a": {"b": jnp.ones(1), "b#1": jnp.zeros(1)}, "a/b#1": jnp.ones(3)}
    tree |= {"q": q, "q.scale": jnp.ones(4), "q#1.codes": jnp.ones(5), "x": [q]}
    tree |= {"x/0.zero_point": jnp.ones(6), "x/0": q, "x/0.codes": 1}
    round_trip(file, dict(reversed(tree.items())))
    round_trip(file, tree)
    with safetensors.safe_open(file, "numpy") as others:
        names = set(others.keys())
    assert {"a/b", "a/b#1", "__metadata__#1", "q.codes", "x/0.scale"} <= names


keys = st.text(st.sampled_from("ab/.#0_é"), max_size=4) | st.sampled_from(
    ["codes", "a.codes", "__metadata__", "root"]
)
trees = st.recursive(
    st.sampled_from([None, 1, "list", jnp.ones(1), np.zeros(2), jnp.int4(3)]),
    lambda inner: (
        st.dictionaries(keys, inner, max_size=4)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(trees)
def test_any_tree_comes_back(tmp_path_factory, tree):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    jopt.save(file, tree, overwrite=True)
    assert_same(jopt.restore(file), tree)


@pytest.mark.parametrize(
    "tree",
    [
        optax.adam(1e-3).init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}),
        {"x": Custom({"w": jnp.ones(2)}, [Custom(1, None)])},
        nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
    ],
    ids=["adam", "namedtuple", "rngs"],
)
def test_custom_nodes_need_like(file, tree):
    round_trip(file, tree, like=jax.tree.map(zeros_like, tree))
    with pytest.raises(ValueError, match="like must be given to restore the "):
        jopt.restore(file)


def test_like_never_casts_and_places(file, auto_mesh):
    sharding = NamedSharding(auto_mesh, jax.P("data"))
    tree = {"w": jnp.asarray(LARGE), "s": jax.device_put(LARGE, sharding)}
    found = round_trip(file, tree)
    assert found["s"].sharding == sharding
    like = jax.ShapeDtypeStruct(LARGE.shape, jnp.float32, sharding=sharding)
    assert jopt.restore(file, like={"w": like, "s": like})["w"].sharding == sharding
    with pytest.raises(ValueError, match=r"'w': saved float32\[256, 128\], got bf"):
        jopt.restore(file, like={**tree, "w": tree["w"].astype(jnp.bfloat16)})


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.relu(nn.Dense(64)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def linen():
    return Linen(), Linen().init(jax.random.key(0), jnp.ones((1, 32)))


def equinox():
    return (eqx.nn.MLP(32, 8, 64, 1, key=jax.random.key(0)),)


@pytest.mark.parametrize(
    "make", [linen, lambda: (Nnx(nnx.Rngs(0)),), equinox], ids=["linen", "nnx", "eqx"]
)
def test_models_of_every_framework_run_as_before(file, make):
    apply, params = jopt.functional(*make())
    x = jax.random.normal(jax.random.key(1), (32,) if make is equinox else (4, 32))
    packed = jopt.quantize(params, SPEC, sites=jopt.sites(apply, params, x))
    leaves = [leaf for _, leaf in paths.leaves_with_path(packed)]
    assert sum(isinstance(leaf, jopt.QuantizedArray) for leaf in leaves) == 2
    jopt.save(file, packed)
    found = jopt.restore(file, like=jax.tree.map(zeros_like, packed))
    assert_same(found, packed)
    run = jax.jit(jopt.execute(apply))
    assert np.array_equal(run(found, x), run(packed, x))
    if make is linen:
        assert_same(jopt.restore(file), packed)


# bits of a code, of a scale, and elements that share one
SIZES = {
    "int2-32": (2, 16, 32),
    "int3-32": (3, 16, 32),
    "int4-32": (4, 16, 32),
    "int4-128": (4, 16, 128),
    "int8": (8, 16, 512),
    "nf4-64": (4, 16, 64),
    "mxfp4": (4, 8, 32),
    "nvfp4": (4, 8, 16),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_file_is_as_small_as_its_weights(file, name):
    format, _, group = name.partition("-")
    spec = jopt.QuantSpec(
        getattr(formats, format), group_size=int(group) if group else None
    )
    weights = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)
    tree = {f"block_{i}": {"kernel": jopt.quantize(weights, spec)} for i in range(3)}
    jopt.save(file, tree)
    bits, scale_bits, group = SIZES[name]
    theory = 3 * weights.size * (bits + scale_bits / group) / 8
    assert theory < file.stat().st_size < 1.01 * theory


def test_options_that_a_file_has_not(file, tmp_path):
    with pytest.raises(ValueError, match="step must be left out for one file"):
        jopt.save(file, {}, step=0)
    with pytest.raises(ValueError, match="max_to_keep must be left out for one file"):
        jopt.save(file, {}, max_to_keep=2)
    assert not file.exists()
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        jopt.restore(file)
    jopt.save(file, {"a": 1}, metadata={"loss": [0.5]})
    for call in (jopt.restore, jopt.read_metadata):
        with pytest.raises(ValueError, match=r"got 3 for '.*model\.safetensors'"):
            call(file, step=3)
    with pytest.raises(ValueError, match="must be a directory of steps"):
        jopt.steps(file)
    assert jopt.read_metadata(file) == {"loss": [0.5]}
    assert jopt.restore(str(file), with_metadata=True) == ({"a": 1}, {"loss": [0.5]})
    with pytest.raises(ValueError, match="which exists; pass overwrite=True"):
        jopt.save(file, {"a": 2})
    assert jopt.restore(file) == {"a": 1}
    jopt.save(file, {"a": 2}, overwrite=True)
    assert jopt.restore(file) == {"a": 2} and jopt.read_metadata(file) == {}
    for wrong in ({"a": jnp.ones(1)}, {"a": [{1: 2}]}, [1]):
        with pytest.raises(TypeError, match="metadata must be a dict of JSON"):
            jopt.save(file, {}, overwrite=True, metadata=wrong)
    jopt.save(tmp_path / "Upper.SafeTensors", {"a": 1})
    assert jopt.restore(tmp_path / "Upper.SafeTensors") == {"a": 1}
    (tmp_path / "Upper.SafeTensors").unlink()  # a file, not a directory
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(ValueError, match="choose another name"):
        jopt.save(tmp_path / "d.safetensors", {}, overwrite=True)
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        jopt.save(file, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, overwrite=True)
    assert jopt.restore(file) == {"a": 2}
    assert {entry.name for entry in tmp_path.iterdir()} == {file.name, "d.safetensors"}
    assert file.stat().st_mode & 0o077 == (
        tmp_path / "d.safetensors"
    ).stat().st_mode & (0o066)


# ---- damage --------------------------------------------------------------------------


def small_tree():
    q = jopt.quantize(jnp.asarray(LARGE[:32, :4]), SPEC)
    return {"q": q, "w": jnp.arange(3.0), "n": 7, "x": np.ones(2, np.complex128)}


def saved(file):
    jopt.save(file, small_tree(), metadata={"epoch": 3}, overwrite=True)
    return file.read_bytes()


def test_every_flipped_byte_is_seen_or_harmless(file):
    intact = saved(file)
    size = struct.unpack("<Q", intact[:8])[0]
    padding = len(intact[8 : 8 + size]) - len(intact[8 : 8 + size].rstrip())
    harmless = []
    for position in range(len(intact)):
        changed = bytearray(intact)
        changed[position] ^= (1, 4, 32, 128)[position % 4]
        file.write_bytes(changed)
        try:
            found = jopt.restore(file, with_metadata=True)
        except jopt.CheckpointError as error:
            assert file.name in str(error)
        else:
            assert found[1] == {"epoch": 3}
            assert_same(found[0], small_tree())
            harmless.append(position)
    # Only blanks behind the header, or a blank size of it, can change unseen.
    assert all(8 + size - padding <= position < 8 + size for position in harmless)


def test_every_cut_file_is_seen(file):
    intact = saved(file)
    for size in range(len(intact)):
        file.write_bytes(intact[:size])
        with pytest.raises(jopt.CheckpointError, match=r"model\.safetensors"):
            jopt.restore(file)
    file.write_bytes(intact + b"\0")
    with pytest.raises(jopt.CheckpointError):
        jopt.restore(file)


def rewritten(file, change):
    """Write the tensors again by the package, after a change of header and data."""
    tensors = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, file, metadata)


def exchange(tensors, metadata):
    tensors["w"], tensors["v"] = tensors["v"], tensors["w"]


def retype(tensors, metadata):
    tensors["w"] = tensors["w"].view(np.int32)


def reshape(tensors, metadata):
    tensors["w"] = tensors["w"].reshape(3, 1)


def remove(tensors, metadata):
    del tensors["w"]


def add(tensors, metadata):
    tensors["stranger"] = np.ones(1, np.float32)


def rename(tensors, metadata):
    tensors["u"] = tensors.pop("w")


def edit(tensors, metadata):
    metadata["jopt"] = metadata["jopt"].replace('"n":7', '"n":8')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange, r"changed tensors \['v', 'w'\]"),
        (retype, r"changed tensors \['w'\]"),
        (reshape, r"changed tensors \['w'\]"),
        (remove, r"tensors \['w'\] missing"),
        (add, r"\['stranger'\] too many"),
        (rename, r"tensors \['w'\] missing and \['u'\] too many"),
        (edit, "whole metadata"),
        (lambda tensors, metadata: metadata.clear(), "without the metadata 'jopt'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_valid_containers_with_other_contents_are_refused(file, change, message):
    tree = {"w": jnp.arange(3.0), "v": jnp.ones(3), "n": 7}
    jopt.save(file, tree)
    rewritten(file, lambda tensors, metadata: None)
    assert_same(jopt.restore(file), tree)
    rewritten(file, change)
    with pytest.raises(jopt.CheckpointError, match=message):
        jopt.restore(file)


def test_a_later_version_is_refused(file):
    jopt.save(file, {"n": 7})

    def later(tensors, metadata):
        text = metadata["jopt"].replace('"version":1', '"version":2')
        old = json.loads(text)["crc32"]
        new = f"{zlib.crc32(text.replace(old, '00000000', 1).encode()):08x}"
        metadata["jopt"] = text.replace(old, new, 1)

    rewritten(file, later)
    with pytest.raises(ValueError, match=r"version 1 or older, got version 2.*update"):
        jopt.restore(file)


def test_duplicate_names_are_refused(file):
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    header += b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(jopt.CheckpointError):
        jopt.restore(file)


WRITER = """
import sys, jax.numpy as jnp
from jopt.trees import checkpoint
for step in range(10**6):
    tree = {"w": jnp.full((1000, 500), step), "step": step}
    checkpoint.save(sys.argv[1], tree, overwrite=True)
    print(step, flush=True)
"""


@pytest.mark.parametrize("wait", [0.0, 0.001, 0.002, 0.004])
def test_kill_at_any_moment(file, wait):
    root = pathlib.Path(single_file.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, file],
        stdout=subprocess.PIPE,
        cwd=root,
        text=True,
    ) as process:
        last = [int(process.stdout.readline()) for _ in range(3)][-1]
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    last = int(rest[-1]) if rest else last
    found = jopt.restore(file)
    assert found["step"] >= last and np.all(np.asarray(found["w"]) == found["step"])
    jopt.save(file, {}, overwrite=True)  # which takes what was left behind away
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_what_a_killed_save_left_is_taken_away_and_nothing_else(file):
    left, own = (file.with_name(file.name + end) for end in (".jopt.tmp", ".tmp"))
    for folder in (left, own):
        folder.mkdir()
        (folder / ".tmpRJgNSe").write_bytes(b"half")
    jopt.save(file, {"n": 2})
    names = {entry.name for entry in file.parent.iterdir()}
    assert names == {file.name, own.name}
    assert (own / ".tmpRJgNSe").read_bytes() == b"half"
    assert jopt.restore(file) == {"n": 2}


@pytest.mark.parametrize("call", [jopt.restore, jopt.steps, jopt.read_metadata])
def test_what_is_no_path(call):
    for path in (3, None, b"a.safetensors"):
        with pytest.raises(TypeError, match="path must be a str or a"):
            call(path)
        with pytest.raises(TypeError, match="path must be a str or a"):
            jopt.save(path, {})


@pytest.mark.parametrize("metadata", [[1], "ab", {"a": {1, 2}}, 3])
def test_what_is_no_metadata(file, metadata):
    with pytest.raises(TypeError, match="metadata must be a dict of JSON, got"):
        jopt.save(file, {}, metadata=metadata)


def test_a_key_without_utf_8(file, tmp_path):
    tree = {"a": {"\ud800": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"got 'a/\\ud800' with half of one") as caught:
        jopt.save(file, tree)
    assert type(caught.value) is ValueError and not file.exists()
    jopt.save(tmp_path / "steps", tree)
    assert_same(jopt.restore(tmp_path / "steps"), tree)


def test_numbers_that_json_has_not_leave_the_file_json(file):
    metadata = {"loss": [np.inf, {"float": -np.inf}], "like": ["float", "nan"], "n": 7}
    tree = {"w": jnp.ones(2), "f": float("nan")}
    jopt.save(file, tree, metadata={**metadata, "nan": float("nan"), "x": 0.1})
    with safetensors.safe_open(file, "numpy") as opened:
        text = opened.metadata()["jopt"]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    assert content["metadata_outline"]["nan"] == ["float", "nan"]
    assert "metadata" not in content
    for found in (jopt.read_metadata(file), jopt.restore(file, with_metadata=True)[1]):
        assert np.isnan(found.pop("nan")) and found.pop("x") == 0.1
        assert found == metadata
