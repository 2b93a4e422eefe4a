"""A view of a quantized array stands for the very numbers of the view of the array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jopt
from jopt.arrays.quantized import QuantizedArray, QuantSpec, quantize_array
from jopt.arrays.quantized_views import view

F = jopt.formats
RNG = np.random.default_rng(5)
SPECS = [
    QuantSpec(F.int8),
    QuantSpec(F.int8, axis=()),
    QuantSpec(F.int8, axis=(0, -1)),
    QuantSpec(F.int4),
    QuantSpec(F.int4, group_size=4),
    QuantSpec(F.int8, axis=0, group_size=2),
    QuantSpec(F.int3, axis=0),
    QuantSpec(F.uint4, symmetric=False),
    QuantSpec(F.nf4, axis=(0, 1)),
    QuantSpec(F.fp8_e4m3, axis=0),
]


KINDS = ["transpose", "swap", "reshape", "slice", "dynamic", "split", "convert"]
KINDS += ["squeeze", "expand"]


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def apply_both(q, operation, *operands):
    """Take a view of both, by the parameters that JAX gives the operation."""
    dense = q.to_array()
    eqn = jax.make_jaxpr(operation)(dense, *operands).eqns[-1]  # after its indices
    return view(q, eqn.primitive.name, eqn.params, operands), operation(
        dense, *operands
    )


def assert_same(q, dense):
    assert q.shape == dense.shape and q.dtype == dense.dtype
    np.testing.assert_array_equal(
        np.asarray(q.to_array(), np.float32), np.asarray(dense, np.float32)
    )


def draw_shape(data, shape):
    """Draw a shape of as many elements: merge and split axes, add and drop ones."""
    factors = [p for n in shape for p in {12: (3, 2, 2)}.get(n, PRIMES.get(n, (n,)))]
    new = [1]
    for p in factors:
        if data.draw(st.booleans()):
            new[-1] *= p
        else:
            new.append(p)
    new.insert(data.draw(st.integers(0, len(new))), 1)
    return [n for n in new if n > 1 or data.draw(st.booleans())] or [1]


PRIMES = {4: (2, 2), 6: (2, 3), 8: (2, 2, 2), 16: (2, 2, 2, 2)}


def draw_operation(data, shape):
    """Draw an operation that moves or slices, and its traced operands."""
    ndim = len(shape)
    axis = data.draw(st.integers(0, ndim - 1))
    kind = data.draw(st.sampled_from(KINDS))
    if kind == "transpose":
        order = tuple(data.draw(st.permutations(range(ndim))))
        return functools.partial(lax.transpose, permutation=order), ()
    if kind == "swap" and ndim >= 2:
        return functools.partial(jnp.swapaxes, axis1=-1, axis2=-2), ()
    if kind == "reshape":
        new = draw_shape(data, shape)
        return functools.partial(lax.reshape, new_sizes=new), ()
    if kind == "slice":
        start = data.draw(st.integers(0, shape[axis] - 1))
        stride = data.draw(st.integers(1, 2))
        return functools.partial(
            lax.slice,
            start_indices=[start if a == axis else 0 for a in range(ndim)],
            limit_indices=shape,
            strides=[stride if a == axis else 1 for a in range(ndim)],
        ), ()
    if kind == "dynamic":
        starts = [jnp.int32(data.draw(st.integers(0, n))) for n in shape]
        sizes = [1 if a == axis else n for a, n in enumerate(shape)]
        return (lambda x, *i: lax.dynamic_slice(x, i, sizes)), tuple(starts)
    if kind == "split":
        first = data.draw(st.integers(1, shape[axis]))
        sizes = [n for n in (first, shape[axis] - first) if n]
        return functools.partial(lax.split, sizes=sizes, axis=axis), ()
    if kind == "convert":
        return (lambda x: x.astype(jnp.bfloat16)), ()
    if kind == "expand":
        return functools.partial(jnp.expand_dims, axis=axis), ()
    ones = [a for a, n in enumerate(shape) if n == 1]
    return functools.partial(lax.squeeze, dimensions=ones[:1]), ()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_chains_of_views(data):
    """Whatever stays quantized decodes to the very numbers."""
    spec = data.draw(st.sampled_from(SPECS))
    shapes = [(8, 16), (3, 8, 12), (2, 8, 4, 8), (1, 8, 4), (8, 1, 4), (8, 4, 1)]
    shape = data.draw(st.sampled_from(shapes))
    order = data.draw(st.sampled_from(["kn", "nk"]))
    try:
        q = quantize_array(normal(*shape), spec, order=order)
    except ValueError:  # groups do not fit
        return
    for _ in range(data.draw(st.integers(1, 6))):
        operation, operands = draw_operation(data, q.shape)
        if not jax.make_jaxpr(operation)(q.to_array(), *operands).eqns:
            continue
        found, dense = apply_both(q, operation, *operands)
        if found is None:  # decoded: nothing to hold to account
            continue
        if isinstance(found, tuple):
            for one, want in zip(found, dense, strict=True):
                assert_same(one, want)
            found = found[-1]
        else:
            assert_same(found, dense)
        q = found
        if q.ndim == 0:
            return


def test_swapped_codes_move_where_the_last_axes_do_not_stay():
    q = quantize_array(normal(1, 3, 4), QuantSpec(F.int8, axis=()))
    swap = functools.partial(lax.transpose, permutation=(0, 2, 1))
    turned, dense = apply_both(q, swap)
    assert turned.order == "nk"
    for shape in [(4, 3, 1), (4, 3), (1, 4, 3, 1), (1, 1, 4, 3)]:
        found, dense = apply_both(turned, lambda x, n=shape: lax.reshape(x, n))
        assert_same(found, dense)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3], SPECS[4], SPECS[7]], ids=repr)
@pytest.mark.parametrize("order", ["kn", "nk"])
def test_a_matrix_is_transposed_by_name(spec, order):
    """No code moves, unless groups would run along another axis than the spec says."""
    q = quantize_array(normal(8, 16), spec, order=order)
    found, dense = apply_both(q, functools.partial(lax.transpose, permutation=(1, 0)))
    assert_same(found, dense)
    assert found.codes is q.codes and found.order != q.order


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3], SPECS[4]], ids=repr)
def test_the_layers_of_a_stack(spec):
    stacked = QuantSpec(spec.format, axis=(0, -1), group_size=spec.group_size)
    q = quantize_array(normal(3, 8, 16), stacked)
    found, dense = apply_both(
        q, lambda x, *i: lax.dynamic_slice(x, i, (1, 8, 16)), *map(jnp.int32, (2, 0, 0))
    )
    assert_same(found, dense)
    found, dense = apply_both(found, functools.partial(lax.squeeze, dimensions=(0,)))
    assert_same(found, dense)


@pytest.mark.parametrize("axis, parts", [(0, 2), (1, 3)])
def test_split_and_unstack(axis, parts):
    q = quantize_array(normal(8, 12), QuantSpec(F.int8))
    size = q.shape[axis] // parts
    found, dense = apply_both(q, lambda x: lax.split(x, [size] * parts, axis))
    for one, want in zip(found, dense, strict=True):
        assert_same(one, want)


def test_outputs_split_into_heads():
    q = quantize_array(normal(8, 12), QuantSpec(F.int8))
    found, dense = apply_both(q, lambda x: lax.reshape(x, (8, 3, 4)))
    assert_same(found, dense)
    assert found.scale.shape == (1, 3, 4)


def test_casts_round_once():
    q = quantize_array(normal(8, 12), QuantSpec(F.int8))
    found, dense = apply_both(q, lambda x: x.astype(jnp.bfloat16))
    assert_same(found, dense)
    assert apply_both(found, lambda x: x.astype(jnp.float32))[0] is None


def test_what_cannot_be_a_view_is_none():
    groups = quantize_array(normal(8, 12), QuantSpec(F.int4, group_size=4))
    one = functools.partial(lax.slice, start_indices=(0, 0), limit_indices=(4, 12))
    assert apply_both(groups, one)[0] is None
    assert apply_both(groups, lambda x: lax.reshape(x, (96,)))[0] is None
    assert (
        apply_both(groups, lambda x: lax.broadcast_in_dim(x, (2, 8, 12), (1, 2)))[0]
        is None
    )


def test_quantized_leaves_reach_the_sites_of_real_programs():
    """Through casts, transposes, slices of layers and heads, in their few bits."""
    seen = {}

    def apply(params, x):
        h = x.astype(jnp.bfloat16) @ params["cast"].astype(jnp.bfloat16)
        h = h.astype(jnp.float32) @ params["turned"].T
        for i in range(2):
            h = jnp.tanh(h @ params["layers"][i])
        h = jnp.einsum("bi,ihd->bhd", h, params["heads"].reshape(8, 2, 4))
        gate, up = jnp.split(params["fused"], 2, axis=1)
        h = h.reshape(-1, 8)
        return (h @ gate) * (h @ up)

    shapes = {"cast": (6, 8), "turned": (8, 8), "layers": (2, 8, 8), "heads": (8, 8)}
    params = {name: normal(*shape) for name, shape in shapes.items()}
    params["fused"] = normal(8, 8)
    # One code of at most eight bits per sum: no compiler rounds bfloat16 otherwise.
    cast = RNG.integers(-126, 127, size=(6, 8)).astype(np.float32)
    params["cast"] = jnp.asarray(cast).at[-1].set(127) / 128
    x = jnp.eye(4, 6)
    table = jopt.sites(apply, params, x)
    packed = jopt.quantize(params, QuantSpec(F.int8), sites=table)

    def look(use):
        seen[use.site.name] = isinstance(use.weight, QuantizedArray)
        return use.run()

    got = jopt.rewrite(apply, jopt.Handler(look))(packed, x)
    assert all(seen.values()) and len(seen) == 7
    np.testing.assert_allclose(got, apply(jopt.dequantize(packed), x), rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "spec, split, is_split",
    [
        (QuantSpec(F.int8), PartitionSpec(None, "x"), True),
        (QuantSpec(F.int8), PartitionSpec("x"), True),
        (QuantSpec(F.int4), PartitionSpec(None, "x"), True),
        (QuantSpec(F.int4), PartitionSpec("x"), False),  # would cut the packed axis
        (QuantSpec(F.int8, group_size=4), PartitionSpec("x"), True),
        (QuantSpec(F.int8, group_size=8), PartitionSpec("x"), False),
    ],
)
def test_devices_hold_shards_of_codes(spec, split, is_split, check_vma):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    w, x = normal(16, 8), normal(4, 16)

    def device(params, x):
        axis = 0 if split[0] == "x" else 1
        whole = lax.all_gather(params["w"], "x", axis=axis, tiled=True)
        return x @ whole

    apply = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=({"w": split}, PartitionSpec("x")),
        out_specs=PartitionSpec("x"),
        check_vma=check_vma,
    )
    q = quantize_array(w, spec)
    assert (q.partition_specs(split, {"x": 4}) is not None) == is_split
    got = jopt.execute(apply)({"w": q}, x)
    np.testing.assert_allclose(got, x @ q.to_array(), rtol=1e-5, atol=1e-5)
    if is_split and check_vma and spec == QuantSpec(F.int8):
        text = jax.jit(jopt.execute(apply)).lower({"w": q}, x).as_text()
        lines = text.split("all_gather")[1:]
        assert any("xi8>" in line for line in lines)
