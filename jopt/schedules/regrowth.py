"""How much of a moving mask is dropped and grown again, over time."""

import optax


def cosine_drop(fraction: float, num_steps: int) -> optax.Schedule:
    """Anneal the fraction of kept weights that RigL and SET drop to zero.

    f(t) = fraction / 2 * (1 + cos(pi * t / num_steps)),   0 from num_steps on

    Args:
        fraction: of the kept weights at count 0, in [0, 1].
        num_steps: the count from which masks stay as they are, at least 1.

    Returns:
        A schedule, count -> fraction.

    Raises:
        ValueError: `fraction` or `num_steps` is out of range.

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, arXiv:1911.11134.

    >>> schedule = cosine_drop(0.3, 100)
    >>> [round(float(schedule(t)), 3) for t in (0, 50, 100, 200)]
    [0.3, 0.15, 0.0, 0.0]
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(
            f"fraction must be in [0, 1], got {fraction}; 0.3 is 30 % of what is kept"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return optax.cosine_decay_schedule(init_value=fraction, decay_steps=num_steps)
