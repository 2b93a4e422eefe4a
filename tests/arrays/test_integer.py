"""Products of codes are those of JAX in int32, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jopt.arrays.integer import integer_conv, integer_dot

RNG = np.random.default_rng(4)


def codes(*shape):
    return jnp.asarray(RNG.integers(-128, 128, shape), jnp.int8)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_dots(data):
    size = {c: data.draw(st.integers(0 if c == "k" else 1, 3)) for c in "bcmnkl"}
    lhs = data.draw(st.permutations([c for c in "bcmkl" if data.draw(st.booleans())]))
    shared = [c for c in lhs if c in "bckl"]
    rhs = data.draw(
        st.permutations([*shared, *(["n"] if data.draw(st.booleans()) else [])])
    )
    contracted = [c for c in shared if c in "kl"]
    batch = [c for c in shared if c in "bc"]
    numbers = (
        ([lhs.index(c) for c in contracted], [rhs.index(c) for c in contracted]),
        ([lhs.index(c) for c in batch], [rhs.index(c) for c in batch]),
    )
    x, w = codes(*[size[c] for c in lhs]), codes(*[size[c] for c in rhs])
    want = lax.dot_general(x, w, numbers, preferred_element_type=jnp.int32)
    np.testing.assert_array_equal(integer_dot(x, w, numbers), want)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_convolutions(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rank = draw(1, 2)
    groups = draw(1, 2)
    inputs, outputs = (
        groups * draw(1, 9),
        groups * data.draw(st.sampled_from([1, 8, 17])),
    )
    image = (draw(1, 2), inputs, *[draw(3, 6) for _ in range(rank)])
    kernel = (outputs, inputs // groups, *[draw(1, 3) for _ in range(rank)])
    layouts = [data.draw(st.permutations(range(rank + 2))) for _ in range(3)]
    params = {
        "window_strides": [draw(1, 2) for _ in range(rank)],
        "padding": [(draw(-1, 2), draw(0, 2)) for _ in range(rank)],
        "lhs_dilation": [draw(1, 2) for _ in range(rank)],
        "rhs_dilation": [draw(1, 2) for _ in range(rank)],
        "dimension_numbers": lax.ConvDimensionNumbers(*map(tuple, layouts)),
        "feature_group_count": groups,
        "batch_group_count": 1,
    }
    place = [np.argsort(layout) for layout in layouts]
    x = codes(*[image[i] for i in place[0]])
    w = codes(*[kernel[i] for i in place[1]])
    try:
        want = lax.conv_general_dilated(
            x, w, preferred_element_type=jnp.int32, **params
        )
    except (ValueError, TypeError):  # the window does not fit
        return
    np.testing.assert_array_equal(integer_conv(x, w, **params), want)


@pytest.mark.parametrize("dilation", [1, 2])
def test_images_that_are_cut(dilation):
    """Where float32 convolutions of some JAX versions are wrong."""
    x, w = codes(1, 4, 4), codes(1, 4, 2)
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, ("NCH", "OIH", "NCH"))
    got = integer_conv(
        x,
        w,
        window_strides=(1,),
        padding=((-1, 1),),
        lhs_dilation=(dilation,),
        rhs_dilation=(1,),
        dimension_numbers=numbers,
    )
    wide = np.zeros((4, 3 * dilation + 1), int)
    wide[:, ::dilation] = x[0]
    wide = np.pad(wide[:, 1:], ((0, 0), (0, 1)))
    places = range(wide.shape[1] - 1)
    want = [(wide[:, i : i + 2] * np.asarray(w[0], int)).sum() for i in places]
    np.testing.assert_array_equal(got[0, 0], want)


def test_windows_too_wide_for_float32_stay_exact():
    numbers = lax.conv_dimension_numbers(
        (1, 4, 4, 160), (3, 3, 80, 2), ("NHWC", "HWIO", "NHWC")
    )
    params = {
        "window_strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": numbers,
        "feature_group_count": 2,
        "batch_group_count": 1,
    }
    x = jnp.full((1, 4, 4, 160), 127, jnp.int8)
    w = jnp.full((3, 3, 80, 2), 127, jnp.int8).at[0, 0, 0, 0].set(126)
    total = 127 * 127 * 720
    out = integer_conv(x, w, **params)
    assert out[0, 0, 0].tolist() == [total - 127, total]


@pytest.mark.parametrize("rows", [1, 2])
def test_under_transformations(rows):
    x, w = codes(3, rows, 16), codes(3, 16, 5)
    numbers = (((1,), (0,)), ((), ()))
    one = lambda x, w: integer_dot(x, w, numbers)  # noqa: E731
    want = jnp.einsum("bmk,bkn->bmn", *(a.astype(jnp.int32) for a in (x, w)))
    np.testing.assert_array_equal(jax.vmap(one)(x, w), want)
    _, scanned = lax.scan(lambda c, xw: (c, one(*xw)), 0, (x, w))
    np.testing.assert_array_equal(scanned, want)


@pytest.mark.parametrize(
    "rows, terms, axis, computed",
    [
        (1, 64, 0, "2x1x32"),
        (1, 1024, 1, "2x1x32"),
        (1, 1024, 0, "16x2x1x32"),  # sixteen sums of 64 terms
        (1, 384, 0, "4x2x1x32"),
        (1, 1022, 0, "2x2x1x32"),
        (1, 1023, 0, "2x1x32"),
        (2, 1024, 0, "2x32"),
    ],
)
def test_one_row_becomes_more_and_more_stay(rows, terms, axis, computed):
    x, w = codes(rows, terms), codes(*(terms, 32)[:: 1 - 2 * axis])
    run = jax.jit(lambda x, w: integer_dot(x, w, (((1,), (axis,)), ((), ()))))
    lowered = run.lower(x, w)
    lines = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(lines) == 1
    assert lines[0].endswith(f"-> tensor<{computed}xi32>")
    want = np.asarray(x, np.int32) @ np.moveaxis(np.asarray(w, np.int32), axis, 0)
    np.testing.assert_array_equal(lowered.compile()(x, w), want)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("outputs, groups", [(4, 1), (32, 1), (8, 2)])
def test_detours_are_for_cpus(platform, outputs, groups):
    """Elsewhere a convolution and a row stay what they are, in bytes."""
    x, w = codes(1, 4, 4, 8), codes(3, 3, 8 // groups, outputs)
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))

    def both(x, w, row, matrix):
        out = integer_conv(
            x,
            w,
            window_strides=(1, 1),
            padding=((0, 0), (0, 0)),
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=numbers,
            feature_group_count=groups,
        )
        return out, integer_dot(row, matrix, (((1,), (0,)), ((), ())))

    args = x, w, codes(1, 1024), codes(1024, 32)
    text = jax.jit(both).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    plain = f"xi8>, tensor<3x3x{8 // groups}x{outputs}xi8>) -> tensor<1x2x2x{outputs}xi"
    is_detour = platform == "cpu"
    assert (plain not in text) == (is_detour and outputs != 32)
    assert ("tensor<1024x32xi8>) -> tensor<1x32xi32>" not in text) == is_detour
    if not is_detour:
        assert "xf32>" not in text
