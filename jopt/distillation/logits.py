"""Losses on logits: match the teacher's softened distribution.

    p = softmax(teacher / T),   q = softmax(student / T),   loss = T^2 * KL(p || q)

The gradient with respect to the student's logits is `T * (q - p)`. It would fall as
1 / T^2 without the factor (1 / T from the chain rule, 1 / T from the flatter softmax),
so T^2 keeps soft and hard losses in proportion when the temperature changes (Hinton et
al., arXiv:1503.02531, section 2).
"""

import jax
import jax.numpy as jnp
import optax


def soft_target_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Compute T^2 * KL(softmax(teacher / T) || softmax(student / T)) per example.

    The teacher is frozen by construction: no gradient flows into `teacher_logits`.
    Mix it with a hard loss as `a * soft + (1 - a) * hard`.

    Args:
        student_logits: shape [..., classes], unscaled, any float dtype.
        teacher_logits: same shape.
        temperature: T > 0, a number or a traced scalar (a schedule's value).

    Returns:
        Shape [...], float32 (the sum over classes is taken in float32); at least 0 up
        to rounding.

    Raises:
        ValueError: the shapes differ, or a Python `temperature` is not positive.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network,
        arXiv:1503.02531.

    >>> import jax.numpy as jnp, jopt
    >>> teacher = jnp.array([[2.0, 0.0]])
    >>> loss = jopt.distillation.soft_target_loss(
    ...     jnp.array([[0.0, 0.0]]), teacher, temperature=2.0
    ... )
    >>> [round(float(x), 4) for x in loss]
    [0.4438]
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have one shape, got "
            f"{student_logits.shape} and {teacher_logits.shape}; select or map the "
            "teacher's classes first"
        )
    if isinstance(temperature, int | float) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    softness = jnp.asarray(temperature, jnp.float32)
    frozen = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
    log_p = jax.nn.log_softmax(frozen / softness)
    log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32) / softness)
    # 0 log 0 = 0: classes that both mask with -inf would read inf - inf.
    kl = optax.losses.kl_divergence_with_log_targets(
        log_q, log_p, where=jnp.exp(log_p) > 0
    )
    return softness**2 * kl
