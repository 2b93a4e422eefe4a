"""Powers of two near the largest number, whatever it is."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jopt.arrays.units import unit_of


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_just_below_the_largest(numbers):
    x = np.array(numbers, np.float32)
    unit = float(unit_of(jnp.asarray(x)))
    largest = np.abs(x).max()
    assert np.frexp(unit)[0] == 0.5
    if 2.0**-126 <= largest < 2.0**127:
        assert unit <= largest < 2 * unit
    assert largest / unit < 4 or largest == 0
    large = x[np.abs(x) > 2.0**-20 * largest]  # what is far below may be subnormal
    if largest >= 2.0**-100:
        np.testing.assert_array_equal(
            large / np.float32(unit) * np.float32(unit), large
        )


@pytest.mark.parametrize("numbers", [[], [0.0, -0.0], [np.nan, 2.0], [-np.inf]])
def test_one_where_there_is_none(numbers):
    assert unit_of(jnp.array(numbers, jnp.float32)) == 1
