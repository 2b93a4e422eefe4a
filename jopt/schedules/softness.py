"""Temperature as a function of the step count, for soft targets that sharpen.

Temperatures act as ratios, so they move by a constant factor per step; the curve is
`optax.exponential_decay` between two given values.
"""

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
