"""The gradients of a clipped grid: to the weights inside it, and to its scale (LSQ).

With q = s * clip(round(w / s)) and g the gradient at q,

    dq/dw = 1 inside the range, 0 outside
    dq/ds = q/s - w/s inside the range, q/s outside

so d loss / d log s = sum of g q - (g inside) w over the group, scaled by
1 / sqrt(elements * largest level) to keep scales in step with weights (Esser et al.,
Learned Step Size Quantization, arXiv:1902.08153, equations 3 and 5). As there, learned
ranges end at the last level; others half a step beyond it, where numbers still round to
that level.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays.quantized import fake_quantize
from jopt.arrays.scales import (
    Scale,
    effective_scale,
    highest_level,
    spread_groups,
    sum_groups,
)
from jopt.arrays.specs import QuantSpec
from jopt.quantization.state import QuantizeState, scale_tree
from jopt.updates.project import ProjectState
from jopt.updates.states import is_masked_node


def inside_range(
    updates: optax.Updates,
    state: ProjectState,
    specs: Any,
    bits: Any,
    on: jax.Array,
    *,
    is_learning: bool,
) -> Any:
    """Cut the gradients of latents that lie beyond the range."""

    def cut(spec: Any, w: Any, g: Any, scale: Any) -> Any:
        if is_masked_node(spec):
            return spec
        if is_learning and spec.format.scale_rule == "range":
            step = spread_groups(effective_scale(scale), w.shape)
            is_inside = jnp.abs(w.astype(jnp.float32)) <= highest_level(spec) * step
            return jnp.where(on & ~is_inside, jnp.zeros_like(g), g)
        _, pull = jax.vjp(lambda x: fake_quantize(x, spec, scale=scale, bits=bits), w)
        (gated,) = pull(g.astype(w.dtype))
        return jnp.where(on, gated.astype(g.dtype), g)

    return jax.tree.map(
        cut,
        specs,
        state.latent,
        updates,
        scale_tree(state.projection_state),
        is_leaf=is_masked_node,
    )


def learn(
    updates: optax.Updates,
    inside: Any,
    state: ProjectState,
    specs: Any,
    on: jax.Array,
    train: optax.GradientTransformationExtraArgs,
    extra_args: Mapping[str, Any],
) -> QuantizeState:
    """Step log s along sum(g * dq/ds) * s / sqrt(N * largest level), as LSQ does.

    While not `on` nothing moves, the optimizer's count included: steps on zero
    gradients would use up its bias correction.
    """
    memory = state.projection_state
    grads = jax.tree.map(
        lambda spec, w, g, cut, s: (
            spec if is_masked_node(spec) else _scale_gradient(w, g, cut, s, spec)
        ),
        specs,
        state.latent,
        updates,
        inside,
        memory.scale,
        is_leaf=is_masked_node,
    )

    def step() -> tuple[Any, Any]:
        steps, optimizer_state = train.update(
            grads, memory.scale_optimizer_state, memory.log_scale, **extra_args
        )
        return optax.apply_updates(memory.log_scale, steps), optimizer_state

    log_scale, optimizer_state = jax.lax.cond(
        on, step, lambda: (memory.log_scale, memory.scale_optimizer_state)
    )
    return memory._replace(log_scale=log_scale, scale_optimizer_state=optimizer_state)


def _scale_gradient(
    w: jax.Array,
    g: jax.Array,
    inside: jax.Array,
    scale: jax.Array,
    spec: QuantSpec,
) -> jax.Array:
    """Return d loss / d log s = sum over the group of g q - (g inside) w."""
    q = fake_quantize(w, spec, scale=Scale(scale, None, None)).astype(jnp.float32)
    terms = g.astype(jnp.float32) * q - inside.astype(jnp.float32) * w.astype(
        jnp.float32
    )
    total = sum_groups(terms, scale.shape)
    per_group = w.size // scale.size
    return total / jnp.sqrt(per_group * highest_level(spec))
