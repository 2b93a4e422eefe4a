"""What softens training as a function of the step count, and sharpens with it.

Temperatures of soft targets act as ratios, so they move by a constant factor per step;
the curve is `optax.exponential_decay` between two given values. The softness of weights
on their way to a grid goes from 1 to 0 along a sigmoid.
"""

import jax
import jax.numpy as jnp
import optax


def temperature(
    start: float, stop: float, *, begin_step: int = 0, end_step: int
) -> optax.Schedule:
    """Go from `start` to `stop` by a constant factor per step.

    T(t) = start * (stop / start)^((t - begin_step) / (end_step - begin_step))

    Args:
        start: temperature up to `begin_step`, greater than 0.
        stop: temperature from `end_step` on, greater than 0.
        begin_step: the count at which the temperature begins to move.
        end_step: the count at which it reaches `stop`.

    Returns:
        A schedule, count -> temperature.

    Raises:
        ValueError: a temperature is not positive, or the steps are not in order.

    >>> schedule = temperature(8.0, 2.0, begin_step=0, end_step=10)
    >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 99)]
    [8.0, 4.0, 2.0, 2.0]
    """
    for name, value in (("start", start), ("stop", stop)):
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if not 0 <= begin_step < end_step:
        raise ValueError(
            "begin_step and end_step must be in order and at least 0, "
            f"got {begin_step} and {end_step}"
        )
    if start == stop:
        return optax.constant_schedule(start)
    return optax.exponential_decay(
        start,
        transition_steps=end_step - begin_step,
        decay_rate=stop / start,
        transition_begin=begin_step,
        end_value=stop,
    )


def sigmoid_softness(
    *, begin_step: int = 0, end_step: int, steepness: float = 10.0
) -> optax.Schedule:
    """Go from 1, soft, to 0, hard, along a sigmoid that reaches both.

    s(t) = (h(f) - h(1)) / (h(0) - h(1)),   h(f) = 1 / (1 + exp(steepness (f - 1/2))),
    f = (t - begin_step) / (end_step - begin_step)

    Args:
        begin_step: the count up to which the softness is 1.
        end_step: the count from which it is 0.
        steepness: of the middle, greater than 0; near 0 a straight line.

    Returns:
        A schedule, count -> softness, for `jopt.projections`.

    Raises:
        ValueError: the steps are not in order, or `steepness` is not positive.

    References:
        Jin et al., PARQ, arXiv:2503.15748, section 5.

    >>> schedule = sigmoid_softness(begin_step=0, end_step=10)
    >>> [round(float(schedule(t)), 3) for t in (0, 2, 5, 8, 10, 99)]
    [1.0, 0.959, 0.5, 0.041, 0.0, 0.0]
    """
    if not 0 <= begin_step < end_step:
        raise ValueError(
            "begin_step and end_step must be in order and at least 0, "
            f"got {begin_step} and {end_step}"
        )
    if not 0.0 < steepness < float("inf"):
        raise ValueError(f"steepness must be positive and finite, got {steepness}")

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        share = (jnp.asarray(count, jnp.float32) - begin_step) / (end_step - begin_step)
        # h(f) - h(1) over h(0) - h(1) in a form that is exactly 1 and 0 at the ends.
        half = jnp.float32(steepness / 4)
        curve = jnp.tanh(2 * half * (0.5 - jnp.clip(share, 0.0, 1.0))) / jnp.tanh(half)
        return jnp.where(share <= 0, 1.0, jnp.where(share >= 1, 0.0, (1 + curve) / 2))

    return schedule
