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
    if is_rules(value):
        return rules.resolve(value, params)
    return [value] * len(jax.tree.leaves(params))


def is_rules(value: Any) -> bool:
    """Tell ordered rules from a single value."""
    return isinstance(value, Mapping | list | tuple)


def _plan(leaf: Any, plan: Plan) -> Plan | None:
    """Leave out what a rule leaves out; N:M has the sparsity of its pattern."""
    if plan.pattern is None:
        return None
    if isinstance(plan.pattern, patterns.NM):
        return plan._replace(sparsity=None)
    return None if plan.sparsity is None else plan


def check_choice(choice: Choice) -> None:
    """Raise for rules that are wrong whatever the params; traced numbers pass."""
    listed = _values(choice.pattern)
    for pattern in listed:
        if pattern is not None and not isinstance(pattern, patterns.Pattern):
            patterns.check_pattern(pattern, ())
    only_nm = bool(listed) and all(isinstance(p, patterns.NM | None) for p in listed)
    if only_nm and choice.sparsity is not None:
        pattern = next(p for p in listed if p is not None)
        raise ValueError(
            f"sparsity must be None for {pattern}, got {choice.sparsity!r}; the "
            f"pattern fixes it at {pattern.m - pattern.n} of {pattern.m}"
        )
    if not only_nm and choice.sparsity is None:
        pattern = next((p for p in listed if not isinstance(p, patterns.NM)), None)
        raise ValueError(
            f"sparsity must be given for {pattern}, got None; a fraction in [0, 1] or "
            "a schedule such as jopt.schedules.cubic_sparsity"
        )
    for sparsity in _values(choice.sparsity):
        if isinstance(sparsity, int | float) and not 0.0 <= sparsity <= 1.0:
            raise ValueError(
                f"sparsity must be a fraction in [0, 1], got {sparsity}; "
                "90 % of zeros is 0.9"
            )


def _values(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if is_rules(value):
        return [each for _, each in value]
    return [value]


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
