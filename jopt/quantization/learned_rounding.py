"""Rounding that is learned, up or down for each weight, from the Gram matrix alone.

Between the levels a <= w <= b beside a weight, in units of its scale,

    AdaRound    q = a + h(v) (b - a),  h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1),
                loss = ||X w - X q||^2 / ||X w - X round(w)||^2
                       + strength mean(1 - |2 h(v) - 1|^beta),  beta from 20 to 2
    AutoRound   q = round(w / s + v),  |v| <= 1/2,  s from a range shrunk by alpha in
                [1/2, 1], with the gradients of the identity, by steps of one size

with ||X w - X q||^2 = d^T G d for each output, so no activation is kept, and outputs do
not depend on each other: each takes the best that it met, rounding to nearest among it.
A step costs one product, G D, which gives the loss and its gradient.

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
from jopt.arrays.rounding import Rounding, down, up
from jopt.arrays.scales import Scale, compute_range, compute_scale, spread_groups
from jopt.arrays.specs import QuantSpec
from jopt.quantization.layer_solving import Solved

_STRETCH, _EDGE = 1.2, 0.1  # so that h reaches 0 and 1
_WARMUP = 0.2  # part of the steps without the second term


def lost(weights: jax.Array, values: jax.Array, gram: jax.Array) -> jax.Array:
    """Return ||X w - X q||^2 = d^T G d of each output.

    Args:
        weights: [inputs, outputs].
        values: of that shape.
        gram: [inputs, inputs].

    Returns:
        [1, outputs].
    """
    return _lost_and_seen(weights, values, gram)[0]


def _lost_and_seen(
    weights: jax.Array, values: jax.Array, gram: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return what each output loses and G (Q - W), half of its gradient by Q."""
    d = values - weights
    seen = jnp.matmul(gram, d, precision=lax.Precision.HIGHEST)
    return jnp.sum(d * seen, axis=0, keepdims=True), seen


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
    below, above = (
        scale_levels(
            compute_levels(weights, scale, spec, rounding=rule), scale, jnp.float32
        )
        for rule in (down, up)
    )
    return below, above


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
    least = lost(weights, nearest, gram)
    unit = jnp.where(least > 0, least, 1.0)
    place = jnp.where(gap == 0, 0.5, (weights - below) / jnp.where(gap == 0, 1.0, gap))
    start = jax.scipy.special.logit((jnp.clip(place, 0.0, 1.0) + _EDGE) / _STRETCH)

    def share(v: jax.Array) -> jax.Array:
        return jnp.clip(_STRETCH * jax.nn.sigmoid(v) - _EDGE, 0.0, 1.0)

    def slope(v: jax.Array, step: jax.Array) -> jax.Array:
        """Return the gradient of the sum over outputs, with one product by G."""
        done = step / num_steps
        late = jnp.clip((done - _WARMUP) / (1 - _WARMUP), 0.0, 1.0)
        beta = 2.0 + 9.0 * (1.0 + jnp.cos(jnp.pi * late))
        weight = jnp.where(done < _WARMUP, 0.0, strength) / weights.shape[0]
        _, seen = _lost_and_seen(weights, below + share(v) * gap, gram)
        pull = 2.0 * seen * gap / unit

        def loss(v: jax.Array) -> jax.Array:
            h = share(v)
            term = 1.0 - jnp.abs(2.0 * h - 1.0) ** beta
            return jnp.sum(pull * h) + weight * jnp.sum(term)

        return jax.grad(loss)(v)

    def update(step: jax.Array, carry: Any) -> Any:
        v, state = carry
        updates, state = optimizer.update(slope(v, step), state, v)
        return optax.apply_updates(v, updates), state

    v, _ = lax.fori_loop(0, num_steps, update, (start, optimizer.init(start)))
    learned = jnp.where(share(v) >= 0.5, above, below)
    is_better = lost(weights, learned, gram) < least
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
        spec: of the matrix; any format.
        optimizer: of v and of how far ranges shrink.
        num_steps: of it.

    Returns:
        The weights on the grid, and their scales.
    """
    del squares
    low, high = compute_range(weights, spec)
    is_fixed = scale.outer_scale is not None  # one of all groups cannot follow each

    def ends(shrunk: Any) -> tuple[jax.Array, jax.Array]:
        below, above = (jnp.clip(x, 0.5, 1.0) for x in shrunk)
        return low * below, high * above

    def rounded(free: Any) -> tuple[jax.Array, Scale]:
        """Round for real, whatever the gradients."""
        own = scale if is_fixed else compute_scale(*ends(free["range"]), spec)
        rule = _offset(jnp.clip(free["offset"], -0.5, 0.5))
        levels = compute_levels(weights, own, spec, rounding=rule)
        return scale_levels(levels, own, jnp.float32), own

    def smooth(free: Any, values: jax.Array, own: Scale) -> jax.Array:
        """What rounding is taken for on the way back: s (w / s + v), clipped."""
        grid = _ends_and_step(*ends(free["range"]), spec)
        least, most, step = (spread_groups(x, weights.shape) for x in grid)
        error = (values - weights) / jnp.where(step > 0, lax.stop_gradient(step), 1.0)
        below, above = neighbours(weights, own, spec)
        offset = jnp.clip(free["offset"], -0.5, 0.5)
        moved = weights + error * step + offset * (above - below)
        inside = (weights >= least) & (weights <= most)
        return jnp.where(inside, moved, jnp.where(weights < least, least, most))

    def update(_: jax.Array, carry: Any) -> Any:
        free, state, best, least = carry
        values, own = rounded(free)
        now, seen = _lost_and_seen(weights, values, gram)
        _, back = jax.vjp(lambda free: smooth(free, values, own), free)
        (slope,) = back(2.0 * seen)
        best = _better(now < least, free, best)
        updates, state = optimizer.update(slope, state, free)
        free = optax.apply_updates(free, updates)
        return free, state, best, jnp.minimum(now, least)

    ones = jnp.ones(low.shape, jnp.float32)
    free = {"offset": jnp.zeros_like(weights), "range": (ones, ones)}
    least = jnp.full((1, weights.shape[1]), jnp.inf, jnp.float32)
    carry = (free, optimizer.init(free), free, least)
    free, _, best, least = lax.fori_loop(0, num_steps, update, carry)
    last = lost(weights, rounded(free)[0], gram) < least
    values, own = rounded(_better(last, free, best))
    return Solved(values, own)


def _ends_and_step(
    low: jax.Array, high: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what the ends of a range are taken to, and |scale|."""
    if not spec.symmetric:
        return low, high, (high - low) / (2.0**spec.format.bits - 1.0)
    far = jnp.maximum(-low, high)
    if spec.is_narrow:
        return -far, far, far / spec.format.max_value
    step = far / (spec.format.max_value + 1.0)
    is_low = -low >= high
    near = far - step
    return -jnp.where(is_low, far, near), jnp.where(is_low, near, far), step


def _offset(v: jax.Array) -> Rounding:
    """Return the rule that rounds x + v, to a neighbour of x."""

    def rule(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return jnp.clip(jnp.round(x + v), jnp.floor(x), jnp.ceil(x))

    return rule


def _better(is_better: jax.Array, new: Any, old: Any) -> Any:
    """Choose output by output."""
    return jax.tree.map(lambda a, b: jnp.where(is_better, a, b), new, old)
