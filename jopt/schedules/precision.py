"""Bits as a function of the step count: start wide, end at the width that ships.

A traced width changes only the number of grid points that quantization-aware training
uses, so one compiled step serves the whole schedule. Widths are returned as float32
whole numbers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax


def _check_bits(name: str, bits: float) -> None:
    if bits != int(bits) or not 2 <= bits <= 16:
        raise ValueError(f"{name} must be a whole number in [2, 16], got {bits}")


def stepwise_bits(bits_from_step: Mapping[int, int]) -> optax.Schedule:
    """Switch to a new width at each of the given steps.

    Args:
        bits_from_step: step -> bits from that step on; holds step 0.

    Returns:
        A schedule, count -> bits.

    Raises:
        ValueError: step 0 is missing, a step is negative, or a width is outside
            [2, 16].

    >>> schedule = stepwise_bits({0: 8, 100: 6, 200: 4})
    >>> [int(schedule(t)) for t in (0, 99, 100, 500)]
    [8, 8, 6, 4]
    """
    steps = sorted(bits_from_step)
    if not steps or steps[0] != 0:
        raise ValueError(
            f"bits_from_step must say the bits from step 0 on, got steps {steps}; "
            "steps count from 0"
        )
    for step in steps:
        _check_bits(f"bits_from_step[{step}]", bits_from_step[step])
    pieces = [optax.constant_schedule(float(bits_from_step[step])) for step in steps]
    return optax.join_schedules(pieces, steps[1:])


def gradual_bits(
    start: int, stop: int, *, begin_step: int = 0, end_step: int
) -> optax.Schedule:
    """Go from `start` to `stop` bits, one bit at a time, at equal distances.

    b(t) = round(start + (stop - start) * (t - begin_step) / (end_step - begin_step))

    Args:
        start: bits up to `begin_step`.
        stop: bits from `end_step` on; below or above `start`.
        begin_step: the count at which the ramp begins.
        end_step: the count at which the ramp ends.

    Returns:
        A schedule, count -> bits.

    Raises:
        ValueError: a width is outside [2, 16], or the steps are not in order.

    >>> schedule = gradual_bits(8, 4, begin_step=0, end_step=8)
    >>> [int(schedule(t)) for t in (0, 2, 4, 6, 8, 20)]
    [8, 7, 6, 5, 4, 4]
    """
    _check_bits("start", start)
    _check_bits("stop", stop)
    if not 0 <= begin_step < end_step:
        raise ValueError(
            "begin_step and end_step must be in order and at least 0, "
            f"got {begin_step} and {end_step}"
        )
    line = optax.linear_schedule(start, stop, end_step - begin_step, begin_step)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return jnp.round(jnp.asarray(line(count), jnp.float32))

    return schedule
