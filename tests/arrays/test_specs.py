"""A spec says which elements share a scale, and refuses what its format cannot do."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jopt.arrays import formats
from jopt.arrays.specs import QuantSpec, check_spec, group_axis, scale_shape

INT4 = formats.int4


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((64, 10), {}, (1, 10)),
        ((5, 64, 10), {}, (1, 1, 10)),
        ((64,), {}, (1,)),
        ((), {}, ()),
        ((64, 10), {"axis": ()}, (1, 1)),
        ((64, 10), {"axis": 0}, (64, 1)),
        ((64, 10), {"axis": -2}, (64, 1)),
        ((64, 10), {"axis": (0, 1)}, (64, 10)),
        ((64, 10), {"group_size": 32}, (2, 10)),
        ((5, 64, 10), {"group_size": 32}, (5, 2, 10)),
        ((3, 3, 64, 10), {"group_size": 16}, (3, 3, 4, 10)),
        ((64,), {"group_size": 32}, (2,)),
        ((10, 64), {"group_size": 32, "axis": 0}, (10, 2)),
        ((5, 64, 10), {"group_size": 32, "axis": (0, 2)}, (5, 2, 10)),
        ((64, 4, 10), {"group_size": 32, "axis": (1, 2)}, (2, 4, 10)),
        ((10, 64), {"group_size": 32, "axis": ()}, (10, 2)),
        ((0, 10), {"group_size": 32}, (0, 10)),
    ],
)
def test_scales_have_the_shape_of_the_groups(shape, options, expected):
    assert scale_shape(shape, QuantSpec(INT4, **options)) == expected


@pytest.mark.parametrize(
    ("ndim", "axis", "expected"),
    [
        (2, None, -2),
        (3, None, -2),
        (1, None, -1),
        (2, 0, -1),
        (2, -1, -2),
        (3, (0, 2), -2),
        (3, (1, 2), -3),
        (2, (-3, -1), -2),  # a layer sliced off a stack
        (1, 0, None),
        (0, None, None),
    ],
)
def test_groups_run_along_the_last_axis_without_its_own_scales(ndim, axis, expected):
    assert group_axis(ndim, QuantSpec(INT4, axis=axis)) == expected


def test_specs_are_values():
    one = QuantSpec(INT4, axis=[0, 1], group_size=np.int64(32))
    two = QuantSpec(INT4, axis=(0, 1), group_size=32, scale_dtype="bfloat16")
    assert one == two and hash(one) == hash(two) and len({one, two}) == 1
    assert one != dataclasses.replace(one, group_size=16)
    assert repr(one) == "QuantSpec(int4, axis=(0, 1), group_size=32)"
    wide = QuantSpec(formats.uint8, symmetric=False, scale_dtype=jnp.float32)
    assert repr(wide) == "QuantSpec(uint8, symmetric=False, scale_dtype=float32)"
    assert repr(QuantSpec(formats.nvfp4)) == "QuantSpec(nvfp4)"
    with pytest.raises(TypeError):
        QuantSpec(INT4, 0)


@pytest.mark.parametrize(
    ("format", "group_size", "scale_dtype"),
    [
        (formats.mxfp8, 32, jnp.float8_e8m0fnu),
        (formats.mxfp4, 32, jnp.float8_e8m0fnu),
        (formats.nvfp4, 16, jnp.float8_e4m3fn),
    ],
)
def test_microscaling_formats_bring_their_groups_and_scales(
    format, group_size, scale_dtype
):
    spec = QuantSpec(format)
    assert spec.group_size == group_size and spec.scale_dtype == scale_dtype
    assert QuantSpec(format, group_size=group_size, scale_dtype=scale_dtype) == spec
    moved = dataclasses.replace(spec, axis=(0, 2))
    assert moved.group_size == group_size and moved.scale_dtype == scale_dtype
    with pytest.raises(ValueError, match=f"group_size must be left out for {format}"):
        QuantSpec(format, group_size=64)
    with pytest.raises(ValueError, match=f"scale_dtype must be left out for {format}"):
        QuantSpec(format, scale_dtype=jnp.float32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_unsigned_formats_cannot_be_symmetric(bits):
    """They would clip every negative weight to zero."""
    unsigned = getattr(formats, f"uint{bits}")
    with pytest.raises(ValueError, match=f"symmetric must be False for uint{bits}"):
        QuantSpec(unsigned)
    assert not QuantSpec(unsigned, symmetric=False).symmetric


@pytest.mark.parametrize("name", ["nf4", "ternary", "binary", "fp8_e4m3", "mxfp4"])
def test_only_integers_have_zero_points(name):
    with pytest.raises(ValueError, match=f"symmetric must be True for {name}"):
        QuantSpec(getattr(formats, name), symmetric=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis": 1.5}, TypeError, "axis must be an int, a tuple of ints or None"),
        ({"axis": True}, TypeError, "axis must be an int"),
        ({"axis": (0, None)}, TypeError, "axis must be an int"),
        ({"axis": (0, 0)}, ValueError, "each axis once, got \\(0, 0\\)"),
        ({"symmetric": "no"}, TypeError, "symmetric must be True or False, got 'no'"),
        ({"symmetric": None}, TypeError, "symmetric must be True or False, got None"),
        (
            {"narrow_range": 1},
            TypeError,
            "narrow_range must be True, False or None, got 1",
        ),
        ({"group_size": 0}, ValueError, "group_size must be a positive int"),
        ({"group_size": 32.0}, ValueError, "group_size must be a positive int"),
        ({"group_size": True}, ValueError, "group_size must be a positive int"),
        ({"scale_dtype": jnp.float16}, ValueError, "got float16.*use bfloat16"),
        ({"scale_dtype": jnp.int8}, ValueError, "scale_dtype must be bfloat16 or"),
    ],
)
def test_what_is_wrong_with_a_spec_is_said(options, error, message):
    with pytest.raises(error, match=message):
        QuantSpec(INT4, **options)


def test_a_format_is_no_string():
    with pytest.raises(TypeError, match=r"one of jopt\.formats, got 'int8'"):
        QuantSpec("int8")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((100, 64), {"group_size": 32}, r"axis -2 of 'a/b'.*use group_size=25 for"),
        ((97, 64), {"group_size": 32}, "use group_size=None for this leaf"),
        ((64, 64), {"axis": 2}, r"axes of 'a/b', got 2 for shape \(64, 64\)"),
        ((64, 64), {"axis": (1, -1)}, "each axis of 'a/b' once"),
        ((), {"group_size": 32}, "must have an axis of 'a/b' to run along"),
        ((64,), {"group_size": 32, "axis": 0}, "leave an axis out of `axis`"),
    ],
)
def test_what_does_not_fit_a_shape_is_said_with_its_path(shape, options, message):
    spec = QuantSpec(INT4, **options)
    for check in (check_spec, scale_shape):
        with pytest.raises(ValueError, match=message):
            check(shape, spec, path="a/b")


def test_a_microscaling_format_names_its_own_way_out():
    with pytest.raises(ValueError, match="use a format without groups of its own"):
        check_spec((100, 64), QuantSpec(formats.mxfp4), path="a/b")
