"""Keep params on a set while the inner optimizer steps latent values.

With a projection P and an inner optimizer that turns gradients g into steps d,

    latent' = latent + d(g, latent),    update = P(latent') - params,

so that `optax.apply_updates(params, update)` is `P(latent')`, and `g`, taken at the
projected point, moves the latent as if P had the gradient of the identity (straight
through; Bengio et al., arXiv:1308.3432). Quantization-aware training, straight-through
masks, sign constraints and low rank are projections; nothing in the loss changes, and
what is evaluated is what is deployed.

How exactly params land: `p + (t - p)` in floating point equals t whenever both lie on a
common grid that the dtype resolves, such as small integers times a bfloat16-valued
scale. From off-grid params, or in bfloat16, it may miss by an ulp of p, once: the next
update starts from the latent and not from p.

A projecting wrapper must be the *last* link of a chain: what follows it may skip or
delay a whole update, but not scale or clip it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt.arrays.arguments import require_count
from jopt.arrays.compressed import CompressedArray
from jopt.trees import paths, rules


class Projection(NamedTuple):
    """A projection with memory, such as a moving scale.

    `init(params) -> state`; `update(latent, state, count) -> (params, state)`, where
    `count` is the number of updates before this one. Trees hold `optax.MaskedNode()`
    where a leaf is not selected.
    """

    init: Callable[[optax.Params], Any]
    update: Callable[[optax.Params, Any, jax.Array], tuple[optax.Params, Any]]


class ProjectState(NamedTuple):
    """State of `project`."""

    # NamedTuple has a method of this name, but Optax and its tools expect the field.
    count: jax.Array  # type: ignore[assignment]  # shape=(), int32: updates so far
    latent: optax.Params  # as params where selected, else optax.MaskedNode()
    projection_state: Any  # of the projection
    inner_state: optax.OptState


def select_tree(chosen: list[bool], tree: Any, treedef: Any) -> Any:
    """Return `tree` with `optax.MaskedNode()` where `chosen` is False."""
    leaves = treedef.flatten_up_to(tree)
    return treedef.unflatten(
        [x if c else optax.MaskedNode() for c, x in zip(chosen, leaves, strict=True)]
    )


def require_params(params: optax.Params | None, name: str) -> None:
    """Raise if `params` is missing from `update`."""
    if params is None:
        raise ValueError(
            f"{name} needs params, got None; call tx.update(updates, state, params)"
        )


def require_state(state: Any, kind: type[Any], name: str) -> None:
    """Raise if `update` gets a state that is not what `init` makes."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be what init of {name} or its last update returned, a "
            f"{kind.__name__}, got a {type(state).__name__}; a state belongs to one "
            "transformation"
        )


def require_transformation(
    inner: Any, name: str, *, argument: str = "inner"
) -> optax.GradientTransformationExtraArgs:
    """Return `inner` as one that takes extra args, or raise if it is none."""
    # By its methods: optax.MultiSteps is a class of its own.
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        call = "optax.adamw(1e-3), ..."
        call = call if argument == "inner" else f"..., {argument}=optax.adam(1e-2)"
        raise TypeError(
            f"{argument} must be an Optax transformation, got {inner!r}; for example "
            f"jopt.{name}({call})"
        )
    return optax.with_extra_args_support(inner)


def require_floats(params: optax.Params, name: str) -> None:
    """Raise if params hold compressed arrays, whose codes no optimizer can step."""
    for path, leaf in paths.leaves_with_path(params):
        if isinstance(leaf, CompressedArray):
            kind = type(leaf).__name__
            raise TypeError(
                f"{name} needs arrays as params, got a {kind} at {path!r}; "
                "train what jopt.dequantize makes of it, or keep it out of the params"
            )


def _memoryless(projection: Callable[[optax.Params], optax.Params]) -> Projection:
    return Projection(
        init=lambda params: optax.EmptyState(),
        update=lambda latent, state, count: (projection(latent), state),
    )


def _every_float_leaf(path: str, leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def project(
    inner: optax.GradientTransformation,
    projection: Callable[[optax.Params], optax.Params] | Projection,
    *,
    begin_step: int = 0,
    select: rules.Select = None,
) -> optax.GradientTransformationExtraArgs:
    """Keep params on `projection(latent)` while `inner` steps the latent.

    latent' = latent + inner(g),   update = projection(latent') - params

    Args:
        inner: any Optax transformation; it sees the latent as its params.
        projection: latent tree -> params tree of the same structure, shapes and dtypes;
            or a `Projection` where it needs memory. It must map a projected point to
            itself.
        begin_step: count of the first update that projects; before it the updates of
            `inner` pass unchanged.
        select: which leaves are projected: a predicate `(path, leaf) -> bool`, a bool
            tree or `jopt.matching(...)`; all float leaves when None. The others take
            the steps of `inner` as they are and cost no latent copy.

    Returns:
        A transformation with one full-size copy of the selected leaves in its state.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: `begin_step` is negative, a selection matches nothing, or, at
            update, params are not passed.

    References:
        Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons,
        arXiv:1308.3432 (straight through).

    >>> import jax, jax.numpy as jnp, optax, jopt
    >>> tx = jopt.project(
    ...     optax.sgd(0.25), lambda latent: jax.tree.map(jnp.sign, latent)
    ... )
    >>> params = {"w": jnp.array([1.0, -1.0])}
    >>> state = tx.init(params)
    >>> for _ in range(5):
    ...     updates, state = tx.update({"w": jnp.array([1.0, 1.0])}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"], state.latent["w"]
    (Array([-1., -1.], dtype=float32), Array([-0.25, -2.25], dtype=float32))
    """
    require_count("begin_step", begin_step)
    inner = require_transformation(inner, "project")
    step = projection if isinstance(projection, Projection) else _memoryless(projection)
    select = _every_float_leaf if select is None else select

    def init(params: optax.Params) -> ProjectState:
        require_floats(params, "project")
        treedef: Any = jax.tree.structure(params)
        chosen = rules.select_leaves(select, params)
        # A copy, because params may be donated beside the state.
        latent = jax.tree.map(jnp.copy, select_tree(chosen, params, treedef))
        return ProjectState(
            jnp.zeros([], jnp.int32), latent, step.init(latent), inner.init(params)
        )

    def update(
        updates: optax.Updates,
        state: ProjectState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        require_params(params, "project")
        require_state(state, ProjectState, "project")
        treedef: Any
        p, treedef = jax.tree.flatten(params)
        latent = treedef.flatten_up_to(state.latent)
        chosen = [not isinstance(x, optax.MaskedNode) for x in latent]
        seen = [x if c else q for c, x, q in zip(chosen, latent, p, strict=True)]
        steps, inner_state = inner.update(
            updates, state.inner_state, treedef.unflatten(seen), **extra_args
        )
        d = treedef.flatten_up_to(steps)
        moved = optax.apply_updates(state.latent, select_tree(chosen, steps, treedef))
        target, projection_state = step.update(
            moved, state.projection_state, state.count
        )
        t = treedef.flatten_up_to(target)
        new = [
            land(x, q, u, state.count, begin_step) if c else u
            for c, x, q, u in zip(chosen, t, p, d, strict=True)
        ]
        count = optax.safe_increment(state.count)
        return treedef.unflatten(new), ProjectState(
            count, moved, projection_state, inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def land(
    target: jax.Array,
    param: jax.Array,
    step: jax.Array,
    count: jax.Array,
    begin_step: int,
) -> jax.Array:
    """Return the move from `param` to `target`, or `step` before `begin_step`."""
    move = (target - param).astype(param.dtype)
    if isinstance(begin_step, int) and begin_step <= 0:
        return move
    return jnp.where(count < begin_step, step.astype(move.dtype), move)
