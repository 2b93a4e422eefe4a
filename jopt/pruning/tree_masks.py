"""Masks of a tree, made once: magnitude in one shot, scores at initialisation.

No optimizer is needed. What comes out goes to `jopt.apply_masks`, and to
`jopt.static_sparse(inner, masks=masks)` to train what is left.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import packing, patterns
from jopt.arrays.arguments import require_count
from jopt.pruning import allocation as allocations
from jopt.pruning import leaves as chosen_leaves
from jopt.pruning import masks
from jopt.pruning import scores as criteria
from jopt.pruning.arguments import check_allocation, check_key_of
from jopt.pruning.leaves import FixedSparsities, Patterns, known_sparsity, make_choice
from jopt.pruning.state import PruneState
from jopt.trees import rules
from jopt.updates.project import require_floats
from jopt.updates.states import is_masked_node


def make_masks(
    params: optax.Params,
    *,
    sparsity: FixedSparsities = None,
    scores: criteria.ScoreFunction | criteria.Score | Any = criteria.magnitude,
    grads: optax.Updates | None = None,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.uniform,
    stacked_axes: rules.StackedAxes = None,
    key: jax.Array | None = None,
) -> Any:
    """Mask the highest scores of a tree, once.

    Args:
        params: any tree of arrays.
        sparsity: fraction of zeros in [0, 1], a number, a traced scalar or ordered
            rules `{path: sparsity}`; None for `jopt.NM`.
        scores: `(param, grad) -> scores` on a leaf, higher = keep, a
            `jopt.scores.Score`, or a tree of scores like params, such as
            `jopt.scores.snip` returns.
        grads: the gradients, for scores that read them.
        pattern: which weights live and die together, or ordered rules.
        select: which leaves are pruned, as in `jopt.prune`.
        allocation: how many weights each leaf keeps.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.
        key: a PRNG key for scores that need one.

    Returns:
        A tree like params of bool leaves, True = keep, and `optax.MaskedNode()` where a
        leaf is not pruned.

    Raises:
        TypeError: params hold quantized arrays.
        ValueError: scores do not fit, or as `jopt.prune`.

    >>> import jax.numpy as jnp, jopt
    >>> jopt.make_masks({"w": jnp.array([[3.0, -1.0, 2.0, 0.5]])}, sparsity=0.5)
    {'w': Array([[ True, False,  True, False]], dtype=bool)}
    """
    require_floats(params, "make_masks")
    choice = make_choice(sparsity, pattern, select, stacked_axes, fixed_by="make_masks")
    check_allocation(allocation)
    score = _as_score(scores, params)
    check_key_of(score, key)
    plans = choice.chosen(params, "make_masks")
    state = PruneState(
        count=jnp.zeros([], jnp.int32),
        masks=chosen_leaves.tree_of(masks.full_mask, params, plans),
        score_state=chosen_leaves.tree_of(score.init, params, plans),
        key=jax.random.key(0) if key is None else key,
        num_nonfinite=jnp.zeros([], jnp.int32),
        inner_state=optax.EmptyState(),
    )
    leaves = chosen_leaves.gather(choice, score, state, params, grads, {})
    leaves = [chosen_leaves.advance(leaf, score) for leaf in leaves]
    recipe = masks.Recipe(score, allocation)
    treedef: Any = jax.tree.structure(state.masks)
    packed = masks.in_one_program(leaves, recipe, state.count)[0] if leaves else []
    return jax.tree.map(packing.unpack_mask, treedef.unflatten(packed))


def iterative_masks(
    score_fn: Callable[[optax.Params], Any],
    params: optax.Params,
    *,
    sparsity: float,
    rounds: int = 100,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.global_ranking,
    stacked_axes: rules.StackedAxes = None,
) -> Any:
    """Prune in rounds, scoring again what is left after each: SynFlow.

    density after round k = (1 - sparsity)^(k / rounds)

    Scoring once at a high sparsity can remove a whole layer; in rounds it does not.
    What a round has pruned stays pruned.

    Args:
        score_fn: params, with zeros where they are pruned -> a tree of scores, higher =
            keep; it is compiled once.
        params: any tree of arrays.
        sparsity: fraction of zeros at the end.
        rounds: their number, at least 1.
        pattern: which weights live and die together, or ordered rules; not N:M.
        select: which leaves are pruned, as in `jopt.prune`.
        allocation: how many weights each leaf keeps; all compete by default.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.

    Returns:
        Masks as those of `jopt.make_masks`.

    Raises:
        ValueError: `sparsity` or `rounds` is out of range, scores of weights that are
            left are not finite, or as `jopt.make_masks`.

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively
        conserving synaptic flow, arXiv:2006.05467.

    >>> import jax, jax.numpy as jnp, jopt
    >>> flow = lambda p: jax.tree.map(lambda w: w**2, p)
    >>> params = {"w": jnp.array([[3.0, -1.0, 2.0, 0.5]])}
    >>> jopt.iterative_masks(flow, params, sparsity=0.5, rounds=2)
    {'w': Array([[ True, False,  True, False]], dtype=bool)}
    """
    require_count("rounds", rounds, least=1)
    if not rules.is_rules(sparsity):
        sparsity = known_sparsity(sparsity, "sparsity", "iterative_masks")
    if not isinstance(sparsity, int | float):
        raise TypeError(
            f"sparsity must be a number for iterative_masks, got {sparsity!r}; 0.9 is "
            "90 % of zeros at the end"
        )
    for each in rules.values(pattern, "pattern"):
        if isinstance(each, patterns.NM):
            raise ValueError(
                f"pattern must not be N:M for iterative_masks, got {each}, whose "
                "sparsity cannot grow in rounds; jopt.make_masks takes it"
            )

    @jax.jit
    def go_on(params: Any, found: Any, sparsity: jax.Array) -> Any:
        pruned = jax.tree.map(_zero_where_pruned, found, params, is_leaf=is_masked_node)
        scores = score_fn(pruned)
        broken = jax.tree.map(_broken, found, scores, is_leaf=is_masked_node)
        scores = jax.tree.map(_last_where_pruned, found, scores, is_leaf=is_masked_node)
        return sum(jax.tree.leaves(broken)), make_masks(
            params,
            sparsity=sparsity,
            scores=scores,
            pattern=pattern,
            select=select,
            allocation=allocation,
            stacked_axes=stacked_axes,
        )

    found = make_masks(
        params,
        sparsity=0.0,
        pattern=pattern,
        select=select,
        stacked_axes=stacked_axes,
    )
    for i in range(1, rounds + 1):
        now = jnp.float32(1 - (1 - sparsity) ** (i / rounds))
        broken, found = go_on(params, found, now)
        if int(broken):
            raise ValueError(
                f"score_fn must return finite scores, got {int(broken)} that are not "
                f"in round {i}; scale what overflows, as jopt.scores.synflow(scale=)"
            )
    return found


def _as_score(scores: Any, params: optax.Params) -> criteria.Score:
    """Lift a tree of scores to a criterion that looks its leaf up."""
    # An Equinox module is callable too; as a tree it is not its own only leaf.
    is_function = callable(scores) and jax.tree_util.all_leaves([scores])
    if isinstance(scores, criteria.Score) or is_function:
        return criteria.as_score(scores)
    treedef: Any = jax.tree.structure(params)
    try:
        treedef.flatten_up_to(scores)
    except ValueError as error:
        raise ValueError(
            f"scores must be a function, a jopt.scores.Score or a tree like params: "
            f"{error}"
        ) from error
    return criteria.Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=lambda inputs, state: inputs.context,
        context=lambda params, inner_state: scores,
    )


def _zero_where_pruned(mask: Any, param: Any) -> Any:
    if is_masked_node(mask):
        return param
    return jnp.where(mask, param, jnp.zeros_like(param))


def _last_where_pruned(mask: Any, score: Any) -> Any:
    """Rank what is pruned below all else."""
    return score if is_masked_node(mask) else jnp.where(mask, score, jnp.nan)


def _broken(mask: Any, score: Any) -> Any:
    """Count the scores of what is left that are not finite."""
    return 0 if is_masked_node(mask) else jnp.sum(mask & ~jnp.isfinite(score))
