"""Rounding goes to a neighbour: the nearest, or either with the fitting chance."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jopt.arrays import formats
from jopt.arrays.rounding import nearest, round_to_grid, stochastic
from tests.arrays.test_formats import every_format, every_kind, grid_of, same_bits

KEY = jax.random.key(0)
to_grid = jax.jit(round_to_grid, static_argnames=("format", "rounding"))


def levels_from_data(format):
    """The levels that data may round to, ascending, one zero."""
    levels = np.unique(grid_of(format)[1])
    is_signed_integer = format.kind == "integer" and format.signed
    return levels[1:] if is_signed_integer else levels


def sample(format, size=4000):
    """Numbers on all scales, beyond both ends too, and zeros of both signs."""
    rng = np.random.default_rng(1)
    top = format.max_value
    wide = rng.normal(size=size) * top * np.exp2(rng.uniform(-20, 1, size))
    return np.float32(np.concatenate([wide, rng.uniform(-1.2, 1.2, size) * top, [0]]))


def nearest_level(x, levels):
    """The nearest level in float64, without ties."""
    gaps = np.abs(np.float64(x)[:, None] - np.float64(levels)[None, :])
    return levels[gaps.argmin(1)]


@every_format
def test_nearest_is_the_nearest_level(format):
    x = sample(format)
    x = x[x != 0] if format.name == "binary" else x  # a tie there
    np.testing.assert_array_equal(
        to_grid(x, format), nearest_level(x, levels_from_data(format))
    )


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        (formats.fp8_e4m3, ml_dtypes.float8_e4m3fn),
        (formats.fp8_e5m2, ml_dtypes.float8_e5m2),
        (formats.fp4_e2m1, ml_dtypes.float4_e2m1fn),
    ],
)
def test_floats_round_as_ml_dtypes_does_ties_included(format, dtype):
    levels = levels_from_data(format)
    ties = (levels[1:] + levels[:-1]) / 2  # exact in float32
    x = np.concatenate([sample(format), ties]).clip(-format.max_value, format.max_value)
    same_bits(to_grid(x, format), x.astype(dtype).astype(np.float32))


def test_integers_round_half_to_even():
    x = np.arange(-7.5, 8, dtype=np.float32)
    expected = np.clip(np.round(x), -7, 7) + 0.0
    same_bits(to_grid(x, formats.int4), expected)
    same_bits(nearest(jnp.asarray(x)), np.round(x))


def test_the_sign_of_the_smallest_number_counts_in_binary():
    x = np.float32([0.0, 1e-30, -1e-30])
    np.testing.assert_array_equal(to_grid(x, formats.binary), [1.0, 1.0, -1.0])


@every_kind
def test_nan_stays_nan_and_infinity_is_the_last_level(format):
    levels = levels_from_data(format)
    for rounding in (nearest, stochastic):
        x = np.float32([np.nan, np.inf, -np.inf])
        rounded = to_grid(x, format, rounding=rounding, key=KEY)
        np.testing.assert_array_equal(rounded, [np.nan, levels[-1], levels[0]])


COUNT = 10_000
draw = jax.jit(
    lambda x, format: round_to_grid(x, format, rounding=stochastic, key=KEY),
    static_argnames="format",
)


@every_format
def test_stochastic_keeps_levels_and_reaches_only_neighbours(format):
    levels = levels_from_data(format)
    on_grid = np.resize(levels, (12, COUNT))
    np.testing.assert_array_equal(draw(on_grid, format), on_grid)
    x = np.resize(sample(format), (12, COUNT))
    rounded = draw(x, format)
    inside = x.clip(levels[0], levels[-1])
    above = levels[np.searchsorted(levels, inside, side="left")]
    below = levels[np.searchsorted(levels, inside, side="right") - 1]
    assert ((rounded == above) | (rounded == below)).all()


@every_format
def test_stochastic_is_unbiased(format):
    levels = levels_from_data(format)
    rng = np.random.default_rng(2)
    lower = rng.integers(0, len(levels) - 1, 12)
    share = rng.uniform(0.02, 0.98, 12).astype(np.float32)
    gap = levels[lower + 1] - levels[lower]
    x = levels[lower] + share * gap
    mean = np.mean(draw(np.repeat(x, COUNT).reshape(12, COUNT), format), axis=1)
    sigma = gap * np.sqrt(share * (1 - share) / COUNT)
    assert (np.abs(mean - x) < 5 * sigma).all()


def test_stochastic_keeps_whole_numbers_for_every_key():
    whole = jnp.full((2000,), 127.0)
    for seed in range(50):
        rounded = stochastic(whole, jax.random.key(seed))
        np.testing.assert_array_equal(rounded, whole)


def test_stochastic_needs_a_key():
    with pytest.raises(ValueError, match="key must be a PRNG key"):
        stochastic(jnp.ones(3))


@pytest.mark.parametrize("format", [formats.int4, formats.nf4, formats.fp4_e2m1])
def test_a_rule_of_ones_own_serves_every_kind_of_grid(format):
    def downwards(x, key=None):
        return jnp.floor(x)

    levels = levels_from_data(format)
    x = sample(format).clip(levels[0], levels[-1])
    x = x[np.abs(x) > 1e-4]  # in a table, a gap is seen with the precision of float32
    below = levels[np.searchsorted(levels, x, side="right") - 1]
    np.testing.assert_array_equal(to_grid(x, format, rounding=downwards), below)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_chance_is_fair_in_few_bits(dtype):
    x = jnp.array([1 / 1024, 1 / 256, 0.1, -0.3, 5.25], dtype)
    count = 40_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = np.asarray(jax.vmap(lambda key: stochastic(x, key))(keys), np.float64)
    wide = np.asarray(x, np.float64)
    share = wide - np.floor(wide)
    deviation = np.sqrt(share * (1 - share) / count)
    assert (np.abs(drawn.mean(0) - wide) < 5 * deviation).all()
