"""Weights leave for compressed-tensors and come back: the very same numbers.

The golden directories were written by the package itself, see
golden/make_compressed_tensors.py, with its own decompressed weights beside them.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jopt
from jopt.arrays import formats
from jopt.arrays.quantized import quantize_array
from jopt.trees import container
from jopt.trees.compressed_tensors.words import pack_words, unpack_words

GOLDEN = pathlib.Path(__file__).parent / "golden" / "compressed_tensors"
CASES = sorted(path.name for path in GOLDEN.iterdir())
RNG = np.random.default_rng(0)
W = RNG.normal(size=(64, 12)).astype(np.float32)


def as_bits(array):
    return np.asarray(array).astype(np.float32).view(np.uint32)


@pytest.mark.parametrize("case", CASES)
def test_what_the_package_compressed(case):
    dense = container.read_file(GOLDEN / case / "dense.st")[0]["weight"]
    tensors, config = jopt.read_compressed_tensors(GOLDEN / case)
    assert tensors.keys() == {"model.up.weight", "lm_head.weight"}
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    q = tensors["model.up.weight"]
    assert q.shape == dense.shape and q.dtype == dense.dtype
    assert q.spec.format.name == case.partition("_")[0]
    assert q.spec.symmetric == ("asymmetric" not in case)
    assert np.array_equal(as_bits(jopt.dequantize(q)), as_bits(dense))
    # The other way round without a change of codes.
    turned, _ = jopt.read_compressed_tensors(
        GOLDEN / case, transposed=jopt.matching("model.*")
    )
    turned = turned["model.up.weight"]
    assert turned.shape == dense.shape[::-1] and turned.order == "nk"
    assert np.array_equal(turned.codes, q.codes)
    assert np.array_equal(as_bits(jopt.dequantize(turned)), as_bits(dense.T))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_written_again_is_the_same(case, transposed, tmp_path):
    def select(name, leaf):
        return transposed

    tensors, config = jopt.read_compressed_tensors(GOLDEN / case, transposed=select)
    inputs = (
        jopt.QuantSpec(formats.int8) if config["format"] != "pack-quantized" else None
    )
    jopt.write_compressed_tensors(
        tmp_path,
        tensors,
        names=lambda path: path,
        transposed=select,
        activations=inputs,
    )
    found, _ = container.read_file(tmp_path / "model.safetensors")
    wanted, _ = container.read_file(GOLDEN / case / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert np.array_equal(found[name], tensor)
    new = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for key in ("quant_method", "format", "quantization_status"):
        assert new[key] == config[key]
    weights = config["config_groups"]["group_0"]["weights"]
    group = new["config_groups"]["group_0"]
    assert group["targets"] == ["model.up"]
    for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
        assert group["weights"][key] == weights[key]


def bit_stream(words):
    """Read a line of words as one number, the naive way."""
    return sum(int(word) % 2**32 << (32 * i) for i, word in enumerate(words))


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_codes_of_any_width(bits):
    codes = RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 37)).astype(np.int8)
    for axis, turned in [(1, codes), (0, codes.T)]:
        words = pack_words(turned, bits, axis=axis)
        lines = words if axis == 1 else words.T
        assert words.dtype == np.int32 and lines.shape[1] == -(-37 * bits // 32)
        for line, wanted in zip(lines, codes, strict=True):
            stream = bit_stream(line)
            for i, code in enumerate(wanted):
                assert (stream >> (bits * i)) % 2**bits - 2 ** (bits - 1) == code
        assert np.array_equal(unpack_words(words, bits, 37, axis=axis), turned)


SPECS = {
    "int4_group": jopt.QuantSpec(formats.int4, group_size=16),
    "uint4_group": jopt.QuantSpec(formats.uint4, group_size=32, symmetric=False),
    "int4_asymmetric": jopt.QuantSpec(formats.int4, symmetric=False),
    "int8_channel": jopt.QuantSpec(formats.int8),
    "uint8": jopt.QuantSpec(formats.uint8, symmetric=False),
    "int2": jopt.QuantSpec(formats.int2, group_size=8),
    "tensor": jopt.QuantSpec(formats.int5, axis=()),
    "tensor_uint": jopt.QuantSpec(formats.uint3, axis=(), symmetric=False),
    "float32": jopt.QuantSpec(formats.int4, group_size=8, scale_dtype=jnp.float32),
}


def decompress(tensors, module, weights, dtype):
    """Decode a module as the package does: in the dtype of the scales."""
    bits = weights["num_bits"]
    scale = tensors[f"{module}.weight_scale"]
    offset, point = 2 ** (bits - 1), 0
    rows, columns = map(int, tensors[f"{module}.weight_shape"])
    codes = np.empty((rows, columns), np.int64)
    for i, line in enumerate(tensors[f"{module}.weight_packed"]):
        stream = bit_stream(line)
        codes[i] = [(stream >> (bits * j)) % 2**bits - offset for j in range(columns)]
    if not weights["symmetric"]:
        point = tensors[f"{module}.weight_zero_point"].astype(np.int64)
        if weights["strategy"] != "tensor":
            streams = [bit_stream(line) for line in point.T]
            point = np.array(
                [
                    [(s >> (bits * i)) % 2**bits - offset for s in streams]
                    for i in range(rows)
                ]
            )
            point = np.repeat(point, columns // point.shape[1], axis=1)
    assert scale.dtype == dtype
    wide = scale.astype(np.float64)
    if scale.ndim == 2:
        wide = np.repeat(wide, columns // scale.shape[1], axis=1)
    return ((codes - point) * wide).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "order"),
    [(np.float32, "kn"), (ml_dtypes.bfloat16, "nk"), (np.float16, "nk")],
)
@pytest.mark.parametrize("name", SPECS)
def test_written_weights_decode_to_the_same_numbers(tmp_path, name, dtype, order):
    q = quantize_array(W.astype(dtype), SPECS[name], order=order)
    jopt.write_compressed_tensors(tmp_path, {"up": {"kernel": q}})
    tensors, _ = container.read_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    wanted = np.asarray(jopt.dequantize(q))
    # Half precision does not hold float32 scales, so there they stay float32.
    exact = dtype == np.float32 or name != "float32"
    found = decompress(tensors, "up", weights, dtype if exact else np.float32)
    assert np.array_equal(as_bits(found.T.astype(dtype)), as_bits(wanted))
    back, _ = jopt.read_compressed_tensors(tmp_path, transposed=jopt.matching("up.*"))
    back = jopt.dequantize(back["up.weight"]).astype(dtype)
    assert np.array_equal(as_bits(back), as_bits(wanted))


def test_float16_beyond_its_range_is_infinite_there(tmp_path):
    q = jopt.quantize(np.full((32, 2), 65504, np.float16), SPECS["int8_channel"])
    q = dataclasses.replace(q, scale=q.scale * 2)
    jopt.write_compressed_tensors(tmp_path, {"up": q})
    tensors, _ = container.read_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    with np.errstate(over="ignore"):
        found = decompress(tensors, "up", weights, np.float16)
    assert np.all(np.isinf(found)) and float(jopt.dequantize(q).max()) == 65504


def test_a_model_goes_out_and_runs_when_it_is_back(tmp_path):
    def mlp(params, x):
        hidden = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"][None])
        return hidden @ params["down"]["kernel"]

    params = {
        "up": {"kernel": jnp.asarray(W), "bias": jnp.ones(12)},
        "down": {"kernel": jnp.asarray(W[:12, :8])},
        "table": {"embedding": jnp.asarray(W)},
    }
    rules = {"up/.*": SPECS["int4_group"], "down/.*": SPECS["int8_channel"]}
    packed = jopt.quantize(params, {**rules, ".*": None})
    (tmp_path / "config.json").write_text('{"hidden_size": 12}')
    jopt.write_compressed_tensors(tmp_path, packed)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == 12
    groups = config["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["down"], ["up"]]
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    tensors, _ = jopt.read_compressed_tensors(
        tmp_path, transposed=jopt.matching("up.weight", "down.weight")
    )
    assert np.array_equal(tensors["table.weight"], W)
    found = {
        "up": {"kernel": tensors["up.weight"], "bias": tensors["up.bias"]},
        "down": {"kernel": tensors["down.weight"]},
    }
    x = jnp.asarray(RNG.normal(size=(5, 64)), jnp.float32)
    floats = jopt.dequantize((found, packed))
    assert np.array_equal(floats[0]["up"]["kernel"], floats[1]["up"]["kernel"])
    assert np.array_equal(floats[0]["down"]["kernel"], floats[1]["down"]["kernel"])
    run = jax.jit(jopt.execute(mlp))  # whose sums go over codes as they lie
    np.testing.assert_allclose(run(found, x), run(packed, x), rtol=1e-5, atol=1e-5)


def test_int8_with_int8_inputs(tmp_path):
    int8 = jopt.QuantSpec(formats.int8)
    q = jopt.quantize(W, int8)
    jopt.write_compressed_tensors(tmp_path, {"up": q}, activations=int8)
    tensors, config = jopt.read_compressed_tensors(tmp_path)
    assert config["format"] == "int-quantized"
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (
        8,
        "token",
        True,
    )
    assert np.array_equal(jopt.dequantize(tensors["up.weight"]).T, jopt.dequantize(q))
    with pytest.raises(ValueError, match="activations must be left out for weights of"):
        q = jopt.quantize(W, SPECS["int4_group"])
        jopt.write_compressed_tensors(
            tmp_path, {"up": q}, activations=int8, overwrite=True
        )
    for other in (dataclasses.replace(int8, axis=-1), SPECS["int4_group"]):
        with pytest.raises(ValueError, match="activations must be jopt"):
            jopt.write_compressed_tensors(tmp_path / "x", {"up": q}, activations=other)


Q = jopt.quantize(W, SPECS["int4_group"])


@pytest.mark.parametrize(
    ("tree", "arguments", "message"),
    [
        (
            {"embedding": Q},
            {},
            "shared along its inputs if it is .in, out., got False by",
        ),
        ({"w": jopt.quantize(W, SPECS["tensor"])}, {"transposed": None}, None),
        ({"up": jopt.quantize(W, SPECS["tensor"])}, {}, "say whether 'up' of shape"),
        ({"up": W}, {}, r"say whether 'up' of shape \(64, 12\) is \[in, out\]"),
        (
            {"up": Q},
            {"transposed": lambda *_: False},
            "got False by transposed; quantize",
        ),
        (
            {"bias": W[0]},
            {"transposed": lambda *_: True},
            "choose matrices, got 'bias'",
        ),
        ({"up": Q}, {"transposed": jopt.matching("dwn")}, "near names: 'up'"),
        ({"up": Q}, {"names": lambda path: path}, "end in '.weight' for quantized"),
        ({"a": {"w": W, "kernel": W}}, {}, "got 'a.weight' again for 'a/w'"),
        ({"up": 3}, {}, "must hold arrays, got int at 'up'"),
        ({"up": jnp.ones(3, jnp.int4)}, {}, "dtypes that safetensors has, got int4"),
        ({"up": jopt.quantize(W, jopt.QuantSpec(formats.nf4))}, {}, "integer formats"),
        (
            {"up": dataclasses.replace(Q, input_scale=jnp.ones((64, 1)))},
            {},
            r"without permutation or input scale, got .*\['input_scale'\] at 'up'",
        ),
        (
            {"up": jopt.quantize(np.ones((2, 32, 4), "f"), SPECS["int4_group"])},
            {},
            "quantized matrices of integer formats",
        ),
    ],
)
def test_what_has_no_form_there_is_refused(tmp_path, tree, arguments, message):
    if message is None:
        return jopt.write_compressed_tensors(tmp_path, tree, **arguments)
    with pytest.raises((ValueError, TypeError), match=message):
        jopt.write_compressed_tensors(tmp_path, tree, **arguments)
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced_unasked(tmp_path):
    jopt.write_compressed_tensors(tmp_path, {"up": Q})
    with pytest.raises(ValueError, match="pass overwrite=True"):
        jopt.write_compressed_tensors(tmp_path, {"down": Q})
    assert jopt.read_compressed_tensors(tmp_path)[0].keys() == {"up.weight"}
    jopt.write_compressed_tensors(tmp_path, {"down": Q}, overwrite=True)
    assert jopt.read_compressed_tensors(tmp_path)[0].keys() == {"down.weight"}


@pytest.fixture
def model(tmp_path):
    """A directory to be changed: its config, and its tensors."""
    jopt.write_compressed_tensors(tmp_path, {"up": Q, "bias": W[0]})

    def change(edit):
        config = json.loads((tmp_path / "config.json").read_text())
        tensors = dict(container.read_file(tmp_path / "model.safetensors")[0])
        tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
        edit(config["quantization_config"], tensors)
        container.write_file(tmp_path / "model.safetensors", tensors, {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return change


def group(config):
    return config["config_groups"]["group_0"]


def without(name):
    return lambda config, tensors: tensors.pop(f"up.{name}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c, t: c.update(quant_method="gptq"),
            "by compressed-tensors, got 'gptq'",
        ),
        (
            lambda c, t: group(c).update(format="nvfp4-pack-quantized"),
            "in the format pack",
        ),
        (lambda c, t: group(c)["weights"].update(type="float"), "got float in pack-"),
        (lambda c, t: group(c).update(targets=["down"]), "got 0 groups for it"),
        (lambda c, t: group(c)["weights"].update(num_bits=3), "codes of 3 bits"),
        (
            lambda c, t: group(c)["weights"].update(group_size=64),
            "the strategy 'group'",
        ),
        (lambda c, t: group(c)["weights"].update(strategy="block"), "strategy 'block'"),
        (lambda c, t: group(c)["weights"].update(symmetric=False), "have zero points"),
        (without("weight_scale"), "codes of 4 bits for a matrix and its scales"),
        (without("weight_shape"), "codes of 4 bits for a matrix and its scales"),
        (without("weight_packed"), "codes of 4 bits for a matrix and its scales"),
        (
            lambda c, t: t.update({"up.weight_zero_point": np.ones((12, 4), np.int8)}),
            "no zero points, as config.json says",
        ),
        (
            lambda c, t: t.update({"up.weight_g_idx": np.zeros(64, np.int32)}),
            "an order by activations",
        ),
    ],
)
def test_what_is_not_understood_is_refused(model, edit, message):
    with pytest.raises(ValueError, match=message):
        jopt.read_compressed_tensors(model(edit))


def test_how_modules_are_named_in_the_config(model):
    for targets in (["Linear"], ["re:.*p$"], ["up"]):
        path = model(lambda config, _, t=targets: group(config).update(targets=t))
        assert jopt.read_compressed_tensors(path)[0]["up.weight"].shape == (12, 64)

    def two(config, tensors):
        other = {**group(config), "targets": ["Embedding"]}
        config["config_groups"]["group_1"] = other

    # A name decides before a class.
    assert jopt.read_compressed_tensors(model(two))
    with pytest.raises(ValueError, match="got 2 groups for it; name it in `targets`"):
        jopt.read_compressed_tensors(
            model(lambda config, _: group(config).update(targets=["Linear"]))
        )


def test_several_files_and_missing_ones(model, tmp_path):
    path = model(lambda config, tensors: None)
    container.write_file(path / "more.safetensors", {"big": np.arange(3)}, {})
    found = jopt.read_compressed_tensors(path)[0]["big"]
    assert type(found) is np.ndarray and found.dtype == np.int64  # JAX would cut it
    container.write_file(path / "more.safetensors", {"bias": W[0]}, {})
    with pytest.raises(ValueError, match="got 'bias' again in more"):
        jopt.read_compressed_tensors(path)
    for name in ("more.safetensors", "model.safetensors"):
        (path / name).unlink()
    with pytest.raises(FileNotFoundError, match="safetensors files"):
        jopt.read_compressed_tensors(path)
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        jopt.read_compressed_tensors(tmp_path / "nowhere")
    (path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(jopt.CheckpointError, match=r"model\.safetensors is damaged"):
        jopt.read_compressed_tensors(path)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_the_package_reads_it_to_the_same_numbers(tmp_path, name, dtype):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    q = jopt.quantize(W.astype(dtype), SPECS[name])
    wide = jopt.QuantSpec(formats.int8)
    for inputs in [None, wide] if q.spec.format.bits == 8 else [None]:
        jopt.write_compressed_tensors(
            tmp_path, {"up": {"kernel": q}}, activations=inputs, overwrite=True
        )
        raw = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        scheme = QuantizationConfig(**raw).config_groups["group_0"]
        tensors = load_file(tmp_path / "model.safetensors")
        state = {key.removeprefix("up."): tensor for key, tensor in tensors.items()}
        registry = compressors.BaseCompressor
        compressor = registry.get_value_from_registry(scheme.format)
        found = compressor.decompress(state, scheme)["weight"].float().numpy()
        found = found.T.astype(dtype)
        assert np.array_equal(as_bits(found), as_bits(jopt.dequantize(q)))
