"""Checkpoints hold everything and give it back bit for bit."""

import dataclasses
import json
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding

from jopt.arrays import formats, packing, quantized
from jopt.trees import manifest
from jopt.trees.checkpoint import read_metadata, restore, save, steps

LARGE = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return manifest.canonical_bytes(np.asarray(leaf)).tobytes()


def assert_same(found, saved):
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
        assert type(a) is type(b)
        if not hasattr(b, "dtype"):
            assert a == b
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert bits(a) == bits(b)
        if isinstance(b, jax.Array):
            assert (a.sharding, a.committed) == (b.sharding, b.committed)


def round_trip(path, tree, *, like=None):
    save(path, tree)
    found = restore(path, like=like)
    assert_same(found, tree)
    return found


def file_sizes(path):
    return [file.stat().st_size for file in path.rglob("*") if file.is_file()]


def of_dtype(dtype):
    return (np.arange(12).reshape(3, 4) % 2).astype(jnp.dtype(dtype))


def test_plain_tree_of_everything(tmp_path):
    tree = {
        "params": [{"w": jnp.asarray(LARGE), "b": jnp.ones(3, jnp.bfloat16)}],
        "step": 17,
        "count": jnp.int32(3),
        "lr": np.float32(0.1),
        "best": float("inf"),
        "note": ("text", b"bytes", None, True, 2j),
        "numpy": np.arange(3, dtype=np.int64),
        "large_numpy": LARGE.astype(np.float64),
        "data": {"epoch": 2, "next_index": [5, 6], "shuffle": {"seed": 0}},
        "empty": ({}, [], (), jnp.zeros((0, 3)), np.zeros(0, np.int16)),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
    }
    found = round_trip(tmp_path, tree)
    assert jax.random.key_impl(found["keys"]) == "rbg"
    assert jnp.array_equal(
        jax.random.uniform(found["key"]), jax.random.uniform(tree["key"])
    )
    found["numpy"] += 1


@pytest.mark.parametrize("large", [False, True])
def test_every_dtype(tmp_path, large):
    names = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
    names += ["float4_e2m1fn", "int2", "uint2", "int4", "uint4", "int8", "uint8"]
    names += ["int16", "uint32", "bool", "complex64"]
    tree = {name: of_dtype(name) for name in names}
    if large:
        tree = jax.tree.map(lambda x: np.tile(x, (100, 300)), tree)
    round_trip(tmp_path, jax.device_put(tree))


@pytest.mark.parametrize("tree", [{}, [], None, 3, jnp.ones(2), jnp.zeros(0), "text"])
def test_roots_of_any_kind(tmp_path, tree):
    round_trip(tmp_path, tree)


def test_negative_zero_nan_payload_and_subnormals(tmp_path):
    words = np.array([0x80000000, 0x7FC00001, 0xFFC12345, 1], np.uint32)
    round_trip(tmp_path, {"w": jnp.asarray(words.view(np.float32))})


def test_masks_packed_or_not_with_holes(tmp_path):
    mask = jnp.arange(64).reshape(4, 16) % 3 == 0
    tree = {
        "packed": packing.pack_mask(mask),
        "bool": mask,
        "hole": optax.MaskedNode(),
    }
    round_trip(tmp_path, tree)


FORMATS = [getattr(formats, name) for name in formats.__all__]
FORMATS = [format for format in FORMATS if isinstance(format, formats.Format)]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_quantized_leaves_need_no_template(tmp_path, format):
    symmetric = format.signed or format.kind != "integer"
    spec = quantized.QuantSpec(format, symmetric=symmetric)
    tree = {"q": quantized.quantize_array(jnp.asarray(LARGE), spec), "b": jnp.ones(2)}
    found = round_trip(tmp_path, tree)
    assert found["q"].spec == spec and hash(found["q"].spec) == hash(tree["q"].spec)
    assert_same(quantized.dequantize(found), quantized.dequantize(tree))


def test_quantized_leaves_with_all_fields(tmp_path):
    spec = quantized.QuantSpec(formats.uint4, group_size=32, symmetric=False)
    q = quantized.quantize_array(jnp.asarray(LARGE), spec, order="nk")
    q = dataclasses.replace(
        q, permutation=jnp.arange(256)[::-1], input_scale=jnp.full((256, 1), 2.0)
    )
    round_trip(tmp_path, {"q": [q]})
    other = quantized.quantize_array(
        jnp.asarray(LARGE), quantized.QuantSpec(formats.uint4, symmetric=False)
    )
    with pytest.raises(ValueError, match="at 'q/0/scale': saved bfloat16"):
        restore(tmp_path, like={"q": [dataclasses.replace(q, scale=other.scale)]})
    with pytest.raises(ValueError, match="at 'q/0/order': saved 'nk', got 'kn'"):
        restore(tmp_path, like={"q": [dataclasses.replace(q, order="kn")]})


def test_quantized_leaves_are_small_on_disk(tmp_path):
    spec = quantized.QuantSpec(formats.int4, group_size=32)
    save(tmp_path, {"q": quantized.quantize_array(jnp.asarray(LARGE), spec)})
    assert sum(file_sizes(tmp_path)) < LARGE.size * 4.5 / 8 + 4096


def test_weak_types_stay_weak(tmp_path):
    tree = {"weak": jnp.asarray(2.0), "strong": jnp.float32(2.0)}
    assert tree["weak"].weak_type
    found = round_trip(tmp_path, tree)
    assert found["weak"].weak_type and not found["strong"].weak_type


def test_awkward_names(tmp_path):
    names = ["a/b", "a.b", "", "..", "ü x", "small leaves", "0", "d", "a" * 300]
    tree = {name: jnp.asarray(LARGE + i) for i, name in enumerate(names)}
    tree["a"] = {"b": jnp.asarray(LARGE - 1)}
    round_trip(tmp_path, tree)


def zeros_like(leaf):
    return jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else leaf


class Custom(NamedTuple):
    a: object
    b: object


@pytest.mark.parametrize(
    "tree",
    [
        optax.adam(1e-3).init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}),
        optax.chain(
            optax.masked(optax.adam(1e-3), {"w": True, "b": False}),
            optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        ).init({"w": jnp.ones(2), "b": jnp.ones(3)}),
        {"x": Custom({"w": jnp.ones(2)}, [Custom(1, None)])},
        FrozenDict({"w": jnp.ones(2)}),
        nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
        nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
    ],
    ids=["adam", "chain", "namedtuple", "frozen", "nnx", "rngs"],
)
def test_custom_nodes_need_like(tmp_path, tree):
    round_trip(tmp_path, tree, like=jax.tree.map(zeros_like, tree))
    with pytest.raises(ValueError, match="like must be given to restore the "):
        restore(tmp_path)


def test_equinox_module(tmp_path):
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    like = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(1))
    save(tmp_path, model)
    found = restore(tmp_path, like=like)
    assert eqx.tree_equal(found, model)
    assert jnp.array_equal(found(jnp.ones(2)), model(jnp.ones(2)))


def test_abstract_template(tmp_path):
    tree = {"w": jnp.ones((2, 3)), "n": np.ones(2), "k": jax.random.key(0)}
    save(tmp_path, tree)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert_same(restore(tmp_path, like=abstract), tree)


def test_like_never_casts(tmp_path):
    save(tmp_path, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"'w': saved float32\[3\], got bfloat16\[3\]"):
        restore(tmp_path, like={"w": jnp.ones(3, jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"'w': saved float32\[3\], got float32\[4\]"):
        restore(tmp_path, like={"w": jnp.ones(4)})
    assert type(restore(tmp_path, like={"w": np.ones(3, "f")})["w"]) is np.ndarray
    save(tmp_path, {"w": np.ones(3)}, step=1)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        restore(
            tmp_path,
            like={"w": jax.ShapeDtypeStruct((3,), np.float64, sharding=sharding)},
        )


def sharded(mesh, spec, dtype=jnp.float32):
    return jax.device_put(LARGE.astype(dtype), NamedSharding(mesh, jax.P(*spec)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint4"])
def test_sharded_leaves_come_back_sharded(tmp_path, auto_mesh, explicit_mesh, dtype):
    tree = {
        "rows": sharded(auto_mesh, ("data",), dtype),
        "columns": sharded(explicit_mesh, (None, "data"), dtype),
        "replicated": sharded(auto_mesh, (), dtype),
        "small": jax.device_put(jnp.arange(8), NamedSharding(auto_mesh, jax.P("data"))),
        "elsewhere": jax.device_put(jnp.ones(2), jax.devices()[3]),
    }
    round_trip(tmp_path, tree)


def test_restore_on_another_mesh(tmp_path, auto_mesh):
    save(tmp_path, {"w": sharded(auto_mesh, ("data",))})
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for spec in [("b", "a"), ("a",), (None, ("a", "b")), ()]:
        sharding = NamedSharding(mesh, jax.P(*spec))
        like = {"w": jax.ShapeDtypeStruct(LARGE.shape, jnp.float32, sharding=sharding)}
        found = restore(tmp_path, like=like)["w"]
        assert found.sharding == sharding
        assert bits(found) == LARGE.tobytes()
    found = restore(tmp_path, like={"w": jnp.asarray(LARGE)})["w"]
    assert len(found.sharding.device_set) == 1
    assert bits(found) == LARGE.tobytes()


def test_sharded_leaves_are_hashed_by_shard(tmp_path, auto_mesh, monkeypatch):
    sizes = []
    original = manifest.leaf_checksum

    def watch(path, dtype, shape, block):
        sizes.append(block.nbytes)
        return original(path, dtype, shape, block)

    monkeypatch.setattr(manifest, "leaf_checksum", watch)
    round_trip(tmp_path, {"w": sharded(auto_mesh, ("data",))})
    assert sizes == [LARGE.nbytes // 8] * 16


def test_steps_metadata_and_max_to_keep(tmp_path):
    for step in (1, 10, 2):
        save(tmp_path, {"x": step}, step=step, metadata={"loss": step / 2})
    assert steps(tmp_path) == [1, 2, 10]
    assert restore(tmp_path) == {"x": 10}
    assert restore(tmp_path, step=2) == {"x": 2}
    assert read_metadata(tmp_path) == {"loss": 5.0}
    assert read_metadata(tmp_path, step=1) == {"loss": 0.5}
    save(tmp_path, {"x": 11}, step=11, max_to_keep=2)
    assert steps(tmp_path) == [10, 11]
    # The step just saved stays, even if it is not among the newest.
    save(tmp_path, {"x": 3}, step=3, max_to_keep=1)
    assert steps(tmp_path) == [3]


def test_existing_step(tmp_path):
    save(tmp_path, {"x": 1}, step=4)
    with pytest.raises(ValueError, match=r"got 4, which is intact .*overwrite=True"):
        save(tmp_path, {"x": 2}, step=4)
    assert restore(tmp_path) == {"x": 1}
    for value in (2, 3):
        save(tmp_path, {"x": value}, step=4, overwrite=True)
        assert restore(tmp_path, step=4) == {"x": value}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step must be an integer from 0, got -1"),
        ({"step": 1.5}, "step must be an integer from 0, got 1.5"),
        ({"max_to_keep": 1.5}, "max_to_keep must be an integer of at least 1, got 1.5"),
        ({"max_to_keep": 0}, "max_to_keep must be an integer of at least 1"),
    ],
)
def test_wrong_numbers(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path, {}, **arguments)


def test_wrong_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none"):
        restore(tmp_path / "nowhere")
    save(tmp_path / "a", {}, step=3)
    with pytest.raises(FileNotFoundError, match=r"got 5; .* holds \[3\]"):
        restore(tmp_path / "a", step=5)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a directory"):
        save(tmp_path / "file", {})
    with pytest.raises(ValueError, match="on a file system"):
        save("gs://bucket/ckpt", {})
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        save(tmp_path / "b", {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_many_small_leaves_cost_little(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        f"layers/{i}": {
            name: jnp.asarray(rng.normal(size=size), jnp.float32)
            for name, size in [("codes", (16, 24)), ("scale", 24), ("bias", 24)]
        }
        for i in range(60)
    }
    save(tmp_path, tree)
    size = sum(file_sizes(tmp_path))
    data = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert size < 1.1 * data + 4096


def test_zeros_compress(tmp_path):
    pruned = np.where(np.random.default_rng(1).random(LARGE.shape) < 0.9, 0, LARGE)
    save(tmp_path, {"w": jnp.asarray(pruned)})
    assert sum(file_sizes(tmp_path)) < 0.2 * LARGE.nbytes


def test_manifest_reads_as_json(tmp_path):
    save(tmp_path, {"w": jnp.ones(2), "s": ml_dtypes.bfloat16(1)})
    content = manifest.read(tmp_path / "0")
    row = json.loads(json.dumps(content))["leaves"][0]
    assert row["path"] == "w" and row["shape"] == [2] and row["dtype"] == "float32"
