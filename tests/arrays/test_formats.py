"""Every code of every format means what its definition says, and comes back."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

from jopt.arrays import formats
from jopt.arrays.codes import compute_codes, decode
from jopt.arrays.scales import Scale
from jopt.arrays.specs import QuantSpec

BYTES = np.arange(256, dtype=np.uint8)
FP4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def quantiles_of_the_normal():
    """The nf4 table as QLoRA derives it: eight quantiles below zero, seven above."""
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0.0], below]))
    return (values / values.max()).astype(np.float32)


def grid_of(format):
    """(codes, levels) of a format, written down without the library."""
    name, bits = format.name, format.bits
    if name.startswith("int"):
        codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)
        return codes, codes.astype(np.float32)
    if name.startswith("uint"):
        codes = np.arange(2**bits, dtype=np.uint8)
        return codes, codes.astype(np.float32)
    if name in ("fp8_e4m3", "mxfp8"):
        codes = BYTES.view(ml_dtypes.float8_e4m3fn)
    elif name == "fp8_e5m2":
        codes = BYTES.view(ml_dtypes.float8_e5m2)
    else:
        levels = {
            "ternary": np.array([-1.0, 0.0, 1.0], np.float32),
            "binary": np.array([-1.0, 1.0], np.float32),
            "nf4": np.float32(formats.nf4.values),
        }.get(name, FP4)
        return np.arange(len(levels), dtype=np.uint8), levels
    levels = codes.astype(np.float32)
    return codes[np.isfinite(levels)], levels[np.isfinite(levels)]


FORMATS = [f for f in vars(formats).values() if isinstance(f, formats.Format)]
every_format = pytest.mark.parametrize("format", FORMATS, ids=repr)
# One of each kind and storage, for what does not depend on the numbers themselves.
KINDS = [formats.int3, formats.int4, formats.int8, formats.uint4, formats.ternary]
KINDS += [formats.binary, formats.nf4, formats.fp8_e4m3, formats.fp4_e2m1]
KINDS += [formats.mxfp4, formats.nvfp4]
every_kind = pytest.mark.parametrize("format", KINDS, ids=repr)


def same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def test_there_are_all_formats():
    widths = [f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")]
    floats = ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "mxfp8", "mxfp4", "nvfp4"]
    tables = ["ternary", "binary", "nf4"]
    assert {f.name for f in FORMATS} == {*widths, *floats, *tables}
    assert all(getattr(formats, f.name) is f for f in FORMATS)


@every_format
def test_every_code_is_the_level_it_should_be_and_comes_back(format):
    codes, levels = grid_of(format)
    same_bits(formats.decode_levels(jnp.asarray(codes), format), levels)
    same_bits(formats.encode_levels(jnp.asarray(levels), format), codes)


@every_format
@pytest.mark.parametrize("exponent", [-20, 0, 9])
def test_every_number_of_the_grid_gets_its_code(format, exponent):
    """From float data with power-of-two scales; signed integers leave -2^(b-1) out."""
    codes, levels = grid_of(format)
    zero_point = None if format.signed else jnp.zeros(1, jnp.uint8)
    if format.kind == "integer" and format.signed:
        codes, levels = codes[1:], levels[1:]
    spec = QuantSpec(format, axis=(), symmetric=format.signed)
    scale = Scale(jnp.full(1, 2.0**exponent), zero_point)
    w = jnp.asarray(levels * np.float32(2.0**exponent))
    same_bits(compute_codes(w, scale, spec), codes)
    same_bits(decode(jnp.asarray(codes), scale, spec), w)


def test_nf4_is_the_table_of_normal_quantiles():
    expected = quantiles_of_the_normal()
    np.testing.assert_allclose(formats.nf4.values, expected, rtol=0, atol=1e-6)
    assert formats.nf4.values[7] == 0.0 and formats.nf4.values[-1] == 1.0


@every_format
def test_attributes_agree_with_the_grid(format):
    codes, levels = grid_of(format)
    assert codes.size <= 2**format.bits
    assert format.max_value == levels.max()
    assert format.min_value == np.abs(levels[levels != 0]).min()
    assert format.signed == (levels.min() < 0)
    assert repr(format) == format.name and hash(format) == hash(format)
    assert (0.0 in levels) == (format.name != "binary")


@every_format
def test_the_clip_range_ends_half_a_step_beyond_the_last_level(format):
    levels = np.unique(grid_of(format)[1])
    if format.kind == "integer" and format.signed:
        levels = levels[1:]  # data never gets the lowest code
    low, high = format.clip_range
    assert high == pytest.approx(levels[-1] + (levels[-1] - levels[-2]) / 2)
    assert low == pytest.approx(levels[0] - (levels[1] - levels[0]) / 2)
