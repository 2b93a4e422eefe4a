"""Sparse from the start: training whose masks are fixed, or move as it goes.

All of these begin with a random mask, give the inner optimizer the gradients of kept
weights alone, and differ in how the mask moves every `every_steps` updates:

    static_sparse   not at all
    set_            the smallest |w| are dropped, random ones grow
    rigl            the smallest |w| are dropped, those of largest |gradient| grow
    snfs            as rigl, by a moving average of gradients, and layers compete

A weight that grows starts at zero, with moments that start anew.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import patterns
from jopt.arrays.arguments import check_number
from jopt.pruning import allocation as allocations
from jopt.pruning import masks, regrowth
from jopt.pruning import scores as criteria
from jopt.pruning.arguments import check_allocation, check_steps
from jopt.pruning.leaves import Choice, FixedSparsities, Patterns, make_choice
from jopt.pruning.wrapper import Method, due, masked
from jopt.trees import rules
from jopt.updates.states import is_masked_node


def static_sparse(
    inner: optax.GradientTransformation,
    *,
    sparsity: FixedSparsities = None,
    masks: Any = None,
    scores: criteria.ScoreFunction | criteria.Score | None = None,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.erk,
    stacked_axes: rules.StackedAxes = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that it trains under a mask that never changes.

    update = where(mask, inner(where(mask, g, 0)), -w)

    Args:
        inner: any Optax transformation.
        sparsity: fraction of zeros of the mask drawn by `init`, a number or ordered
            rules `{path: sparsity}`; None for `jopt.NM` and with `masks`.
        masks: the masks, a tree like params of bool or packed leaves, with
            `optax.MaskedNode()` for leaves that are not pruned: of one-shot pruning, of
            `jopt.make_masks`, or of another optimizer's state.
        scores: of the params, for the mask drawn by `init`; at random by default.
        pattern: which weights live and die together, or ordered rules.
        select: which leaves are pruned, as in `jopt.prune`.
        allocation: how many weights each leaf keeps; Erdos-Renyi-Kernel by default.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.
        key: of the random mask; by default made from the bits of the params, so that
            another initialisation gets another mask.

    Returns:
        A transformation; `jopt.get_masks(state)` reads its masks.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: both or none of `sparsity` and `masks` are given, or as `prune`.

    References:
        Mocanu et al., A topological insight into restricted Boltzmann machines,
        arXiv:1604.05978 (fixed Erdos-Renyi masks).

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.static_sparse(optax.adam(1e-3), sparsity=0.75)
    >>> state = tx.init({"w": jnp.ones((4, 8))})
    >>> int(jopt.get_masks(state)["w"].sum())
    8
    """
    if masks is None:
        choice = make_choice(
            sparsity, pattern, select, stacked_axes, fixed_by="static_sparse"
        )
        start = _start(scores, choice, allocation)
    elif sparsity is not None or scores is not None or select is not None:
        raise ValueError(
            "masks must be given alone, got sparsity, scores or select beside them; "
            "leave one of both out"
        )
    else:
        here = jax.tree.map(
            lambda mask: not is_masked_node(mask), masks, is_leaf=is_masked_node
        )
        choice, start = Choice(0.0, patterns.Unstructured(), here, None), masks
    method = Method(
        name="static_sparse",
        choice=choice,
        score=criteria.as_score(criteria.magnitude),
        is_due=lambda count: count < 0,
        renew=None,
        start=start,
        sparse_gradients=True,
    )
    return masked(inner, method, key=key)


def set_(
    inner: optax.GradientTransformation,
    *,
    sparsity: FixedSparsities = None,
    drop_fraction: float | optax.Schedule = 0.3,
    every_steps: int = 100,
    begin_step: int = 0,
    end_step: int | None = None,
    scores: criteria.ScoreFunction | criteria.Score = criteria.magnitude,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.erk,
    stacked_axes: rules.StackedAxes = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` with SET: drop the smallest weights, grow random ones.

    Args:
        inner: any Optax transformation; moments of weights that grow start anew.
        sparsity: fraction of zeros, a number or ordered rules; None for `jopt.NM`.
        drop_fraction: of the kept weights, a number or a schedule of the count.
        every_steps: updates between two moves of the mask, at least 1.
        begin_step: count of the first move.
        end_step: count of the last move, always one itself; None for no end.
        scores: by which weights are dropped, lowest first.
        pattern: which weights live and die together, or ordered rules.
        select: which leaves are pruned, as in `jopt.prune`.
        allocation: how many weights each leaf keeps; Erdos-Renyi-Kernel by default.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.
        key: of the first mask and of growth; by default made from the params.

    Returns:
        A transformation; `jopt.get_masks(state)` reads its masks.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: a number is out of range, or as `jopt.prune`.

    References:
        Mocanu et al., Scalable training of artificial neural networks with adaptive
        sparse connectivity inspired by network science, arXiv:1707.04780.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.set_(optax.adam(1e-3), sparsity=0.75, drop_fraction=0.5)
    >>> params = {"w": jnp.ones((4, 8))}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> int(jopt.get_masks(state)["w"].sum())
    8
    """
    choice = make_choice(sparsity, pattern, select, stacked_axes, fixed_by="set_")
    check_steps(every_steps, begin_step, end_step)
    beat = due(every_steps, begin_step, end_step)
    growth = criteria.random()
    method = _moving("set_", choice, beat, growth, scores, drop_fraction, allocation)
    return masked(inner, method, key=key)


def rigl(
    inner: optax.GradientTransformation,
    *,
    sparsity: FixedSparsities = None,
    drop_fraction: float | optax.Schedule = 0.3,
    every_steps: int = 100,
    begin_step: int = 0,
    end_step: int | None = None,
    scores: criteria.ScoreFunction | criteria.Score = criteria.magnitude,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.erk,
    stacked_axes: rules.StackedAxes = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` with RigL: drop the smallest weights, grow by |gradient|.

    The gradient of all weights is read on the counts at which the mask moves, and only
    then; on all others the compiler may leave it out where the mask is known before. On
    those counts kept weights also take their step (the paper leaves it out: so does
    a step of zeros, which would stop the schedules and the accumulation inside).

    Args:
        inner: any Optax transformation; moments of weights that grow start anew.
        sparsity: fraction of zeros, a number or ordered rules; None for `jopt.NM`.
        drop_fraction: of the kept weights, a number or a schedule of the count, such as
            `jopt.schedules.cosine_drop(0.3, 10_000)`.
        every_steps: updates between two moves of the mask, at least 1.
        begin_step: count of the first move.
        end_step: count of the last move, always one itself; None for no end.
        scores: by which weights are dropped, lowest first.
        pattern: which weights live and die together, or ordered rules. Under N:M what
            grows is in the groups that dropped.
        select: which leaves are pruned, as in `jopt.prune`.
        allocation: how many weights each leaf keeps; Erdos-Renyi-Kernel by default.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.
        key: of the first mask; by default made from the bits of the params.

    Returns:
        A transformation; `jopt.get_masks(state)` reads its masks.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: a number is out of range, or as `jopt.prune`.

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, arXiv:1911.11134.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.rigl(optax.adam(1e-3), sparsity=0.75, drop_fraction=0.5)
    >>> params = {"w": jnp.ones((4, 8))}
    >>> grads = {"w": jnp.arange(32.0).reshape(4, 8)}
    >>> _, state = tx.update(grads, tx.init(params), params)
    >>> jopt.get_masks(state)["w"][3, -4:]  # grown
    Array([ True,  True,  True,  True], dtype=bool)
    """
    choice = make_choice(sparsity, pattern, select, stacked_axes, fixed_by="rigl")
    check_steps(every_steps, begin_step, end_step)
    beat = due(every_steps, begin_step, end_step)
    growth = criteria.as_score(lambda param, grad: jnp.abs(grad))
    method = _moving("rigl", choice, beat, growth, scores, drop_fraction, allocation)
    return masked(inner, method, key=key)


def snfs(
    inner: optax.GradientTransformation,
    *,
    sparsity: FixedSparsities = None,
    drop_fraction: float | optax.Schedule = 0.3,
    decay: float = 0.9,
    redistribute: bool = True,
    every_steps: int = 100,
    begin_step: int = 0,
    end_step: int | None = None,
    scores: criteria.ScoreFunction | criteria.Score = criteria.magnitude,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.uniform,
    stacked_axes: rules.StackedAxes = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` with SNFS (sparse momentum): grow by a moving average of gradients.

    momentum = decay * momentum + (1 - decay) * g;   growth score = |momentum|

    The momentum is of all weights, in float32: the gradient is needed on every step.
    What all layers drop grows in proportion to the mean |momentum| of the weights that
    each keeps, so layers trade density; the number of kept weights stays.

    Args:
        inner: any Optax transformation; moments of weights that grow start anew.
        sparsity: fraction of zeros, a number or ordered rules; None for `jopt.NM`.
        drop_fraction: of the kept weights, a number or a schedule of the count.
        decay: of the momentum, in [0, 1).
        redistribute: whether layers trade density; N:M never does.
        every_steps: updates between two moves of the mask, at least 1.
        begin_step: count of the first move.
        end_step: count of the last move, always one itself; None for no end.
        scores: by which weights are dropped, lowest first.
        pattern: which weights live and die together, or ordered rules.
        select: which leaves are pruned, as in `jopt.prune`.
        allocation: how many weights each leaf keeps at first.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.
        key: of the first mask; by default made from the bits of the params.

    Returns:
        A transformation with 4 bytes of state per weight beside the inner state.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: a number is out of range, or as `jopt.prune`.

    References:
        Dettmers and Zettlemoyer, Sparse Networks from Scratch: Faster Training without
        Losing Performance, arXiv:1907.04840.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.snfs(optax.adam(1e-3), sparsity=0.75, drop_fraction=0.5)
    >>> params = {"w": jnp.ones((4, 8))}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> int(jopt.get_masks(state)["w"].sum())
    8
    """
    check_number("decay", decay, "for example 0.9")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}; for example 0.9")
    choice = make_choice(sparsity, pattern, select, stacked_axes, fixed_by="snfs")
    check_steps(every_steps, begin_step, end_step)
    beat = due(every_steps, begin_step, end_step)

    def average(inputs: criteria.ScoreInputs, momentum: jax.Array) -> jax.Array:
        return decay * momentum + (1 - decay) * inputs.grad.astype(jnp.float32)

    growth = criteria.Score(
        init=lambda param: jnp.zeros_like(param, jnp.float32),
        update=average,
        scores=lambda inputs, momentum: jnp.abs(momentum),
    )
    method = _moving(
        "snfs", choice, beat, growth, scores, drop_fraction, allocation, redistribute
    )
    return masked(inner, method, key=key)


def _start(
    scores: criteria.ScoreFunction | criteria.Score | None,
    choice: Choice,
    allocation: allocations.Allocation,
) -> masks.Recipe:
    check_allocation(allocation)
    first = criteria.random() if scores is None else criteria.as_score(scores)
    return masks.Recipe(first, allocation)


def _moving(
    name: str,
    choice: Choice,
    is_due: Any,
    growth: criteria.Score,
    scores: criteria.ScoreFunction | criteria.Score,
    drop_fraction: float | optax.Schedule,
    allocation: allocations.Allocation,
    redistribute: bool = False,
) -> Method:
    """Describe a wrapper that drops and grows."""
    start = _start(None, choice, allocation)
    if not callable(drop_fraction):
        check_number("drop_fraction", drop_fraction, "0.3 drops 30 %")
    if isinstance(drop_fraction, int | float) and not 0 <= drop_fraction <= 1:
        raise ValueError(
            f"drop_fraction must be in [0, 1], got {drop_fraction}; 0.3 drops 30 % of "
            "the kept weights"
        )
    drop = _without_memory(scores)
    fraction = drop_fraction if callable(drop_fraction) else lambda count: drop_fraction
    return Method(
        name=name,
        choice=choice,
        score=growth,
        is_due=is_due,
        renew=lambda leaves, count: regrowth.regrow(
            leaves, growth, drop, fraction(count), redistribute=redistribute
        ),
        start=start,
        sparse_gradients=True,
    )


def _without_memory(scores: criteria.ScoreFunction | criteria.Score) -> criteria.Score:
    score = criteria.as_score(scores)
    if isinstance(scores, criteria.Score):
        raise TypeError(
            "scores must be a function (param, grad) -> scores without memory where "
            f"weights are dropped and grown, got {score!r}; for example "
            "jopt.scores.magnitude"
        )
    return score
