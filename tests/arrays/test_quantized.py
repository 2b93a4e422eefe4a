"""A quantized array is as small as it says, and every field is honoured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays import formats
from jopt.arrays.packing import unpack_codes
from jopt.arrays.quantized import QuantizedArray, dequantize, quantize_array
from jopt.arrays.rounding import stochastic
from jopt.arrays.scales import Scale, compute_range, compute_scale
from jopt.arrays.specs import QuantSpec, scale_shape
from tests.arrays.test_formats import FORMATS, every_kind, same_bits
from tests.arrays.test_scales import W, spec_of

RNG = np.random.default_rng(4)
INT4 = QuantSpec(formats.int4, group_size=16)


def same_leaves(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(same_bits, actual, expected)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (QuantSpec(formats.int8), 8 + 16 / 4096),
        (QuantSpec(formats.int4, group_size=32), 4.5),
        (QuantSpec(formats.int4, group_size=32, scale_dtype=jnp.float32), 5),
        (QuantSpec(formats.int4, group_size=128), 4.125),
        (QuantSpec(formats.int3, group_size=32), 3.5),
        (QuantSpec(formats.int2, group_size=32), 2.5),
        (QuantSpec(formats.int5, group_size=32), 5.5),
        (QuantSpec(formats.int6, group_size=32), 6.5),
        (QuantSpec(formats.int7, group_size=32), 7.5),
        (QuantSpec(formats.uint4, group_size=32, symmetric=False), 4.75),
        (QuantSpec(formats.uint3, group_size=32, symmetric=False), 3.75),
        (QuantSpec(formats.ternary, group_size=64), 2.25),
        (QuantSpec(formats.binary, group_size=64), 1.25),
        (QuantSpec(formats.nf4, group_size=64), 4.25),
        (QuantSpec(formats.fp4_e2m1, group_size=32), 4.5),
        (QuantSpec(formats.fp8_e4m3, axis=()), 8 + 16 / 2**17),
        (QuantSpec(formats.fp8_e5m2, group_size=32), 8.5),
        (QuantSpec(formats.mxfp8), 8.25),
        (QuantSpec(formats.mxfp4), 4.25),
        (QuantSpec(formats.nvfp4), 4.5 + 32 / 2**17),
    ],
    ids=repr,
)
def test_bits_per_weight(spec, bits):
    q = jax.eval_shape(lambda w: quantize_array(w, spec), jnp.zeros((4096, 32)))
    assert q.bits_per_weight == bits
    assert q.nbytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(q))
    assert q.shape == (4096, 32) and q.size == 2**17 and q.ndim == 2


@every_kind
@pytest.mark.parametrize("order", ["kn", "nk"])
def test_shape_and_scales_are_those_of_the_array(format, order):
    spec = spec_of(format)
    q = quantize_array(W, spec, order=order)
    assert q.shape == W.shape and q.dtype == W.dtype and q.spec == spec
    assert q.scale.shape == scale_shape(W.shape, spec)
    assert q.scale.dtype == spec.scale_dtype
    assert (q.zero_point is None) == spec.symmetric
    assert (q.outer_scale is None) == (format is not formats.nvfp4)
    assert (q.packed_axis is None) == (format.bits == 8)
    assert repr(q).startswith(f"QuantizedArray(float32[64, 6], {spec}")
    same_bits(dequantize(q), dequantize(quantize_array(W, spec)))


@pytest.mark.parametrize("format", [f for f in FORMATS if f.signed], ids=repr)
@pytest.mark.parametrize(
    ("dtype", "grouped"), [("float32", True), ("float32", False), ("bfloat16", True)]
)
def test_a_symmetric_array_quantizes_to_itself(format, dtype, grouped):
    """An asymmetric range moves with its zero point; theirs may not."""
    spec = spec_of(format) if grouped else QuantSpec(format)
    w = jnp.asarray(W * np.exp2(RNG.integers(-9, 9, (1, 6))), dtype)
    q = quantize_array(w, spec)
    wide = dataclasses.replace(q, dtype=jnp.dtype("float32"))
    again = quantize_array(dequantize(wide), spec)
    same_leaves(dataclasses.replace(again, dtype=q.dtype), q)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_float32_scales_quantize_to_themselves_too(name):
    w = RNG.normal(size=(8, 4000)).astype(np.float32)
    spec = QuantSpec(getattr(formats, name), scale_dtype=jnp.float32)
    q = quantize_array(w, spec)
    same_leaves(quantize_array(dequantize(q), spec), q)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float32])
def test_the_error_of_nearest_is_half_a_step(bits, scale_dtype):
    spec = QuantSpec(
        getattr(formats, f"int{bits}"), group_size=16, scale_dtype=scale_dtype
    )
    q = quantize_array(W, spec)
    error = np.abs(np.float64(dequantize(q)) - W).reshape(4, 16, 6)
    assert (error <= np.float64(q.scale)[:, None] * 0.5 * (1 + 1e-6)).all()


def test_stochastic_rounding_of_an_array_is_unbiased():
    draw = jax.jit(
        jax.vmap(
            lambda key: dequantize(
                quantize_array(W, INT4, rounding=stochastic, key=key)
            )
        )
    )
    keys = jax.random.split(jax.random.key(0), 2000)
    step = np.asarray(quantize_array(W, INT4).scale, np.float32).repeat(16, 0)
    inside = np.abs(W) <= 7 * step
    deviation = np.abs(np.mean(draw(keys), 0) - W) / step
    assert (deviation[inside] < 5 * 0.5 / np.sqrt(2000)).all()


def naive_dequantize(q):
    """NumPy, one field after the other, for stored codes in either order."""
    codes = q.codes
    if q.packed_axis is not None:
        bits, signed = q.spec.format.bits, q.spec.format.code_dtype == jnp.int8
        codes = unpack_codes(
            codes, bits, q.packed_size, axis=q.packed_axis, signed=signed
        )
    codes = np.asarray(codes)
    levels = codes.astype(np.float32)
    if q.spec.format.values:
        levels = np.float32(q.spec.format.values)[codes]
    if q.order == "nk":
        levels = levels.swapaxes(-1, -2)

    def spread(x):
        for axis, size in enumerate(levels.shape):
            x = x.repeat(size // x.shape[axis], axis)
        return x

    if q.zero_point is not None:
        levels = levels - spread(np.asarray(q.zero_point).astype(np.float32))
    step = np.float32(q.scale)
    if q.outer_scale is not None:
        step = step * np.asarray(q.outer_scale)
    w = levels * spread(step)
    if q.permutation is not None:
        unpermuted = np.empty_like(w)
        unpermuted[np.asarray(q.permutation)] = w
        w = unpermuted
    if q.input_scale is not None:
        w = w / np.asarray(q.input_scale)
    return w


@every_kind
@pytest.mark.parametrize("order", ["kn", "nk"])
def test_every_field_is_honoured_as_naive_numpy_does(format, order):
    q = quantize_array(W, spec_of(format), order=order)
    permutation = jnp.asarray(RNG.permutation(64), jnp.int32)
    input_scale = jnp.asarray(RNG.uniform(0.5, 2, (64, 1)), jnp.float32)
    both = {"permutation": permutation, "input_scale": input_scale}
    for fields in ({}, both, {"permutation": permutation})[: 3 if order == "kn" else 2]:
        changed = dataclasses.replace(q, **fields)
        same_bits(dequantize(changed), naive_dequantize(changed))
        assert changed.nbytes == q.nbytes + sum(x.nbytes for x in fields.values())


def test_stored_in_the_other_order_codes_are_the_transposed():
    q = quantize_array(W, INT4, order="nk")
    assert q.codes.shape == (6, 32) and q.packed_axis == -1 and q.packed_size == 64
    codes = unpack_codes(q.codes, 4, 64, signed=True)
    straight = quantize_array(W, INT4)
    assert straight.codes.shape == (32, 6) and straight.packed_axis == -2
    expected = unpack_codes(straight.codes, 4, 64, axis=0, signed=True)
    same_bits(codes, np.asarray(expected).T)
    eight = quantize_array(W, QuantSpec(formats.int8), order="nk")
    assert eight.codes.shape == (6, 64) and eight.shape == (64, 6)


@every_kind
@pytest.mark.parametrize("order", ["kn", "nk"])
def test_layers_of_a_stack_are_the_arrays_alone(format, order):
    """By vmap; and scan slices the stack into quantized arrays again."""
    spec = spec_of(format)
    layers = np.stack([W, 2 * W[::-1], W - 1]).astype(np.float32)

    def quantize(w):
        return quantize_array(w, spec, order=order)

    stack = jax.vmap(quantize)(layers)
    assert isinstance(stack, QuantizedArray) and stack.shape == layers.shape
    alone = [quantize(layer) for layer in layers]
    same_leaves(jax.tree.map(lambda *x: jnp.stack(x), *alone), stack)
    expected = np.stack([dequantize(q) for q in alone])
    same_bits(dequantize(stack), expected)

    def body(carry, q):
        assert q.shape == W.shape
        return carry, dequantize(q)

    _, scanned = jax.lax.scan(body, 0, stack)
    same_bits(scanned, expected)


@every_kind
def test_a_stack_whose_axis_is_kept_is_its_layers(format):
    """What rules for stacked leaves ask for: axis=(stacked, last)."""
    layers = np.stack([W, 2 * W[::-1], W - 1]).astype(np.float32)
    spec = spec_of(format, axis=(0, 2))
    stack = quantize_array(layers, spec)
    assert stack.spec.axis == (-3, -1)
    single = spec_of(format)
    expected = np.stack([dequantize(quantize_array(w, single)) for w in layers])
    same_bits(dequantize(stack), expected)
    _, scanned = jax.lax.scan(lambda c, q: (c, dequantize(q)), 0, stack)
    same_bits(scanned, expected)


def test_permutations_are_undone_per_layer_of_a_stack():
    layers = np.stack([W, 2 * W[::-1]]).astype(np.float32)
    orders = np.stack([RNG.permutation(64), RNG.permutation(64)]).astype(np.int32)

    def quantize(w, order):
        q = quantize_array(w[order], INT4)
        return dataclasses.replace(q, permutation=order)

    stack = jax.vmap(quantize)(layers, orders)
    together = dequantize(stack)
    _, scanned = jax.lax.scan(lambda c, q: (c, dequantize(q)), 0, stack)
    for i in range(2):
        expected = naive_dequantize(quantize(layers[i], orders[i]))
        same_bits(together[i], expected)
        same_bits(scanned[i], expected)


@pytest.mark.parametrize("axis", [0, 1, -1, (0,), (0, 1), (), None])
@pytest.mark.parametrize("shape", [(24, 10), (4, 24, 10)])
def test_any_axes_round_trip_within_half_a_step(shape, axis):
    w = RNG.normal(size=shape).astype(np.float32)
    spec = QuantSpec(formats.int4, axis=axis)
    q = quantize_array(w, spec)
    scale = np.broadcast_to(np.float32(q.scale), shape)
    assert (np.abs(dequantize(q) - w) <= scale * 0.5001).all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (3, 0)])
@pytest.mark.parametrize("name", ["int4", "int8", "fp8_e4m3", "nf4", "ternary"])
def test_scalars_vectors_and_nothing(shape, name):
    w = jnp.full(shape, -0.75)
    q = quantize_array(w, QuantSpec(getattr(formats, name), scale_dtype="float32"))
    assert q.shape == shape and q.size == w.size
    np.testing.assert_allclose(dequantize(q), w, rtol=1e-6)


def test_it_is_a_pytree_with_named_children():
    q = quantize_array(W, QuantSpec(formats.uint4, group_size=16, symmetric=False))
    leaves, treedef = jax.tree.flatten(q)
    assert len(leaves) == 3
    same_leaves(jax.tree.unflatten(treedef, leaves), q)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".codes", ".scale", ".zero_point"]
    copied = jax.tree.map(lambda x: x, q)
    assert copied.spec == q.spec and copied.shape == q.shape
    holes = jax.tree.map(lambda _: None, q)  # trees of anything must be possible
    assert "QuantizedArray" in repr(holes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.codes = leaves[0]


def test_it_passes_jit_without_compiling_again():
    run = jax.jit(lambda q: dequantize(q).sum())
    for factor in (1.0, 3.0):
        run(quantize_array(W * np.float32(factor), INT4))
    assert run._cache_size() == 1
    quantize = jax.jit(lambda w: quantize_array(w, INT4))
    for factor in (1.0, 3.0):
        same_leaves(quantize(W * np.float32(factor)), quantize_array(W * factor, INT4))
    assert quantize._cache_size() == 1


def test_dequantize_maps_a_tree_and_leaves_the_rest():
    q = quantize_array(W, INT4)
    bias = jnp.ones(3)
    tree = {"layers": [q, bias], "step": 3, "none": None}
    out = dequantize(tree)
    same_bits(out["layers"][0], dequantize(q))
    assert out["layers"][1] is bias and out["step"] == 3 and out["none"] is None
    shapes = jax.eval_shape(dequantize, {"q": q})
    assert shapes["q"].shape == W.shape and shapes["q"].dtype == W.dtype


def test_given_scales_are_used_and_clip():
    scale = Scale(jnp.full((1, 6), 0.125, jnp.float32))
    q = quantize_array(W, QuantSpec(formats.int4), scale=scale)
    assert q.scale.dtype == jnp.bfloat16
    same_bits(dequantize(q), np.round(W * 8).clip(-7, 7).astype(np.float32) / 8 + 0.0)
    same_leaves(quantize_array(W, q.spec, scale=scale.scale), q)
    own = compute_scale(*compute_range(jnp.asarray(W), INT4), INT4)
    same_leaves(quantize_array(W, INT4, scale=own), quantize_array(W, INT4))


@every_kind
def test_nan_under_given_scales_is_not_silent(format):
    spec = spec_of(format)
    scale = compute_scale(*compute_range(jnp.asarray(W), spec), spec)
    w = W.copy()
    w[3, 2] = np.nan
    out = np.isnan(dequantize(quantize_array(w, spec, scale=scale)))
    assert out[: spec.group_size, 2].all() and out.sum() == spec.group_size


def test_what_is_wrong_is_said_with_the_path():
    with pytest.raises(TypeError, match=r"w must be a float array, got int32.*'a/b'"):
        quantize_array(jnp.ones((64, 2), jnp.int32), INT4, path="a/b")
    with pytest.raises(ValueError, match=r"group_size must divide.*'a/b'"):
        quantize_array(jnp.ones((65, 2)), INT4, path="a/b")
    with pytest.raises(ValueError, match=r"order must be 'kn'.*'nk' for 'a/b'"):
        quantize_array(jnp.ones(64), INT4, order="nk", path="a/b")
    with pytest.raises(ValueError, match="key must be a PRNG key"):
        quantize_array(W, INT4, rounding=stochastic)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["int4", "int3", "uint4", "nf4", "mxfp8", "nvfp4"])
def test_explicit_mesh_has_the_bits_of_one_device(name, axis, explicit_mesh):
    """Groups that lie across devices (nf4, mxfp8, nvfp4 on axis 0) included."""
    options = {
        "int4": {"group_size": 8},
        "uint4": {"symmetric": False},
        "nf4": {"group_size": 16},
    }
    spec = QuantSpec(getattr(formats, name), **options.get(name, {}))
    w = jax.random.normal(jax.random.key(0), (64, 128))
    sharding = NamedSharding(explicit_mesh, PartitionSpec(*[None] * axis, "data"))
    with jax.set_mesh(explicit_mesh):
        back = dequantize(quantize_array(jax.device_put(w, sharding), spec))
    np.testing.assert_array_equal(back, dequantize(quantize_array(w, spec)))
