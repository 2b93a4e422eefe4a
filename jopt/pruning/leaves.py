"""Which leaves are pruned, by which rules, and what their scores are made from."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt.arrays import packing, patterns
from jopt.pruning import layers
from jopt.pruning.scores import Score, ScoreInputs
from jopt.trees import paths, rules
from jopt.updates.states import is_masked_node

Sparsity = float | jax.Array | Callable[[Any], Any]
Sparsities = Sparsity | rules.Rules[Sparsity | None] | None
FixedSparsity = float | jax.Array  # where a schedule would stand still
FixedSparsities = FixedSparsity | rules.Rules[FixedSparsity | None] | None
Patterns = patterns.Pattern | rules.Rules[patterns.Pattern | None]


class Plan(NamedTuple):
    """What is chosen once for a leaf that is pruned."""

    path: str
    stacked_axis: int | None
    pattern: patterns.Pattern
    sparsity: Sparsity | None  # None for N:M

    def sparsity_at(self, count: jax.Array) -> Any:
        """Evaluate a schedule; a number stays as it is."""
        return self.sparsity(count) if callable(self.sparsity) else self.sparsity


class Leaf(NamedTuple):
    """What the mask of one leaf is computed from."""

    plan: Plan
    inputs: ScoreInputs
    score_state: Any

    @property
    def is_packed(self) -> bool:
        """How the state stores the mask."""
        return bool(self.inputs.packed_mask.dtype == jnp.uint8)


class Choice(NamedTuple):
    """The arguments that say which leaves are pruned, and how."""

    sparsity: Sparsities
    pattern: Patterns
    select: rules.Select
    stacked_axes: rules.StackedAxes

    def plans(self, params: optax.Params) -> list[Plan | None]:
        """Resolve the rules for every leaf; None is a leaf that is not pruned."""
        leaves = jax.tree.leaves(params)
        stacks = rules.stacked_axis_of(self.stacked_axes, params)
        found_patterns = _resolve(self.pattern, params)
        found_sparsities = _resolve(self.sparsity, params)
        return [
            _plan(leaf, Plan(path, axis, pattern, sparsity))
            for leaf, path, axis, pattern, sparsity in zip(
                leaves,
                paths.leaf_paths(params),
                stacks,
                found_patterns,
                found_sparsities,
                strict=True,
            )
        ]

    def chosen(self, params: optax.Params, name: str) -> list[Plan | None]:
        """Select leaves by `select` and the rules, and check that patterns fit."""
        chosen = rules.select_leaves(
            self.select, params, stacked_axes=self.stacked_axes
        )
        plans = [
            plan if c and np.size(leaf) > 0 else None
            for c, plan, leaf in zip(
                chosen, self.plans(params), jax.tree.leaves(params), strict=True
            )
        ]
        rules.warn_if_none([plan is not None for plan in plans], name)
        for leaf, plan in zip(jax.tree.leaves(params), plans, strict=True):
            if plan is not None:
                shape = layers.layer_shape(leaf.shape, plan.stacked_axis)
                patterns.check_pattern(plan.pattern, shape, path=plan.path)
        return plans


def _resolve(value: Any, params: optax.Params) -> list[Any]:
    if rules.is_rules(value):
        return rules.resolve(value, params)
    return [value] * len(jax.tree.leaves(params))


def _plan(leaf: Any, plan: Plan) -> Plan | None:
    """Leave out what a rule leaves out; N:M has the sparsity of its pattern."""
    if plan.pattern is None:
        return None
    if isinstance(plan.pattern, patterns.NM):
        return plan._replace(sparsity=None)
    return None if plan.sparsity is None else plan


def make_choice(
    sparsity: Sparsities,
    pattern: Patterns,
    select: rules.Select,
    stacked_axes: rules.StackedAxes,
    *,
    fixed_by: str | None = None,
    argument: str = "sparsity",
) -> Choice:
    """Check what is wrong whatever the params, and read known arrays as numbers.

    Args:
        sparsity: as for `prune`; traced scalars pass.
        pattern: as for `prune`.
        select: as for `prune`.
        stacked_axes: as for `prune`.
        fixed_by: the caller, where masks keep their count and a schedule would stand
            still.
        argument: what the sparsity is called there.

    Returns:
        The choice.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: sparsity and pattern do not go together, or a number is out of
            range.
    """
    rules.check_stacked_axes(stacked_axes)
    listed = rules.values(pattern, "pattern")
    for each in listed:
        if each is not None and not isinstance(each, patterns.Pattern):
            patterns.check_pattern(each, ())
    fixed = next((p for p in listed if isinstance(p, patterns.NM)), None)
    others = [p for p in listed if p is not None and not isinstance(p, patterns.NM)]
    if fixed is not None and not others and sparsity is not None:
        raise ValueError(
            f"{argument} must be None for {fixed}, got {sparsity!r}; the pattern fixes "
            f"it at {fixed.m - fixed.n} of {fixed.m}"
        )
    if others and sparsity is None:
        raise ValueError(
            f"{argument} must be given for {others[0]}, got None; a fraction in [0, 1] "
            "or a schedule such as jopt.schedules.cubic_sparsity"
        )
    known = _map_rules(
        lambda each: known_sparsity(each, argument, fixed_by), sparsity, argument
    )
    return Choice(known, pattern, select, stacked_axes)


def _map_rules(fn: Callable[[Any], Any], value: Any, name: str) -> Any:
    """Map the values of rules, or the one value that is for all."""
    found = [fn(each) for each in rules.values(value, name)]
    if isinstance(value, Mapping):
        return dict(zip(value, found, strict=True))
    if not rules.is_rules(value):
        return found[0]
    return [(each, new) for (each, _), new in zip(value, found, strict=True)]


def known_sparsity(value: Any, name: str, fixed_by: str | None) -> Any:
    """Return a number for what is known; None, schedules and traced scalars pass."""
    if callable(value) and fixed_by is not None:
        raise TypeError(
            f"{name} must be a number for {fixed_by}, which fixes how many weights are "
            f"kept from the start, got {value!r}; schedules are for jopt.prune, "
            "jopt.ac_dc, jopt.ste and jopt.top_kast"
        )
    if value is None or callable(value) or isinstance(value, jax.core.Tracer):
        return value
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    dtype = value.dtype if is_array else type(value)
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(
            f"{name} must be a number, a scalar array, a schedule or rules of them, "
            f"got {value!r}; 90 % of zeros is 0.9"
        )
    if np.ndim(value):
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {np.shape(value)}; give "
            "leaves a sparsity of their own by rules {pattern: sparsity}"
        )
    number = float(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(
            f"{name} must be a fraction in [0, 1], got {value}; 90 % of zeros is 0.9"
        )
    return number


def tree_of(fn: Any, params: optax.Params, plans: list[Plan | None]) -> Any:
    """Map the pruned leaves; the others become `optax.MaskedNode()`."""
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [
            optax.MaskedNode() if plan is None else fn(leaf)
            for leaf, plan in zip(leaves, plans, strict=True)
        ]
    )


def gather(
    choice: Choice,
    score: Score,
    state: Any,
    params: optax.Params,
    grads: optax.Updates | None,
    extra_args: Mapping[str, Any],
    *,
    salt: int = 0,
) -> list[Leaf]:
    """Gather what a mask is computed from, for the pruned leaves in order.

    `state` is a `PruneState`; random numbers of one count differ by `salt`.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    packed = treedef.flatten_up_to(state.masks)
    memory = treedef.flatten_up_to(state.score_state)
    empty = [None] * len(leaves)
    gradients = empty if grads is None else treedef.flatten_up_to(grads)
    contexts = empty
    if score.context is not None:
        contexts = treedef.flatten_up_to(score.context(params, state.inner_state))
    # Folding is code for every leaf: only where it is used.
    key = state.key
    if score.random:
        key = jax.random.fold_in(key, state.count)
        key = jax.random.fold_in(key, salt) if salt else key
    found = []
    for i, plan in enumerate(choice.plans(params)):
        if is_masked_node(packed[i]):
            continue
        assert plan is not None
        _check_leaf(leaves[i], gradients[i], packed[i], plan.path, grads is not None)
        inputs = ScoreInputs(
            param=leaves[i],
            grad=gradients[i],
            packed_mask=packed[i],
            count=state.count,
            key=paths.fold_path(key, plan.path) if score.random else key,
            extra_args=extra_args,
            stacked_axis=plan.stacked_axis,
            context=contexts[i],
        )
        found.append(Leaf(plan, inputs, memory[i]))
    return found


def _check_leaf(
    param: jax.Array, grad: Any, mask: jax.Array, path: str, has_grads: bool
) -> None:
    if not packing.is_mask_of(mask, param.shape):
        raise ValueError(
            f"params must have the shapes that init saw, got {param.shape} at {path!r} "
            f"for a mask {mask.dtype}{list(mask.shape)}; make a new state"
        )
    if has_grads and grad is None:
        raise ValueError(
            f"updates must hold a gradient for {path!r}, which is pruned, got None; "
            "leave the leaf out by select="
        )


def advance(leaf: Leaf, score: Score) -> Leaf:
    """Let a score with memory see the step, as it does on every step of training."""
    try:
        memory = score.update(leaf.inputs, leaf.score_state)
    except (TypeError, AttributeError) as error:
        if leaf.inputs.grad is not None:
            raise
        raise ValueError(
            "grads must be given for scores that read them, got None at "
            f"{leaf.plan.path!r}; pass grads= those of the same step"
        ) from error
    return leaf._replace(score_state=memory)
