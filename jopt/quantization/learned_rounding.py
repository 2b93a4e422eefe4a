"""Rounding that is learned, up or down for each weight, from the Gram matrix alone.

Between the levels a <= w <= b beside a weight, in units of its scale,

    AdaRound    q = a + h(v) (b - a),  h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1),
                loss = ||X W - X Q||^2 / ||X W - X round(W)||^2
                       + strength mean(1 - |2 h(v) - 1|^beta),  beta from 20 to 2
    AutoRound   q = round(w / s + v),  |v| <= 1/2,  s from a range shrunk by alpha in
                [1/2, 1], with the gradients of the identity, by steps of one size

with ||X (W - Q)||^2 = tr(D^T G D), so no activation is kept. What ends on a side of the
middle stays there; the best of what was met is taken, rounding to nearest among it.

Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization,
arXiv:2004.10568; Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for
the Quantization of LLMs, arXiv:2309.05516.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jopt.arrays.codes import compute_levels, scale_levels
from jopt.arrays.scales import (
    Scale,
    compute_range,
    compute_scale,
    effective_scale,
    spread_groups,
)
from jopt.arrays.specs import QuantSpec
from jopt.arrays.straight_through import straight_through
from jopt.quantization.layer_solving import Solved

_STRETCH, _EDGE = 1.2, 0.1  # so that h reaches 0 and 1
_WARMUP = 0.2  # part of the steps without the second term


def lost(weights: jax.Array, values: jax.Array, gram: jax.Array) -> jax.Array:
    """Return ||X W - X Q||^2 = tr(D^T G D)."""
    d = weights - values
    return jnp.sum(d * jnp.matmul(gram, d, precision=lax.Precision.HIGHEST))


def neighbours(
    weights: jax.Array, scale: Scale, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
    """Return the levels below and above each weight, float32, times their scale.

    Args:
        weights: [inputs, outputs].
        scale: fields [groups, outputs].
        spec: of the matrix.

    Returns:
        Both, of the shape of the weights; equal on and beyond the ends of the grid.
    """
    down, up = (
        compute_levels(weights, scale, spec, rounding=rule) for rule in (_down, _up)
    )
    return tuple(scale_levels(x, scale, jnp.float32) for x in (down, up))  # type: ignore[return-value]


def _down(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return jnp.floor(x)


def _up(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return jnp.ceil(x)


def learn_up_or_down(
    weights: jax.Array,
    gram: jax.Array,
    squares: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    strength: float,
) -> Solved:
    """Quantize one matrix by AdaRound.

    Args:
        weights: [inputs, outputs], float32.
        gram: [inputs, inputs].
        squares: of no account.
        scale: fields [groups, outputs], which stay.
        spec: of the matrix; any format.
        optimizer: of v.
        num_steps: of it.
        strength: of the term that pushes h(v) to 0 and 1.

    Returns:
        The weights on the grid, and the scales.
    """
    del squares
    below, above = neighbours(weights, scale, spec)
    gap = above - below
    nearest = scale_levels(compute_levels(weights, scale, spec), scale, jnp.float32)
    unit = lost(weights, nearest, gram)
    place = jnp.where(gap == 0, 0.5, (weights - below) / jnp.where(gap == 0, 1.0, gap))
    start = jax.scipy.special.logit((jnp.clip(place, 0.0, 1.0) + _EDGE) / _STRETCH)

    def share(v: jax.Array) -> jax.Array:
        return jnp.clip(_STRETCH * jax.nn.sigmoid(v) - _EDGE, 0.0, 1.0)

    def loss(v: jax.Array, step: jax.Array) -> jax.Array:
        done = step / max(num_steps, 1)
        late = jnp.clip((done - _WARMUP) / (1 - _WARMUP), 0.0, 1.0)
        beta = 2.0 + 9.0 * (1.0 + jnp.cos(jnp.pi * late))
        h = share(v)
        term = jnp.mean(1.0 - jnp.abs(2.0 * h - 1.0) ** beta)
        now = lost(weights, below + h * gap, gram) / jnp.where(unit > 0, unit, 1.0)
        return now + jnp.where(done < _WARMUP, 0.0, strength) * term

    def update(step: jax.Array, carry: Any) -> Any:
        v, state = carry
        updates, state = optimizer.update(jax.grad(loss)(v, step), state, v)
        return optax.apply_updates(v, updates), state

    v, _ = lax.fori_loop(0, num_steps, update, (start, optimizer.init(start)))
    learned = jnp.where(share(v) >= 0.5, above, below)
    is_better = lost(weights, learned, gram) < unit
    return Solved(jnp.where(is_better, learned, nearest), scale)


def learn_offsets(
    weights: jax.Array,
    gram: jax.Array,
    squares: jax.Array,
    scale: Scale,
    spec: QuantSpec,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
) -> Solved:
    """Quantize one matrix by AutoRound.

    Args:
        weights: [inputs, outputs], float32.
        gram: [inputs, inputs].
        squares: of no account.
        scale: of rounding to nearest.
        spec: of the matrix; an integer format.
        optimizer: of v and of how far ranges shrink.
        num_steps: of it.

    Returns:
        The weights on the grid, and their scales.
    """
    del squares
    low, high = compute_range(weights, spec)

    def grid(shrunk: Any) -> Scale:
        below, above = (jnp.clip(x, 0.5, 1.0) for x in shrunk)
        return compute_scale(low * below, high * above, spec)

    def rounded(free: Any) -> tuple[jax.Array, Scale]:
        """Round for real, whatever the gradients."""
        own = grid(free["range"])
        offset = jnp.clip(free["offset"], -0.5, 0.5)
        step = spread_groups(effective_scale(own), weights.shape)
        levels = compute_levels(weights + offset * step, own, spec)
        return scale_levels(levels, own, jnp.float32), own

    def smooth(free: Any) -> jax.Array:
        """What rounding is taken for on the way back: s (w / s + v), clipped."""
        below, above = (jnp.clip(x, 0.5, 1.0) for x in free["range"])
        offset = jnp.clip(free["offset"], -0.5, 0.5)
        least, most = (
            spread_groups(x, weights.shape) for x in (low * below, high * above)
        )
        if spec.symmetric:
            most = jnp.maximum(-least, most)
            least = -most
        span = 2.0**spec.format.bits - (2.0 if spec.symmetric else 1.0)
        step = (most - least) / span
        error = lax.stop_gradient((rounded(free)[0] - weights) / step)
        inside = (weights >= least) & (weights <= most)
        end = jnp.where(weights < least, least, most)
        moved = weights + error * step + offset * lax.stop_gradient(step)
        return jnp.where(inside, moved, end)

    def loss(free: Any) -> tuple[jax.Array, jax.Array]:
        values = straight_through(rounded(free)[0], smooth(free))
        now = lost(weights, values, gram)
        return now, now

    def update(_: jax.Array, carry: Any) -> Any:
        free, state, best, least = carry
        (_, now), slope = jax.value_and_grad(loss, has_aux=True)(free)
        is_better = now < least
        best = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), free, best)
        updates, state = optimizer.update(slope, state, free)
        free = optax.apply_updates(free, updates)
        return free, state, best, jnp.minimum(now, least)

    ones = jnp.ones(low.shape, jnp.float32)
    free = {"offset": jnp.zeros_like(weights), "range": (ones, ones)}
    least = jnp.float32(jnp.inf)
    carry = (free, optimizer.init(free), free, least)
    free, _, best, least = lax.fori_loop(0, num_steps, update, carry)
    last = loss(free)[1] < least
    best = jax.tree.map(lambda a, b: jnp.where(last, a, b), free, best)
    values, own = rounded(best)
    return Solved(values, own)
