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

How latents land on the grid is a function: the nearest level, a random neighbour
(`rounding`), or what a `projection` makes of them, gradually (`jopt.projections`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays.arguments import (
    check_function,
    check_key,
    check_strength,
    require_count,
)
from jopt.arrays.rounding import Rounding, nearest, stochastic
from jopt.quantization.freezing import require_still_scales
from jopt.quantization.grids import Grid, Landing, as_grid_projection
from jopt.quantization.learned import inside_range, learn
from jopt.quantization.oscillations import damped
from jopt.quantization.snapping import (
    Method,
    ScaleMode,
    bits_at,
    init_state,
    is_zero,
    snap,
)
from jopt.quantization.specs import (
    SpecOrRules,
    check_trainable,
    require_zeros,
    resolve_specs,
)
from jopt.quantization.state import scale_tree
from jopt.trees import paths, rules
from jopt.updates.project import (
    Projection,
    ProjectState,
    project,
    require_floats,
    require_params,
    require_transformation,
)
from jopt.updates.states import is_masked_node, merge_masked


def quantize_weights(
    inner: optax.GradientTransformation,
    spec_or_rules: SpecOrRules,
    *,
    begin_step: int = 0,
    bits_schedule: optax.Schedule | None = None,
    scales: ScaleMode = "current",
    decay: float = 0.99,
    scale_optimizer: optax.GradientTransformation | None = None,
    rounding: Rounding | None = None,
    projection: Landing | None = None,
    damping: float | optax.Schedule | None = None,
    key: jax.Array | None = None,
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
        rounding: None for the nearest level, `jopt.rounding.stochastic` (params are
            then the latents on average, and drawn anew on every update) or a function
            like it.
        projection: of `jopt.projections`, or a function `(latent, grid, count) ->
            params` of one leaf, `grid.snap(latent)` being the rounded one; None for
            that.
        damping: of oscillations: the strength of `|q - latent|^2` in the loss, q being
            held constant; a number or a schedule count -> number (Nagel et al.,
            arXiv:2203.11086, equation 6).
        key: a PRNG key for rounding that needs one; kept in the state, folded with the
            path of the leaf and the count.
        select: which leaves may be quantized; None for float leaves with at least two
            axes, stacked ones not counted.
        stacked_axes: which axis stacks layers: an int or rules `{pattern: axis}`; each
            layer keeps scales of its own.

    Returns:
        A transformation with one copy of the selected leaves in its state.

    Raises:
        TypeError: an argument is of a wrong type, or params hold quantized arrays.
        ValueError: a number is out of range, a rule matches nothing, a group size does
            not divide, learned scales are asked of an asymmetric or microscaling
            format, `bits_schedule` of a format that is not an integer, learned scales
            beside rounding or a projection that leave the nearest level, stochastic
            rounding without a key, a format without a zero of a leaf that is pruned
            inside, scales other than "static" of weights that are frozen, or scales
            other than "current" are to be measured at once on a leaf of zeros (seen
            unless `init` is traced).

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
    rounding = nearest if rounding is None else rounding
    check_function(
        "rounding", rounding, "(x, key) -> whole", "for example jopt.rounding.nearest"
    )
    if scales == "learned" and rounding is not nearest:
        raise ValueError(
            "rounding must be None for learned scales, whose gradient "
            f"is that of the nearest level, got {rounding!r}; use moving scales with it"
        )
    check_key(key)
    if rounding is stochastic and key is None:
        raise ValueError(
            "key must be a PRNG key for stochastic rounding, got None: pass "
            "key=jax.random.key(seed)"
        )
    landing = as_grid_projection(projection)
    if scales == "learned" and not landing.is_hard:
        raise ValueError(
            "projection must land on the nearest level for learned scales, got "
            f"{projection!r}; use moving scales with it"
        )
    train = require_transformation(
        optax.adam(1e-2) if scale_optimizer is None else scale_optimizer,
        "quantize_weights",
        argument="scale_optimizer",
    )
    if damping is not None and not callable(damping):
        check_strength("damping", damping, "for example 1e-3, or a schedule")
    method = Method(
        scales, decay, begin_step, bits_schedule, rounding, landing, key, train
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
        step = Projection(
            init=lambda latent: init_state(latent, specs, method),
            update=lambda latent, state, count: snap(
                latent, state, count, specs, method
            ),
        )
        return specs, project(inner, step, begin_step=begin_step, select=chosen)

    def init(params: optax.Params) -> ProjectState:
        require_floats(params, "quantize_weights")
        specs, tx = bind(params)
        treedef: Any = jax.tree.structure(params)
        chosen = [not is_masked_node(s) for s in treedef.flatten_up_to(specs)]
        rules.warn_if_none(chosen, "quantize_weights")
        if scales != "current" and is_zero(begin_step):
            _require_ranges(params, chosen, scales)
        state: ProjectState = tx.init(params)
        require_still_scales(state.inner_state, specs, scales)
        require_zeros(state.inner_state, specs)
        return state

    def update(
        updates: optax.Updates,
        state: ProjectState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        require_params(params, "quantize_weights")
        specs, tx = bind(params)
        bits = bits_at(bits_schedule, jnp.maximum(state.count - 1, 0))
        if scales != "current":
            on = state.count > begin_step  # the entering params are on the grid
            is_learning = scales == "learned"
            inside = inside_range(
                updates, state, specs, bits, on, is_learning=is_learning
            )
            if is_learning:
                learned = learn(updates, inside, state, specs, on, train, extra_args)
                state = state._replace(projection_state=learned)
            updates = merge_masked(inside, updates, both=lambda gated, _: gated)
        if damping is not None:
            strength = damping(state.count) if callable(damping) else damping
            strength = jnp.where(state.count > begin_step, strength, 0.0)
            grids = jax.tree.map(
                lambda spec, scale: (
                    spec if is_masked_node(spec) else Grid(spec, scale, bits)
                ),
                specs,
                scale_tree(state.projection_state),
                is_leaf=is_masked_node,
            )
            updates = damped(updates, state.latent, grids, strength)
        moves, new = tx.update(updates, state, params, **extra_args)
        if landing.frozen is not None:
            held = landing.frozen(new.projection_state.memory)
            landed = optax.apply_updates(params, moves)
            new = new._replace(latent=_held(held, landed, new.latent))
        return moves, new

    return optax.GradientTransformationExtraArgs(init, update)


def _require_ranges(params: optax.Params, chosen: list[bool], mode: str) -> None:
    """Raise where there is nothing to measure; traced weights pass unseen."""
    leaves = zip(chosen, paths.leaf_paths(params), jax.tree.leaves(params), strict=True)
    for is_chosen, path, leaf in leaves:
        is_known = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if not (is_chosen and is_known and leaf.size):
            continue
        with jax.ensure_compile_time_eval():  # known, though what is around is traced
            has_range = bool(jnp.any(leaf != 0))
        if not has_range:
            raise ValueError(
                f"scales={mode!r} measures weights at begin_step=0, got {path!r} with "
                'zeros only; begin later, take scales="current", or leave it out by '
                "a rule"
            )


def _held(held: Any, landed: Any, latent: Any) -> Any:
    """Put latents that are frozen where their params are."""

    def hold(flag: Any, p: jax.Array, w: Any) -> Any:
        return w if is_masked_node(w) else jnp.where(flag, p, w)

    return jax.tree.map(hold, held, landed, latent, is_leaf=is_masked_node)
