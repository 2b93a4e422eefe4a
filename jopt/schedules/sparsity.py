"""Sparsity ramps: the fraction of zeros as a function of the step count.

    s(t) = stop + (start - stop) * (1 - (t - begin) / (end - begin))^power

clipped to `start` before `begin_step` and to `stop` from `end_step` on. Power 3 prunes
fast while many weights are redundant and slowly near the end (Zhu and Gupta, To prune,
or not to prune, arXiv:1710.01878); its shape is `optax.polynomial_schedule`.
"""

from typing import Any

import jax.numpy as jnp
import optax


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name} must be a fraction in [0, 1], got {value}; "
            "90 % of zeros is a sparsity of 0.9"
        )


def _ramp(
    start: float, stop: float, begin_step: int, end_step: int, power: int
) -> optax.Schedule:
    _check_fraction("start", start)
    _check_fraction("stop", stop)
    if begin_step < 0:
        raise ValueError(f"begin_step must be at least 0, got {begin_step}")
    if end_step <= begin_step:
        raise ValueError(
            f"end_step must be greater than begin_step={begin_step}, got {end_step}; "
            "use one_shot_sparsity for a jump"
        )
    return optax.polynomial_schedule(
        init_value=start,
        end_value=stop,
        power=power,
        transition_steps=end_step - begin_step,
        transition_begin=begin_step,
    )


def constant_sparsity(sparsity: float) -> optax.Schedule:
    """Keep one sparsity from the first step on.

    Args:
        sparsity: fraction of zeros in [0, 1].

    Returns:
        A schedule, count -> sparsity.

    Raises:
        ValueError: `sparsity` is outside [0, 1].

    >>> constant_sparsity(0.5)(1000)
    0.5
    """
    _check_fraction("sparsity", sparsity)
    return optax.constant_schedule(sparsity)


def one_shot_sparsity(sparsity: float, *, step: int) -> optax.Schedule:
    """Jump from 0 to `sparsity` at `step`.

    Args:
        sparsity: fraction of zeros in [0, 1], reached at count `step`.
        step: the count of the jump, at least 0.

    Returns:
        A schedule, count -> sparsity.

    Raises:
        ValueError: `sparsity` is outside [0, 1] or `step` is negative.

    >>> schedule = one_shot_sparsity(0.5, step=10)
    >>> float(schedule(9)), float(schedule(10))
    (0.0, 0.5)
    """
    _check_fraction("sparsity", sparsity)
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    before, after = optax.constant_schedule(0.0), optax.constant_schedule(sparsity)
    return optax.join_schedules([before, after], [step])


def linear_sparsity(
    start: float, stop: float, *, begin_step: int = 0, end_step: int
) -> optax.Schedule:
    """Ramp from `start` to `stop` in a straight line.

    s(t) = start + (stop - start) * (t - begin_step) / (end_step - begin_step)

    Args:
        start: fraction of zeros up to `begin_step`; may be greater than 0.
        stop: fraction of zeros from `end_step` on.
        begin_step: the count at which the ramp leaves `start`.
        end_step: the count at which the ramp reaches `stop`.

    Returns:
        A schedule, count -> sparsity.

    Raises:
        ValueError: a fraction is outside [0, 1], or the steps are not in order.

    >>> schedule = linear_sparsity(0.2, 0.8, begin_step=10, end_step=20)
    >>> [round(float(schedule(t)), 3) for t in (0, 10, 15, 20, 99)]
    [0.2, 0.2, 0.5, 0.8, 0.8]
    """
    return _ramp(start, stop, begin_step, end_step, power=1)


def cubic_sparsity(
    start: float, stop: float, *, begin_step: int = 0, end_step: int
) -> optax.Schedule:
    """Ramp from `start` to `stop`, steep at first and flat at the end.

    s(t) = stop + (start - stop) * (1 - (t - begin_step) / (end_step - begin_step))^3

    Args:
        start: fraction of zeros up to `begin_step`; may be greater than 0.
        stop: fraction of zeros from `end_step` on.
        begin_step: the count at which the ramp leaves `start`.
        end_step: the count at which the ramp reaches `stop`.

    Returns:
        A schedule, count -> sparsity.

    Raises:
        ValueError: a fraction is outside [0, 1], or the steps are not in order.

    References:
        Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for
        model compression, arXiv:1710.01878, equation 1.

    >>> schedule = cubic_sparsity(0.0, 0.8, begin_step=10, end_step=20)
    >>> [round(float(schedule(t)), 3) for t in (0, 10, 15, 20, 99)]
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    return _ramp(start, stop, begin_step, end_step, power=3)


def geometric_sparsity(
    rate: float, *, every_steps: int, begin_step: int = 0, stop: float = 1.0
) -> optax.Schedule:
    """Prune a fraction of what is left in each round: lottery tickets.

    s(t) = 1 - (1 - rate)^k,   k = (t - begin_step) // every_steps + 1,   at most `stop`

    Args:
        rate: fraction of the remaining weights that each round prunes, in [0, 1].
        every_steps: counts from one round to the next, at least 1.
        begin_step: the count of the first round; 0 before it.
        stop: the sparsity that no round goes beyond.

    Returns:
        A schedule, count -> sparsity.

    Raises:
        ValueError: a fraction is outside [0, 1], or a count is out of range.

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, arXiv:1803.03635.

    >>> schedule = geometric_sparsity(0.5, every_steps=10, begin_step=10)
    >>> [float(schedule(t)) for t in (0, 10, 19, 20, 30)]
    [0.0, 0.5, 0.5, 0.75, 0.875]
    """
    _check_fraction("rate", rate)
    _check_fraction("stop", stop)
    if every_steps < 1:
        raise ValueError(f"every_steps must be at least 1, got {every_steps}")
    if begin_step < 0:
        raise ValueError(f"begin_step must be at least 0, got {begin_step}")

    def schedule(count: Any) -> Any:
        rounds = jnp.maximum((count - begin_step) // every_steps + 1, 0)
        return jnp.minimum(1 - jnp.float32(1 - rate) ** rounds, stop)

    return schedule
