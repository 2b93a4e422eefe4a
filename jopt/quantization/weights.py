"""Quantization-aware training of weights: params live on the grid, latents move.

    latent' = latent + inner(g),   params = s * round(latent' / s)

by `jopt.project`: the loss is unchanged, gradients taken at the quantized point move
the latent (straight through), and params *are* the weights that ship. The scales s are

    current   recomputed from the latent on every step, its largest magnitude by group;
    static    computed once, when quantization begins;
    moving    from an exponential moving average of the range;
    learned   LSQ: log s follows its gradient, dq/ds = q/s - w/s inside the range and
              the clipped code outside (Esser et al., arXiv:1902.08153, equation 3).

With static, moving and learned scales a latent may leave the range; its gradient is
then cut to zero, as the derivative of the clipped grid says.

Params land exactly on the grid when scales are bfloat16-valued (the default) and the
format is an integer or float one of at most 8 bits: both params and moves are then
small multiples of one step. Codebooks of arbitrary reals (nf4) and float32 scales may
miss by an ulp. `jopt.quantize(params, spec, scales=jopt.get_scales(state))` yields the
arrays to ship.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jopt.arrays.quantized import fake_quantize
from jopt.arrays.scales import Scale, compute_range, compute_scale
from jopt.quantization.learned import inside_range, learn
from jopt.quantization.specs import SpecOrRules, check_trainable, resolve_specs
from jopt.quantization.state import QuantizeState
from jopt.trees import paths, rules
from jopt.updates.project import (
    Projection,
    ProjectState,
    project,
    require_count,
    require_floats,
    require_params,
    require_transformation,
)
from jopt.updates.states import is_masked_node, merge_masked

ScaleMode = Literal["current", "static", "moving", "learned"]


def quantize_weights(
    inner: optax.GradientTransformation,
    spec_or_rules: SpecOrRules,
    *,
    begin_step: int = 0,
    bits_schedule: optax.Schedule | None = None,
    scales: ScaleMode = "current",
    decay: float = 0.99,
    scale_optimizer: optax.GradientTransformation | None = None,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that params are quantized weights after every update.

    latent' = latent + inner(g),   params = dequantize(quantize(latent'))

    Args:
        inner: any Optax transformation, `jopt.prune` included: zeros stay zeros,
            because every grid with a zero keeps it.
        spec_or_rules: a `jopt.QuantSpec` for all selected leaves, or ordered rules
            `{pattern: spec or None}`, first match wins, None and no match leave alone.
        begin_step: count of the first update that quantizes.
        bits_schedule: count -> bits, overrides the width of integer formats; end it at
            the width of the format.
        scales: "current", "static", "moving" or "learned", see the module.
        decay: of the moving average, in [0, 1).
        scale_optimizer: for learned scales, an Optax transformation on log s;
            `optax.adam(1e-2)` when None.
        select: which leaves may be quantized; None for float leaves with at least two
            axes, stacked ones not counted.
        stacked_axes: which axis stacks layers: an int or rules `{pattern: axis}`; each
            layer keeps scales of its own.

    Returns:
        A transformation with one copy of the selected leaves in its state.

    Raises:
        ValueError: a rule matches nothing, a group size does not divide, learned scales
            are asked of an asymmetric or microscaling format, `bits_schedule` of a
            format that is not an integer, or scales other than "current" are to be
            measured at once on a leaf of zeros (seen unless `init` is traced).

    References:
        Jacob et al., arXiv:1712.05877 (training on the grid); Esser et al., Learned
        Step Size Quantization, arXiv:1902.08153; Bengio et al., arXiv:1308.3432.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.quantize_weights(optax.sgd(0.1), jopt.QuantSpec(jopt.formats.int4))
    >>> params = {"w": jnp.array([[0.7], [-0.33], [0.12]])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.zeros((3, 1))}, state, params)
    >>> optax.apply_updates(params, updates)["w"].ravel()
    Array([ 0.7006836 , -0.30029297,  0.10009766], dtype=float32)
    """
    require_count("begin_step", begin_step)
    inner = require_transformation(inner, "quantize_weights")
    if bits_schedule is not None and not callable(bits_schedule):
        raise TypeError(
            f"bits_schedule must be a schedule count -> bits, got {bits_schedule!r}; a "
            "fixed width is a format, such as jopt.formats.int4"
        )
    if scales not in ("current", "static", "moving", "learned"):
        raise ValueError(
            f"scales must be one of current, static, moving and learned, got {scales!r}"
        )
    if isinstance(decay, int | float) and not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    if scales == "learned" and bits_schedule is not None:
        raise ValueError(
            "bits_schedule must be None for learned scales, which belong to one width, "
            "got a schedule; use moving scales with it"
        )
    train = optax.with_extra_args_support(
        optax.adam(1e-2) if scale_optimizer is None else scale_optimizer
    )

    def bind(params: optax.Params) -> tuple[Any, optax.GradientTransformationExtraArgs]:
        """Resolve the rules for these params: the tree of specs and the projection."""
        specs = resolve_specs(
            spec_or_rules, params, select=select, stacked_axes=stacked_axes
        )
        check_trainable(specs, learned=scales == "learned", bits=bits_schedule)
        chosen = jax.tree.map(
            lambda spec: not is_masked_node(spec), specs, is_leaf=is_masked_node
        )
        projection = Projection(
            init=lambda latent: _init(latent, specs, scales, train),
            update=lambda latent, state, count: _snap(
                latent, state, count, specs, scales, decay, begin_step, bits_schedule
            ),
        )
        return specs, project(inner, projection, begin_step=begin_step, select=chosen)

    def init(params: optax.Params) -> ProjectState:
        require_floats(params, "quantize_weights")
        specs, tx = bind(params)
        treedef: Any = jax.tree.structure(params)
        chosen = [not is_masked_node(s) for s in treedef.flatten_up_to(specs)]
        rules.warn_if_none(chosen, "quantize_weights")
        if scales != "current" and _is_zero(begin_step):
            _require_ranges(params, chosen, scales)
        return tx.init(params)

    def update(
        updates: optax.Updates,
        state: ProjectState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        require_params(params, "quantize_weights")
        specs, tx = bind(params)
        bits = _bits(bits_schedule, jnp.maximum(state.count - 1, 0))
        if scales != "current":
            on = state.count > begin_step  # the entering params are on the grid
            inside = inside_range(updates, state, specs, bits, on)
            if scales == "learned":
                learned = learn(updates, inside, state, specs, on, train, extra_args)
                state = state._replace(projection_state=learned)
            updates = merge_masked(inside, updates, both=lambda gated, _: gated)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_zero(begin_step: Any) -> bool:
    """Tell what is known at trace time; an injected number is not."""
    return isinstance(begin_step, int) and begin_step == 0


def _require_ranges(params: optax.Params, chosen: list[bool], mode: str) -> None:
    """Raise where there is nothing to measure; traced weights pass unseen."""
    leaves = zip(chosen, paths.leaf_paths(params), jax.tree.leaves(params), strict=True)
    for is_chosen, path, leaf in leaves:
        is_known = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if is_chosen and is_known and leaf.size and not bool(jnp.any(leaf != 0)):
            raise ValueError(
                f"scales={mode!r} measures weights at begin_step=0, got {path!r} with "
                'zeros only; begin later, take scales="current", or leave it out by '
                "a rule"
            )


def _bits(schedule: optax.Schedule | None, count: jax.Array) -> Any:
    return None if schedule is None else schedule(count)


def _or_hole(x: Any) -> Any:
    return optax.MaskedNode() if x is None else x


def _init(
    latent: optax.Params, specs: Any, mode: ScaleMode, train: Any
) -> QuantizeState:
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
        scale_optimizer_state=train.init(logs) if mode == "learned" else (),
    )


def _snap(
    latent: optax.Params,
    state: QuantizeState,
    count: jax.Array,
    specs: Any,
    mode: ScaleMode,
    decay: float,
    begin_step: int,
    bits_schedule: optax.Schedule | None,
) -> tuple[optax.Params, QuantizeState]:
    """Project the latent on the grid of this step's scales."""
    state = _follow(latent, state, count, specs, mode, decay, begin_step)
    bits = _bits(bits_schedule, count)
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
    snapped = [
        fake_quantize(w, spec, scale=scale, bits=bits)
        for w, spec, scale in zip(ws, grids, scales, strict=True)
    ]
    return treedef.unflatten(snapped), state._replace(
        scale=treedef.unflatten([s.scale for s in scales]),
        zero_point=treedef.unflatten([_or_hole(s.zero_point) for s in scales]),
        outer_scale=treedef.unflatten([_or_hole(s.outer_scale) for s in scales]),
    )


def _follow(
    latent: optax.Params,
    state: QuantizeState,
    count: jax.Array,
    specs: Any,
    mode: ScaleMode,
    decay: float,
    begin_step: int,
) -> QuantizeState:
    """Bring ranges and learned scales up to this step's latent."""
    if mode == "current" or (mode != "moving" and _is_zero(begin_step)):
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
