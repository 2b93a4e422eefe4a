"""Weights that stop moving: layer by layer, or the largest first.

    step = 0 where frozen,   step of the inner optimizer elsewhere

A wrapper *inside* `quantize_weights`, where it holds latents: with a scale that stays,
what they round to stays too, to the bit. Freezing the largest weights first and
training what is left makes up for their rounding errors (incremental network
quantization, Zhou et al., arXiv:1702.03044).

What `inner` prunes becomes zero, frozen or not.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt.arrays import packing
from jopt.arrays.arguments import require_count
from jopt.arrays.patterns import make_mask
from jopt.quantization.specs import masks_by_path
from jopt.trees import paths, rules
from jopt.updates.project import require_floats, require_params, require_transformation
from jopt.updates.states import find_states, is_masked_node

Fraction = float | Callable[[Any], Any]


_LARGEST = float(np.finfo(np.float32).max)


class FreezeState(NamedTuple):
    """State of `freeze`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), int32: updates so far
    # As params: packed masks where fractions freeze, else optax.MaskedNode().
    frozen: Any
    inner_state: optax.OptState


def freeze(
    inner: optax.GradientTransformation,
    *,
    from_step: int | Mapping[str, int | None] | None = None,
    fraction: Fraction | Mapping[str, Fraction | None] | None = None,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that more and more weights stay where they are.

    step = 0 where frozen, the step of `inner` elsewhere, and where `inner` prunes

    Args:
        inner: any Optax transformation; it sees all gradients, and its moments of
            frozen weights go on.
        from_step: count of the first update in which a whole leaf stays, for all
            selected leaves or by rules `{pattern: count or None}`.
        fraction: of each leaf that is frozen, in [0, 1]: a number, a schedule count ->
            fraction, or rules; such as `optax.piecewise_constant_schedule` for the
            portions of INQ. The largest magnitudes of the weights that enter a step
            join first; what is frozen stays frozen.
        select: which leaves may be frozen; float leaves with two axes, stacked ones not
            counted, when None.
        stacked_axes: which axis stacks layers, each with a portion of its own: an int
            or rules `{pattern: axis}`.

    Returns:
        A transformation, with one bit per weight of state for `fraction`.

    Raises:
        TypeError: `inner` is no transformation.
        ValueError: not exactly one of `from_step` and `fraction` is given, or one is
            out of range, or a rule matches nothing.

    References:
        Zhou et al., Incremental Network Quantization, arXiv:1702.03044.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.freeze(optax.sgd(1.0), fraction=0.5)
    >>> params = {"w": jnp.array([[4.0, 1.0], [-3.0, 2.0]])}
    >>> updates, _ = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
    >>> updates["w"].tolist()
    [[0.0, -1.0], [0.0, -1.0]]
    """
    inner = require_transformation(inner, "freeze")
    if (from_step is None) == (fraction is None):
        raise ValueError(
            "freeze needs from_step or fraction, and not both, got "
            f"from_step={from_step!r} and fraction={fraction!r}"
        )
    given: Any = from_step if fraction is None else fraction
    for value in given.values() if isinstance(given, Mapping) else [given]:
        if value is not None and from_step is not None:
            require_count("from_step", value)
        elif isinstance(value, int | float) and not 0.0 <= value <= 1.0:
            raise ValueError(f"fraction must be in [0, 1], got {value}")

    def plan(params: optax.Params) -> list[Any]:
        """Find what is asked of each leaf, None for nothing."""
        chosen = rules.select_leaves(select, params, stacked_axes=stacked_axes)
        is_several = isinstance(given, Mapping)
        found = rules.resolve(given, params) if is_several else [given] * len(chosen)
        return [v if c else None for c, v in zip(chosen, found, strict=True)]

    def init(params: optax.Params) -> FreezeState:
        require_floats(params, "freeze")
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        values = plan(params)
        rules.warn_if_none([v is not None for v in values], "freeze")
        frozen = [
            optax.MaskedNode()
            if v is None or fraction is None
            else packing.pack_mask(jnp.zeros_like(w, bool))
            for v, w in zip(values, leaves, strict=True)
        ]
        return FreezeState(
            jnp.zeros([], jnp.int32), treedef.unflatten(frozen), inner.init(params)
        )

    def update(
        updates: optax.Updates,
        state: FreezeState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FreezeState]:
        require_params(params, "freeze")
        steps, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        moves, frozen = (
            treedef.flatten_up_to(steps),
            treedef.flatten_up_to(state.frozen),
        )
        stacks = rules.stacked_axis_of(stacked_axes, params)
        masks = masks_by_path(inner_state)
        names = paths.leaf_paths(params)
        for i, value in enumerate(plan(params)):
            if value is None:
                continue
            if fraction is None:
                held: Any = state.count >= value
            else:
                frozen[i] = _grow(frozen[i], leaves[i], value, state.count, stacks[i])
                held = packing.unpack_mask(frozen[i])
            held &= ~_is_pruned(leaves[i], moves[i], masks.get(names[i], []))
            moves[i] = jnp.where(held, jnp.zeros_like(moves[i]), moves[i])
        count = optax.safe_increment(state.count)
        return treedef.unflatten(moves), FreezeState(
            count, treedef.unflatten(frozen), inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _is_pruned(w: jax.Array, move: jax.Array, masks: list[jax.Array]) -> Any:
    """Tell which weights a mask takes to zero on this step."""
    if not masks:
        return jnp.zeros((), bool)
    dropped = [~packing.unpack_mask(mask) for mask in masks]
    return functools.reduce(jnp.logical_or, dropped) & (w + move == 0)


def _grow(
    packed: jax.Array, w: jax.Array, fraction: Fraction, count: jax.Array, stack: Any
) -> jax.Array:
    """Freeze the largest of what is free, if the fraction is larger than before."""
    if not callable(fraction):
        now, is_due = jnp.asarray(fraction, jnp.float32), count == 0
    else:
        now = jnp.clip(jnp.asarray(fraction(count), jnp.float32), 0.0, 1.0)
        before = jnp.asarray(fraction(jnp.maximum(count - 1, 0)), jnp.float32)
        is_due = (count == 0) | (now > before)

    def grown() -> jax.Array:
        old = packing.unpack_mask(packed)

        def one_layer(old: jax.Array, w: jax.Array) -> jax.Array:
            size = jnp.abs(w.astype(jnp.float32))
            # What is frozen ranks first, so that the count is exact.
            scores = jnp.where(old, jnp.inf, jnp.minimum(size, _LARGEST))
            return old | make_mask(scores, sparsity=1.0 - now)

        if stack is None:
            return packing.pack_mask(one_layer(old, w))
        mapped = jax.vmap(one_layer, stack, stack)
        return packing.pack_mask(mapped(old, w))

    return jax.lax.cond(is_due, grown, lambda: packed)


def require_still_scales(inner_state: Any, specs: Any, mode: str) -> None:
    """Raise if weights are frozen on grids that move.

    Args:
        inner_state: of the transformation that steps latents.
        specs: tree of specs, `optax.MaskedNode()` where nothing is quantized.
        mode: how scales follow.

    Raises:
        ValueError: scales follow weights that move, or gradients.
    """
    found = find_states(inner_state, FreezeState)
    if not found or mode == "static":
        return
    masked = [
        path
        for state in found
        for path, mask in paths.leaves_with_path(state.frozen)
        if not is_masked_node(mask)
    ]
    if mode != "current" or masked:
        raise ValueError(
            "scales must be 'static' where jopt.freeze holds some of the weights that "
            f"share one (or 'current' where it holds whole leaves), got {mode!r}; "
            "frozen weights would move with their scale"
        )
