"""The k largest along an axis against a stable sort, in every way of counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.arrays import axis_selection

SHAPES = [((5, 7), 0), ((5, 7), 1), ((37, 70), 0), ((64, 65), 0), ((3, 16, 80), 1)]


def expected(scores, k, axis):
    values = np.asarray(scores).astype(np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    order = np.argsort(-values, axis=axis, kind="stable")
    # NaN ranks below -inf.
    nan_last = np.take_along_axis(np.isnan(np.asarray(scores)), order, axis)
    order = np.take_along_axis(
        order, np.argsort(nan_last, axis=axis, kind="stable"), axis
    )
    ranks = np.argsort(order, axis=axis, kind="stable")
    return ranks < np.expand_dims(np.broadcast_to(k, ranks.take(0, axis).shape), axis)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_equals_a_stable_sort(shape, axis, dtype):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=shape)
    scores[rng.random(shape) < 0.3] = 0.5  # ties
    scores[rng.random(shape) < 0.05] = np.nan
    scores[rng.random(shape) < 0.05] = -np.inf
    scores = jnp.asarray(scores, dtype)
    top = jax.jit(lambda x, k: axis_selection.top_k_along(x, k, axis=axis))
    for k in (0, 1, shape[axis] // 2, shape[axis], 10**6):
        np.testing.assert_array_equal(top(scores, k), expected(scores, k, axis))


def test_every_column_may_keep_another_number():
    scores = jax.random.normal(jax.random.key(0), (32, 100))
    k = jnp.arange(100) % 33
    mask = axis_selection.top_k_along(scores, k, axis=0)
    np.testing.assert_array_equal(mask, expected(scores, np.asarray(k), 0))


def test_subnormal_numbers_keep_their_order():
    scores = jnp.array([[1e-40, 1.5e-40, 0.0, -1e-40]] * 70).T
    mask = axis_selection.top_k_along(scores, 2, axis=0)
    np.testing.assert_array_equal(mask[:, 0], [True, True, False, False])


def test_constants_that_are_transposed_inside_are_read_right():
    scores = jax.random.normal(jax.random.key(0), (5, 16))
    nested = jax.jit(
        lambda k: jax.jit(lambda x: axis_selection.top_k_along(x, k, axis=1))(scores)
    )
    np.testing.assert_array_equal(nested(5), expected(scores, 5, 1))


def test_what_is_no_axis_or_no_number_raises():
    with pytest.raises(ValueError, match="axis must be"):
        axis_selection.top_k_along(jnp.ones((2, 3)), 1, axis=2)
    with pytest.raises(TypeError, match="k must be"):
        axis_selection.top_k_along(jnp.ones((2, 3)), 1.5)
    empty = axis_selection.top_k_along(jnp.ones((0, 3)), 1, axis=0)
    assert empty.shape == (0, 3)
