"""Weights that jump between two levels for ever: damp them, or freeze them.

On the grid a latent near the middle of two levels is pushed over it by every step, and
back by the next: the level oscillates, although the latent hardly moves, and the
statistics of the layers behind follow. With x the level of a weight on this step,

    damping    adds strength * |q - clip(w)|^2 to the loss, q the level held constant
    freezing   o = x moved, against its last move;  f' = m o + (1 - m) f
               f' > threshold: the weight stays at round(average x) from here on

(Nagel et al., Overcoming Oscillations in Quantization-Aware Training,
arXiv:2203.11086, equations 6 to 9 and algorithm 1).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt.arrays.rounding import nearest
from jopt.quantization.grids import Grid, GridProjection
from jopt.trees import paths
from jopt.updates.states import is_masked_node

_FREE = int(np.iinfo(np.int16).min)  # no level: a weight that may move


class OscillationState(NamedTuple):
    """What freezing remembers; trees as params, `MaskedNode()` where not selected."""

    frequency: Any  # float32: moving average of oscillations per step
    level: Any  # int16: of the step before
    average: Any  # float32: moving average of levels
    direction: Any  # int8: of the last move of the level, 0 before the first
    frozen: Any  # int16: the level kept for good, or the least int16


def freeze_oscillations(
    threshold: float | optax.Schedule, *, momentum: float = 0.01
) -> GridProjection:
    """Keep weights whose level oscillates too often at the level they hold on average.

    f' = m o + (1 - m) f,   x' = m x + (1 - m) x_average,   frozen where f' > threshold

    A frozen weight keeps its level: its value follows its scale alone, and its latent
    stays with it. One that is pruned inside becomes zero and is free again, in case it
    grows back.

    Args:
        threshold: oscillations per step, a number or a schedule count -> number that
            may fall, as in the paper (a cosine from 0.04 to 0.01, for example).
        momentum: m, of both averages, in (0, 1].

    Returns:
        For `jopt.quantize_weights(..., projection=...)`; integer formats only.

    Raises:
        ValueError: `momentum` is out of range, or (at `init`) a format is no integer.

    References:
        Nagel et al., arXiv:2203.11086, algorithm 1.
    """
    if not 0.0 < momentum <= 1.0:
        raise ValueError(f"momentum must be in (0, 1], got {momentum}; 0.01 is usual")

    def init(latent: Any) -> OscillationState:
        def full(value: float, dtype: Any) -> Any:
            return jax.tree.map(lambda w: jnp.full_like(w, value, dtype), latent)

        return OscillationState(
            frequency=full(-1.0, jnp.float32),  # no level is known yet
            level=full(0, jnp.int16),
            average=full(0.0, jnp.float32),
            direction=full(0, jnp.int8),
            frozen=full(_FREE, jnp.int16),
        )

    def update(
        latent: Any, grids: Any, memory: OscillationState, count: jax.Array
    ) -> tuple[Any, OscillationState]:
        limit = threshold(count) if callable(threshold) else threshold
        treedef: Any
        ws, treedef = jax.tree.flatten(latent)
        names = paths.leaf_paths(latent)
        olds = zip(*(treedef.flatten_up_to(tree) for tree in memory), strict=True)
        found = [
            _step(w, grid, OscillationState(*old), momentum, limit, name)
            for w, grid, old, name in zip(
                ws, treedef.flatten_up_to(grids), olds, names, strict=True
            )
        ]
        landed = treedef.unflatten([params for params, _ in found])
        if not found:
            return landed, memory
        fields = zip(*(new for _, new in found), strict=True)
        return landed, OscillationState(*(treedef.unflatten(list(f)) for f in fields))

    def frozen(memory: OscillationState) -> Any:
        return jax.tree.map(lambda level: level != _FREE, memory.frozen)

    return GridProjection(init, update, frozen)


def _step(
    w: jax.Array,
    grid: Grid,
    old: OscillationState,
    momentum: float,
    limit: Any,
    path: str,
) -> tuple[jax.Array, OscillationState]:
    """Follow the levels of one leaf."""
    if grid.spec.format.kind != "integer":
        raise ValueError(
            f"freeze_oscillations needs an integer format for {path!r}, got "
            f"{grid.spec}; give this leaf one, or leave it out by a rule"
        )
    rounded = grid.levels(w)
    is_new, is_zero = old.frequency < 0, w == 0
    # A latent that was put at a level other than zero is zero only if a mask made it.
    was_frozen = (old.frozen != _FREE) & ~(is_zero & (old.frozen != 0))
    rounded = jnp.where(was_frozen, old.frozen.astype(jnp.float32), rounded)
    level = rounded.astype(jnp.int16)
    # A level that is not known yet did not move.
    before = jnp.where(is_new, level, old.level)
    direction = jnp.sign(level - before).astype(jnp.int8)
    has_moved = direction != 0
    oscillates = has_moved & (direction == -old.direction)
    frequency = momentum * oscillates + (1 - momentum) * jnp.maximum(old.frequency, 0.0)
    average = momentum * rounded + (1 - momentum) * old.average
    average = jnp.where(is_new, rounded, average)
    freezes = ~was_frozen & ~is_zero & (frequency > limit)
    kept = nearest(average)
    landed = jnp.where(freezes, kept, rounded)
    return grid.values(landed, w.dtype), OscillationState(
        frequency=frequency,
        level=landed.astype(jnp.int16),
        average=average,
        direction=jnp.where(has_moved, direction, old.direction),
        frozen=jnp.select(
            [freezes, was_frozen], [kept.astype(jnp.int16), old.frozen], _FREE
        ),
    )


def damped(updates: Any, latent: Any, grids: Any, strength: Any) -> Any:
    """Add the gradient of `strength * |q - clip(w)|^2`, the level q held constant.

    Args:
        updates: gradients.
        latent: where they act, `optax.MaskedNode()` where nothing is quantized.
        grids: a tree with a `Grid` for each latent.
        strength: a number.

    Returns:
        Gradients: g + 2 * strength * (w - q) between the ends of the grid.
    """

    def pull(w: Any, grid: Any, g: jax.Array) -> jax.Array:
        if is_masked_node(w):
            return g
        wide = w.astype(jnp.float32)
        ends = [
            grid.snap(jnp.full_like(wide, end), rounding=nearest)
            for end in (-jnp.inf, jnp.inf)
        ]
        # Beyond its ends the grid is as near as it can be: nothing pulls there.
        off = jnp.clip(wide, *ends) - grid.snap(wide, rounding=nearest)
        return (g + 2.0 * strength * off).astype(g.dtype)

    return jax.tree.map(pull, latent, grids, updates, is_leaf=is_masked_node)
