"""Warmup-stable-decay: a learning rate whose end need not be known at the start.

Train at a constant rate for as long as wanted, then cool down over a short stretch; one
run serves many budgets because each cooldown may branch off the same plateau (Hu et
al., MiniCPM, arXiv:2404.06395; Hägele et al., Scaling Laws and Compute-Optimal Training
Beyond Fixed Training Durations, arXiv:2405.18392).
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax


def warmup_stable_decay(
    peak_value: float,
    *,
    warmup_steps: int = 0,
    stable_steps: int,
    decay_steps: int,
    init_value: float = 0.0,
    end_value: float = 0.0,
    cooldown: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt",
) -> optax.Schedule:
    """Warm up linearly, hold, then cool down.

    With u in [0, 1] the part of the cooldown that is done, the value there is
    `end_value + (peak_value - end_value) * f(u)` with

        linear: f = 1 - u    cosine: f = (1 + cos(pi u)) / 2    1-sqrt: f = 1 - sqrt(u)

    Args:
        peak_value: the value of the plateau.
        warmup_steps: length of the linear rise from `init_value`.
        stable_steps: length of the plateau.
        decay_steps: length of the cooldown, at least 1.
        init_value: the value at count 0 if there is a warmup.
        end_value: the value from the end of the cooldown on.
        cooldown: the shape f of the cooldown.

    Returns:
        A schedule, count -> learning rate.

    Raises:
        ValueError: a length is negative, or `cooldown` is not one of the three.

    References:
        Hu et al., MiniCPM, arXiv:2404.06395; Hägele et al., arXiv:2405.18392, where
        1-sqrt beats the other shapes.

    >>> schedule = warmup_stable_decay(
    ...     1.0, warmup_steps=10, stable_steps=80, decay_steps=10, cooldown="linear"
    ... )
    >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 90, 95, 100, 200)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    shapes: dict[str, Callable[[jax.Array], jax.Array]] = {
        "linear": lambda u: 1.0 - u,
        "cosine": lambda u: 0.5 * (1.0 + jnp.cos(jnp.pi * u)),
        "1-sqrt": lambda u: 1.0 - jnp.sqrt(u),
    }
    if cooldown not in shapes:
        raise ValueError(f"cooldown must be one of {list(shapes)}, got {cooldown!r}")
    for name, steps, least in (
        ("warmup_steps", warmup_steps, 0),
        ("stable_steps", stable_steps, 0),
        ("decay_steps", decay_steps, 1),
    ):
        if steps < least:
            raise ValueError(f"{name} must be at least {least}, got {steps}")

    def decay(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.clip(jnp.asarray(count, jnp.float32) / decay_steps, 0.0, 1.0)
        return end_value + (peak_value - end_value) * shapes[cooldown](done)

    pieces: list[optax.Schedule] = [optax.constant_schedule(peak_value), decay]
    boundaries = [warmup_steps + stable_steps]
    if warmup_steps:
        pieces.insert(0, optax.linear_schedule(init_value, peak_value, warmup_steps))
        boundaries.insert(0, warmup_steps)
    return optax.join_schedules(pieces, boundaries)
