"""One step of weights on the grid: the scales of this step, then where latents land.

`weights` is the transformation around it.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt.arrays.codes import check_scale
from jopt.arrays.rounding import Rounding
from jopt.arrays.scales import Scale, compute_range, compute_scale
from jopt.quantization.grids import Grid, GridProjection
from jopt.quantization.state import QuantizeState
from jopt.trees import paths
from jopt.updates.states import is_masked_node

ScaleMode = Literal["current", "static", "moving", "learned"]


class Method(NamedTuple):
    """What a person has chosen."""

    mode: ScaleMode
    decay: float
    begin_step: int
    bits_schedule: optax.Schedule | None
    rounding: Rounding
    landing: GridProjection
    key: jax.Array | None
    train: optax.GradientTransformationExtraArgs


def is_zero(begin_step: Any) -> bool:
    """Tell what is known at trace time; an injected number is not."""
    return isinstance(begin_step, int) and begin_step == 0


def bits_at(schedule: optax.Schedule | None, count: jax.Array) -> Any:
    """Return the width of a step, None for that of the format."""
    return None if schedule is None else schedule(count)


def _or_hole(x: Any) -> Any:
    return optax.MaskedNode() if x is None else x


def init_state(latent: optax.Params, specs: Any, method: Method) -> QuantizeState:
    """Measure the weights that training begins with.

    Args:
        latent: the weights, `optax.MaskedNode()` where not selected.
        specs: tree of their specs.
        method: what was chosen.

    Returns:
        The first state.
    """
    mode = method.mode
    treedef: Any
    grids, treedef = jax.tree.flatten(specs)
    ranges = [
        compute_range(w, spec)
        for w, spec in zip(jax.tree.leaves(latent), grids, strict=True)
    ]
    scales = [
        compute_scale(low, high, spec)
        for (low, high), spec in zip(ranges, grids, strict=True)
    ]
    holes = treedef.unflatten([optax.MaskedNode()] * len(grids))
    keeps_range = mode in ("static", "moving")
    logs = treedef.unflatten([jnp.log(s.scale.astype(jnp.float32)) for s in scales])
    log_scale = logs if mode == "learned" else holes
    return QuantizeState(
        scale=treedef.unflatten([s.scale for s in scales]),
        zero_point=treedef.unflatten([_or_hole(s.zero_point) for s in scales]),
        outer_scale=treedef.unflatten([_or_hole(s.outer_scale) for s in scales]),
        low=treedef.unflatten([r[0] for r in ranges]) if keeps_range else holes,
        high=treedef.unflatten([r[1] for r in ranges]) if keeps_range else holes,
        log_scale=log_scale,
        # Only where it is used: a second `mu` would hide that of the inner optimizer.
        scale_optimizer_state=method.train.init(logs) if mode == "learned" else (),
        # A copy, because the state may be donated.
        key=_or_hole(None if method.key is None else jnp.copy(method.key)),
        memory=method.landing.init(latent),
    )


def snap(
    latent: optax.Params,
    state: QuantizeState,
    count: jax.Array,
    specs: Any,
    method: Method,
) -> tuple[optax.Params, QuantizeState]:
    """Project the latent on the grid of this step's scales.

    Args:
        latent: after the step of the inner optimizer.
        state: of the step before.
        count: of updates before this one.
        specs: tree of specs.
        method: what was chosen.

    Returns:
        The params and the new state.
    """
    mode = method.mode
    state = _follow(latent, state, count, specs, method)
    bits = bits_at(method.bits_schedule, count)
    treedef: Any
    grids, treedef = jax.tree.flatten(specs)
    ws = jax.tree.leaves(latent)
    if mode == "learned":
        scales = [
            Scale(jnp.exp(x).astype(spec.scale_dtype), None, None)
            for x, spec in zip(jax.tree.leaves(state.log_scale), grids, strict=True)
        ]
    else:
        if mode == "current":
            ranges = [compute_range(w, spec) for w, spec in zip(ws, grids, strict=True)]
        else:
            lows, highs = jax.tree.leaves(state.low), jax.tree.leaves(state.high)
            ranges = list(zip(lows, highs, strict=True))
        scales = [
            compute_scale(low, high, spec, bits=bits)
            for (low, high), spec in zip(ranges, grids, strict=True)
        ]
    keys = [
        None if is_masked_node(state.key) else _key_at(state.key, path, count)
        for path in paths.leaf_paths(latent)
    ]
    found = [
        Grid(spec, check_scale(scale, spec, w.shape, path), bits, method.rounding, key)
        for w, spec, scale, key, path in zip(
            ws, grids, scales, keys, paths.leaf_paths(latent), strict=True
        )
    ]
    snapped, memory = method.landing.update(
        latent, treedef.unflatten(found), state.memory, count
    )
    if not is_zero(method.begin_step):
        is_on = count >= method.begin_step
        memory = jax.tree.map(
            lambda new, old: jnp.where(is_on, new, old), memory, state.memory
        )
    return snapped, state._replace(
        scale=treedef.unflatten([s.scale for s in scales]),
        zero_point=treedef.unflatten([_or_hole(s.zero_point) for s in scales]),
        outer_scale=treedef.unflatten([_or_hole(s.outer_scale) for s in scales]),
        memory=memory,
    )


def _key_at(key: jax.Array, path: str, count: jax.Array) -> jax.Array:
    return jax.random.fold_in(paths.fold_path(key, path), count)


def _follow(
    latent: optax.Params,
    state: QuantizeState,
    count: jax.Array,
    specs: Any,
    method: Method,
) -> QuantizeState:
    """Bring ranges and learned scales up to this step's latent."""
    mode, begin_step, decay = method.mode, method.begin_step, method.decay
    if mode == "current" or (mode != "moving" and is_zero(begin_step)):
        return state
    treedef: Any
    grids, treedef = jax.tree.flatten(specs)
    ws = jax.tree.leaves(latent)

    def measure() -> QuantizeState:
        ranges = [compute_range(w, spec) for w, spec in zip(ws, grids, strict=True)]
        if mode == "learned":
            scales = [
                compute_scale(low, high, spec).scale.astype(jnp.float32)
                for (low, high), spec in zip(ranges, grids, strict=True)
            ]
            return state._replace(
                log_scale=treedef.unflatten([jnp.log(s) for s in scales])
            )
        return state._replace(
            low=treedef.unflatten([r[0] for r in ranges]),
            high=treedef.unflatten([r[1] for r in ranges]),
        )

    if mode == "moving":
        new = measure()
        mix = lambda old, x: decay * old + (1.0 - decay) * x  # noqa: E731
        return state._replace(
            low=jax.tree.map(mix, state.low, new.low),
            high=jax.tree.map(mix, state.high, new.high),
        )
    return jax.lax.cond(count == begin_step, measure, lambda: state)
