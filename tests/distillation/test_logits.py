"""The soft-target loss against a NumPy softmax, its gradient and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.distillation import soft_target_loss

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(5, 7)).astype(np.float32) * 3
TEACHER = RNG.normal(size=(5, 7)).astype(np.float32) * 3


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_the_definition(temperature):
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1)
    loss = soft_target_loss(STUDENT, TEACHER, temperature=temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert loss.shape == (5,) and loss.dtype == jnp.float32


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_temperature_times_the_difference(temperature):
    grad = jax.grad(
        lambda s: soft_target_loss(s, TEACHER, temperature=temperature).sum()
    )(STUDENT)
    difference = softmax(STUDENT / temperature) - softmax(TEACHER / temperature)
    np.testing.assert_allclose(grad, temperature * difference, atol=2e-6)


def test_the_teacher_is_frozen():
    grad = jax.grad(lambda t: soft_target_loss(STUDENT, t, temperature=2.0).sum())
    np.testing.assert_array_equal(grad(TEACHER), 0.0)


def test_zero_where_student_and_teacher_agree_up_to_a_constant():
    loss = soft_target_loss(TEACHER + 3.0, TEACHER, temperature=2.0)
    np.testing.assert_allclose(loss, 0.0, atol=1e-5)


def test_high_temperature_is_half_the_squared_distance_of_centred_logits():
    """Hinton et al., equation 4: the limit matches logits."""
    s, t = (x - x.mean(-1, keepdims=True) for x in (STUDENT, TEACHER))
    loss = soft_target_loss(STUDENT, TEACHER, temperature=300.0)
    np.testing.assert_allclose(loss, ((s - t) ** 2).mean(-1) / 2, rtol=2e-2)


def test_half_precision_and_extreme_logits_stay_finite():
    extreme = jnp.array([[1e4, -1e4, 0.0]], jnp.bfloat16)
    loss = soft_target_loss(extreme, -extreme, temperature=1.0)
    assert loss.dtype == jnp.float32 and bool(jnp.isfinite(loss).all())


def test_traced_temperature():
    eager = soft_target_loss(STUDENT, TEACHER, temperature=3.0)
    traced = jax.jit(lambda t: soft_target_loss(STUDENT, TEACHER, temperature=t))(3.0)
    np.testing.assert_allclose(eager, traced, rtol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="one shape"):
        soft_target_loss(STUDENT, TEACHER[:, :3])
    with pytest.raises(ValueError, match="temperature must be positive"):
        soft_target_loss(STUDENT, TEACHER, temperature=0)


def test_classes_that_both_mask_cost_nothing():
    """0 log 0 = 0, in value and gradient; -200 underflows to the same 0."""
    hidden = np.float32([0.0, 0.0, 0.0, 0.0, 0.0, -np.inf, -np.inf])
    teacher = TEACHER + np.where(np.arange(7) == 5, -200.0, hidden).astype(np.float32)
    student = STUDENT + hidden
    loss, grad = jax.value_and_grad(lambda s: soft_target_loss(s, teacher).sum())(
        student
    )
    expected = soft_target_loss(STUDENT[:, :5], TEACHER[:, :5])
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)
    assert np.isfinite(grad).all() and (grad[:, 5:] == 0).all()
    # What the teacher believes in and the student excludes is infinitely wrong.
    assert np.isinf(soft_target_loss(student, TEACHER)).all()
