"""Proximal training: a penalty holds weights at zero until the zeros become a mask.

With the inner optimizer's step d, from `begin_step` on and up to `end_step`,

    w' = prox(w + d),

proximal gradient descent for plain gradients (Parikh and Boyd, Proximal Algorithms,
2014, section 4.2). Zeros are exact, no latent is kept, and how many there are follows
from the strength of the penalty. At `end_step` they become a mask, and the weights that
are left train without the penalty, which had made them smaller.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import packing, patterns
from jopt.pruning import scores as criteria
from jopt.pruning.arguments import check_steps
from jopt.pruning.leaves import Plan, make_choice
from jopt.pruning.proximal_maps import ProximalMap, group_lasso
from jopt.pruning.scores.score import as_float32, per_layer, takes_two
from jopt.pruning.state import PruneState
from jopt.pruning.wrapper import Method, due, init_state, mask_step, placed_as
from jopt.trees import rules
from jopt.updates.project import (
    require_floats,
    require_params,
    require_state,
    require_transformation,
)
from jopt.updates.states import is_masked_node


def proximal(
    inner: optax.GradientTransformation,
    proximal_map: ProximalMap | Callable[[jax.Array, jax.Array], jax.Array],
    *,
    begin_step: int = 0,
    end_step: int | None = None,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` with a proximal map, and with a mask of its zeros in the end.

    w' = prox(w + inner(g)) for begin_step <= count < end_step
    mask = w != 0 at end_step;   update = where(mask, inner(g), -w) from there on

    Args:
        inner: any Optax transformation. The map is that of the plain distance: with
            adaptive optimizers it is decoupled from their step sizes, as weight decay
            is in AdamW.
        proximal_map: of `jopt.proximal_maps`, or a function `(w, count) -> w'` on one
            layer.
        begin_step: count of the first update that is mapped.
        end_step: count of the first update that is not: the zeros of the params that
            enter it become the mask, groups whole. None for no end; the mask then
            keeps everything.
        select: which leaves are mapped, as in `jopt.prune`.
        stacked_axes: which axis stacks layers, as in `jopt.prune`; the map sees one
            layer.

    Returns:
        A transformation; `jopt.get_masks(state)` reads its mask.

    Raises:
        TypeError: `inner` is no transformation, `proximal_map` no map, or params hold
            quantized arrays.
        ValueError: a count is out of range, or a leaf's shape does not fit the groups.

    References:
        Parikh and Boyd, Proximal Algorithms, 2014, section 4.2.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.proximal(optax.sgd(1.0), jopt.proximal_maps.l1(0.5), end_step=2)
    >>> params = {"w": jnp.array([[4.0, 0.75]])}
    >>> state = tx.init(params)
    >>> for gradient in (0.0, 0.0, -1.0):
    ...     grads = {"w": jnp.full((1, 2), gradient)}
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["w"])
    [[3.5  0.25]]
    [[3. 0.]]
    [[4. 0.]]
    """
    inner = require_transformation(inner, "proximal")
    if not isinstance(proximal_map, ProximalMap):
        if not callable(proximal_map):
            raise TypeError(
                "proximal_map must be a map of jopt.proximal_maps or a function "
                f"(w, count) -> w', got {proximal_map!r}; for example "
                "jopt.proximal_maps.l1(1e-5)"
            )
        # The group lasso takes two arguments too, before it is called.
        given: Any = proximal_map
        if not takes_two(given) or given is group_lasso:
            name = getattr(proximal_map, "__name__", repr(proximal_map))
            raise TypeError(
                f"proximal_map must take (w, count), got {name}, which does not; a map "
                f"with a strength is called first: jopt.proximal_maps.{name}(...)"
            )
        proximal_map = ProximalMap(proximal_map)
    prox, pattern = proximal_map
    check_steps(1, begin_step, end_step)
    choice = make_choice(0.0, pattern, select, stacked_axes)
    method = Method(
        name="proximal",
        choice=choice,
        score=criteria.as_score(criteria.magnitude),
        is_due=due(1, 0, end_step),
        renew=None,
    )

    def init(params: optax.Params) -> PruneState:
        require_floats(params, "proximal")
        plans = choice.chosen(params, "proximal")
        return init_state(method, params, plans, inner.init(params), key=None)

    def map_step(
        packed: jax.Array, step: jax.Array, param: jax.Array, plan: Plan, count: Any
    ) -> jax.Array:
        dtype = jnp.result_type(step, param)
        target = as_float32(param) + as_float32(step)
        target = per_layer(lambda w: prox(w, count), plan.stacked_axis, target)
        is_on = count >= begin_step
        if end_step is not None:
            is_on &= count < end_step
        # A rounded difference could leave a rest: what is zero has to be -w.
        move = jnp.where(target == 0, -param, (target - param).astype(dtype))
        return mask_step(packed, jnp.where(is_on, move, step), param)

    def update(
        updates: optax.Updates,
        state: PruneState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PruneState]:
        require_params(params, "proximal")
        require_state(state, PruneState, "proximal")
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        packed = treedef.flatten_up_to(state.masks)
        plans: list[Any] = choice.plans(params)
        chosen = [i for i, mask in enumerate(packed) if not is_masked_node(mask)]
        if end_step is not None and chosen:
            old = [packed[i] for i in chosen]
            found = jax.lax.cond(
                state.count == end_step,
                lambda: placed_as(
                    old, [_nonzero(leaves[i], plans[i], packed[i]) for i in chosen]
                ),
                lambda: old,
            )
            for i, mask in zip(chosen, found, strict=True):
                packed[i] = mask
        steps, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        moves: list[Any] = treedef.flatten_up_to(steps)
        for i in chosen:
            moves[i] = map_step(packed[i], moves[i], leaves[i], plans[i], state.count)
        return treedef.unflatten(moves), state._replace(
            count=optax.safe_increment(state.count),
            masks=treedef.unflatten(packed),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _nonzero(param: jax.Array, plan: Plan, packed: jax.Array) -> jax.Array:
    """Mask what is not zero; a group is kept whole if any of it is not."""

    def one_layer(w: jax.Array) -> jax.Array:
        share = patterns.pool((w != 0).astype(jnp.float32), plan.pattern)
        return patterns.spread(share > 0, plan.pattern, w.shape)

    mask: jax.Array = per_layer(one_layer, plan.stacked_axis, param)
    return packing.pack_mask(mask) if packed.dtype == jnp.uint8 else mask
