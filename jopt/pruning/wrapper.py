"""What every optimizer wrapper with masks does: renew them when due, keep zeros.

With the inner optimizer's step d and the mask m (True = keep),

    update = d where m, -w elsewhere,

so `optax.apply_updates` leaves exact zeros and no latent copy is needed. A `Method` is
what distinguishes pruning from training that is sparse from the start: where masks come
from, when, and whether the inner optimizer sees the gradients of weights that are zero.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt.arrays import packing
from jopt.arrays.arguments import check_key
from jopt.pruning import host, masks
from jopt.pruning import leaves as chosen_leaves
from jopt.pruning.leaves import Choice, Leaf
from jopt.pruning.scores import Score
from jopt.pruning.state import PruneState
from jopt.trees import paths
from jopt.updates import resets
from jopt.updates.project import (
    require_floats,
    require_params,
    require_state,
    require_transformation,
)
from jopt.updates.states import is_masked_node

Masks = tuple[list[jax.Array], jax.Array]  # packed, and how many scores were not finite


class Method(NamedTuple):
    """What distinguishes one wrapper with masks from another.

    Attributes:
        name: of the wrapper, for errors.
        choice: which leaves, and how.
        score: what keeps memory for the masks.
        is_due: count -> whether masks are renewed.
        renew: leaves, count -> new masks; None where masks stay what they are.
        start: how the first masks are made, of the params alone, or the masks; None
            where they keep everything.
        sparse_gradients: whether the inner optimizer sees gradients, and keeps moments,
            only of weights that are kept. Moments of weights that come back start anew.
    """

    name: str
    choice: Choice
    score: Score
    is_due: Callable[[jax.Array], jax.Array]
    renew: Callable[[list[Leaf], jax.Array], Masks] | None
    start: Any = None  # masks.Recipe | tree of masks | None
    sparse_gradients: bool = False


def due(
    every_steps: int, begin_step: int, end_step: int | None
) -> Callable[[Any], Any]:
    """Tell when masks are renewed: on the beat from `begin_step`, and at `end_step`."""

    def is_due(count: jax.Array) -> jax.Array:
        since = count - begin_step
        on_beat = (since >= 0) & (since % every_steps == 0)
        if end_step is None:
            return on_beat
        return (on_beat & (count <= end_step)) | (count == end_step)

    return is_due


def masked(
    inner: optax.GradientTransformation, method: Method, *, key: jax.Array | None
) -> optax.GradientTransformationExtraArgs:
    """Build the wrapper that a method describes.

    Args:
        inner: any Optax transformation.
        method: what to do with the masks.
        key: of random scores; None makes one from the bits of the params, so that
            another initialisation gets other masks.

    Returns:
        A transformation with a `PruneState`.
    """
    inner = require_transformation(inner, method.name)
    check_key(key)

    def init(params: optax.Params) -> PruneState:
        require_floats(params, method.name)
        plans = method.choice.chosen(params, method.name)
        return init_state(method, params, plans, inner.init(params), key=key)

    def update(
        updates: optax.Updates,
        state: PruneState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PruneState]:
        require_params(params, method.name)
        require_state(state, PruneState, method.name)
        new = renewed(method, state, params, updates, extra_args)
        inner_state = state.inner_state
        if method.sparse_gradients:
            updates = map_masked(keep_where, new.masks, updates)
            if method.renew is not None:
                grown = _grown(state.masks, new.masks, params)
                inner_state = resets.reset_where(inner, inner_state, params, grown)
        steps, inner_state = inner.update(updates, inner_state, params, **extra_args)
        new_updates = map_masked(mask_step, new.masks, steps, params)
        return new_updates, new._replace(
            count=optax.safe_increment(state.count), inner_state=inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def init_state(
    method: Method,
    params: optax.Params,
    plans: list[Any],
    inner_state: optax.OptState,
    *,
    key: jax.Array | None,
) -> PruneState:
    """Make the first state."""
    score = method.score
    first_key = jax.random.key(0) if key is None else jnp.copy(key)
    starts_random = isinstance(method.start, masks.Recipe) and method.start.score.random
    if key is None and (score.random or starts_random):
        first_key = _key_from(params, plans)
    state = PruneState(
        count=jnp.zeros([], jnp.int32),
        masks=chosen_leaves.tree_of(masks.full_mask, params, plans),
        score_state=chosen_leaves.tree_of(score.init, params, plans),
        key=first_key,  # a copy, because the state may be donated
        num_nonfinite=jnp.zeros([], jnp.int32),
        inner_state=inner_state,
    )
    if method.start is None:
        return state
    return state._replace(masks=_first_masks(method, state, params, plans))


def renewed(
    method: Method,
    state: PruneState,
    params: optax.Params,
    grads: optax.Updates,
    extra_args: Mapping[str, Any],
) -> PruneState:
    """Advance the memory of the score, and the masks if that is due."""
    treedef: Any
    packed, treedef = jax.tree.flatten(state.masks)
    leaves = chosen_leaves.gather(
        method.choice, method.score, state, params, grads, extra_args
    )
    leaves = [
        leaf._replace(score_state=method.score.update(leaf.inputs, leaf.score_state))
        for leaf in leaves
    ]
    num_nonfinite, renew = state.num_nonfinite, method.renew
    if renew is not None and packed:
        packed, num_nonfinite = jax.lax.cond(
            method.is_due(state.count),
            lambda: placed_as((packed, num_nonfinite), renew(leaves, state.count)),
            lambda: (packed, num_nonfinite),
        )
    return state._replace(
        masks=treedef.unflatten(packed),
        score_state=treedef.unflatten([leaf.score_state for leaf in leaves]),
        num_nonfinite=num_nonfinite,
    )


_START = 1  # salt: the first masks are drawn apart from those of the first update


def _first_masks(
    method: Method, state: PruneState, params: optax.Params, plans: list[Any]
) -> Any:
    """Draw the first masks, or take those that were given."""
    treedef: Any
    old, treedef = jax.tree.flatten(state.masks)
    if not old:
        return state.masks
    if not isinstance(method.start, masks.Recipe):
        return paths.map_with_path(_given_mask, params, state.masks, method.start)
    recipe: masks.Recipe = method.start
    memory = chosen_leaves.tree_of(recipe.score.init, params, plans)
    leaves = chosen_leaves.gather(
        method.choice,
        recipe.score,
        state._replace(score_state=memory),
        params,
        jax.tree.map(jnp.zeros_like, params),
        {},
        salt=_START,
    )
    packed, _ = masks.in_one_program(leaves, recipe, state.count)
    return treedef.unflatten(placed_as(old, packed))


def _given_mask(path: str, param: Any, full: Any, mask: Any) -> Any:
    if is_masked_node(full):
        return full
    packing.require_mask_of(mask, param.shape, path)
    mask, is_packed = packing.unpack_mask(mask), full.dtype == jnp.uint8
    return placed_as(full, packing.pack_mask(mask) if is_packed else mask)


def refresh(
    method: Method,
    recipe: masks.Recipe,
    state: PruneState,
    params: optax.Params,
    grads: optax.Updates | None,
    extra_args: Mapping[str, Any],
) -> PruneState:
    """Renew masks between two steps, outside of jit."""
    treedef: Any
    old, treedef = jax.tree.flatten(state.masks)
    leaves = chosen_leaves.gather(
        method.choice, method.score, state, params, grads, extra_args
    )
    # The step that follows sees the same gradients, and keeps the memory of them.
    leaves = [chosen_leaves.advance(leaf, method.score) for leaf in leaves]
    packed, num_nonfinite = host.leaf_by_leaf(leaves, recipe, state.count)
    # Where the old masks lie: the training step is compiled for that.
    placed = placed_as(old, packed)
    return state._replace(masks=treedef.unflatten(placed), num_nonfinite=num_nonfinite)


def placed_as(old: Any, new: Any) -> Any:
    """Put new masks where the old ones lie, as far as that is known.

    Outside of jit it is; inside, an explicit mesh says it.
    """

    def place(a: jax.Array, b: jax.Array) -> jax.Array:
        if not any(isinstance(x, jax.core.Tracer) for x in (a, b)):
            return b if b.sharding == a.sharding else jax.device_put(b, a.sharding)
        sharding = jax.typeof(a).sharding
        fits = sharding.mesh.empty or sharding == jax.typeof(b).sharding
        if fits:
            return b
        return jax.sharding.reshard(b, sharding)  # type: ignore[no-untyped-call]

    return jax.tree.map(place, old, new)


def map_masked(fn: Callable[..., Any], packed: Any, tree: Any, *rest: Any) -> Any:
    """Map the leaves that have a mask; the others stay."""

    def map_leaf(packed: Any, leaf: Any, *others: Any) -> Any:
        return leaf if is_masked_node(packed) else fn(packed, leaf, *others)

    return jax.tree.map(map_leaf, packed, tree, *rest, is_leaf=is_masked_node)


def mask_step(packed: jax.Array, step: jax.Array, param: jax.Array) -> jax.Array:
    """Step what is kept, and take everything else to zero."""
    # In the wider of both dtypes: a rounded -param would leave a rest behind.
    return jnp.where(packing.unpack_mask(packed), step, -param)


def keep_where(packed: jax.Array, values: jax.Array) -> jax.Array:
    """Put zeros where the mask is False."""
    return jnp.where(packing.unpack_mask(packed), values, jnp.zeros_like(values))


def _grown(old: Any, new: Any, params: optax.Params) -> Any:
    """Say of every weight whether it comes back; of leaves without masks, False."""

    def grown(a: Any, b: Any, param: Any) -> Any:
        del param
        return False if is_masked_node(a) else packing.unpack_mask(b & ~a)

    return jax.tree.map(grown, old, new, params, is_leaf=is_masked_node)


def _key_from(params: optax.Params, plans: list[Any]) -> jax.Array:
    """Make a key from the bits of the params: a sum, so sharded leaves stay put."""
    total = jnp.zeros([], jnp.uint32)
    for leaf, plan in zip(jax.tree.leaves(params), plans, strict=True):
        if plan is not None:
            bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
            mixed = (bits ^ (bits >> 15)) * np.uint32(0x2C1B3C6D)
            total += jnp.sum(mixed ^ (mixed >> 12), dtype=jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), total)
