"""Products of codes on explicit meshes, and sums beyond what an int32 holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jopt

F = jopt.formats
P = PartitionSpec
INT8 = jopt.QuantSpec(F.int8)
GROUPS = jopt.QuantSpec(F.int8, group_size=4)
INT4 = jopt.QuantSpec(F.int4, group_size=4)
ZEROS = jopt.QuantSpec(F.uint8, symmetric=False)
FP8 = jopt.QuantSpec(F.fp8_e4m3)
NUMBERS = ("NHWC", "HWIO", "NHWC")
RNG = np.random.default_rng(3)
MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)


def whole(*shape, axis=None):
    """Whole numbers, with the range of int8 along an axis: so scales are 1."""
    x = RNG.integers(-126, 127, size=shape).astype(np.float32)
    if axis is not None:
        x[(slice(None),) * axis + (0,)] = 127
    return jnp.asarray(x)


def split_over(mesh, tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def check(apply, params, x, *, splits, spec, activations, alone=None):
    """Compare with one device, bit for bit, and with the sharding of the floats."""
    alone = alone or apply
    table = jopt.sites(alone, params, x)
    packed = jopt.quantize(params, spec, sites=table)
    want = jopt.execute(alone, activations=activations)(packed, x)
    with jax.set_mesh(MESH):
        params, x = (
            split_over(MESH, a, s) for a, s in zip((params, x), splits, strict=True)
        )
        packed = jopt.quantize(params, spec, sites=table)
        run = jopt.execute(apply, activations=activations)
        got = run(packed, x)
        assert jax.typeof(got) == jax.typeof(jax.jit(apply)(params, x))
        slope = jax.jit(jax.grad(lambda x: run(packed, x).sum()))(x)
        assert slope.shape == x.shape
    np.testing.assert_array_equal(got, want)


def project(params, x, out=None):
    return jnp.einsum("bi,io->bo", x, params["w"], out_sharding=out)


@pytest.mark.parametrize(
    "spec, activations",
    [(INT8, INT8), (GROUPS, INT8), (INT4, INT8), (ZEROS, ZEROS), (FP8, FP8)],
    ids=repr,
)
@pytest.mark.parametrize(
    "out, weights, inputs",
    [
        (P(None, None), P("b", None), P("a", "b")),  # summed over devices
        (P("a", "b"), P("b", None), P("a", "b")),  # and scattered again
        (P(None, None), P(None, "b"), P("a", None)),  # gathered
        (P(), P("a", "b"), P(None, "a")),
        (None, P("b", None), P(None, None)),  # only the weights are split
        (None, P("a", None), P("a", None)),  # as the batch is
        (None, P("a", "b"), P("a", None)),
    ],
)
def test_dots_keep_their_sharding(spec, activations, out, weights, inputs):
    params = {"w": whole(8, 4, 16, axis=1).reshape(32, 16)}
    check(
        functools.partial(project, out=out),
        params,
        whole(8, 32, axis=1),
        splits=(weights, inputs),
        spec=spec,
        activations=activations,
        alone=project,
    )


@pytest.mark.parametrize("weights", [P("b", None), P(None, "b")])
def test_one_row(weights):
    params, x = {"w": whole(128, 16, axis=0)}, whole(1, 128, axis=1)
    splits = (weights, P(None, None))
    check(project, params, x, splits=splits, spec=INT8, activations=INT8)


@pytest.mark.parametrize("spec", [INT8, GROUPS], ids=repr)
@pytest.mark.parametrize(
    "out, weights", [(P("a", None), P(None, None, "b")), (P("a", "b"), P(None, "b"))]
)
def test_a_carry_keeps_its_sharding(spec, out, weights):
    def layers(params, x, out=None):
        step = lambda h, w: (project({"w": w}, h, out) / 64, None)  # noqa: E731
        return lax.scan(step, x, params["w"])[0]

    check(
        functools.partial(layers, out=out),
        {"w": whole(3, 16, 16, axis=1)},
        whole(8, 16, axis=1),
        splits=(weights, out),
        spec=spec,
        activations=INT8,
        alone=layers,
    )


@pytest.mark.parametrize("outputs", [4, 24])
@pytest.mark.parametrize(
    "out, weights, inputs",
    [
        (None, P(), P("a")),
        (None, P(), P("a", "b")),
        (P("a", None, None, "b"), P(None, None, None, "b"), P("a")),
    ],
)
def test_convolutions_keep_their_sharding(outputs, out, weights, inputs):
    def apply(params, x, out=None):
        return lax.conv_general_dilated(
            x,
            params["w"],
            (1, 1),
            "SAME",
            dimension_numbers=NUMBERS,
            out_sharding=out and NamedSharding(jax.typeof(x).sharding.mesh, out),
        )

    check(
        functools.partial(apply, out=out),
        {"w": whole(3, 3, 8, outputs, axis=0)},
        whole(8, 4, 4, 8, axis=1),
        splits=(weights, inputs),
        spec=INT8,
        activations=INT8,
        alone=apply,
    )


@pytest.mark.parametrize(
    "terms, spec, activations",
    [
        (150_000, INT8, INT8),
        (40_000, ZEROS, ZEROS),
        (80_000, ZEROS, INT8),
        (150_000, INT4, INT8),  # short sums in integers, added in floats
    ],
    ids=repr,
)
@pytest.mark.parametrize("rows", [1, 2])
def test_sums_too_long_for_an_int32(terms, spec, activations, rows):
    params, x = {"w": jnp.ones((terms, 3))}, jnp.ones((rows, terms))
    packed = jopt.quantize(params, spec, sites=jopt.sites(project, params, x))
    y = jopt.execute(project, activations=activations)(packed, x)
    np.testing.assert_allclose(y, terms, rtol=1e-2)


def test_windows_too_long_for_an_int32():
    def apply(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")
        )

    params, x = {"w": jnp.ones((3, 50_000, 2))}, jnp.ones((1, 3, 50_000))
    packed = jopt.quantize(params, INT8, sites=jopt.sites(apply, params, x))
    y = jopt.execute(apply, activations=INT8)(packed, x)
    np.testing.assert_allclose(y, 150_000, rtol=1e-2)
