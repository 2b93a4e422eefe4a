"""The state of weight quantization, and how to read scales from any optimizer state."""

from typing import Any, NamedTuple

import jax
import optax

from jopt.arrays.scales import Scale
from jopt.updates.project import ProjectState
from jopt.updates.states import find_states, is_masked_node, merge_masked


class QuantizeState(NamedTuple):
    """Scales in use and what they are made of; `MaskedNode()` where not needed."""

    scale: Any  # as params, of the array's rank, sizes divide: scale_dtype
    zero_point: Any  # as scale; asymmetric specs only
    outer_scale: Any  # as scale, float32; nvfp4 only
    low: Any  # as scale, float32: moving average of the lower end of the range
    high: Any  # as scale, float32: of the upper end
    log_scale: Any  # as scale, float32: the natural logarithm that LSQ trains
    scale_optimizer_state: optax.OptState  # () unless scales are learned
    key: Any  # PRNG key for rounding, or optax.MaskedNode()
    memory: Any  # of the projection, () for those without


def get_scales(state: optax.OptState) -> Any:
    """Read the scales in use out of any optimizer state.

    Args:
        state: an optimizer state with one or several `quantize_weights` at any depth.

    Returns:
        A tree like params whose quantized leaves are replaced by a `Scale` (scale, zero
        point, outer scale), the others by `optax.MaskedNode()`: what
        `jopt.quantize(params, spec, scales=...)` takes.

    Raises:
        ValueError: there is no `quantize_weights` in the state.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.quantize_weights(optax.sgd(0.1), jopt.QuantSpec(jopt.formats.int8))
    >>> get_scales(tx.init({"w": jnp.full((2, 1), 1.27)}))["w"].scale
    Array([[0.0100098]], dtype=bfloat16)
    """
    found = [
        s.projection_state
        for s in find_states(state, ProjectState)
        if isinstance(s.projection_state, QuantizeState)
    ]
    if not found:
        raise ValueError(
            "state must hold scales, got a state without jopt.quantize_weights in it; "
            "pass the state of the transformation that was built with it"
        )
    trees = [scale_tree(s) for s in found]
    merged = trees[0]
    for tree in trees[1:]:
        merged = merge_masked(merged, tree, both=lambda outer, inner: outer)
    return merged


def scale_tree(state: QuantizeState) -> Any:
    """Return the scales in use, a `Scale` per quantized leaf."""

    def scale(s: Any, zero_point: Any, outer_scale: Any) -> Any:
        if is_masked_node(s):
            return s
        return Scale(
            s,
            None if is_masked_node(zero_point) else zero_point,
            None if is_masked_node(outer_scale) else outer_scale,
        )

    return jax.tree.map(
        scale, state.scale, state.zero_point, state.outer_scale, is_leaf=is_masked_node
    )
