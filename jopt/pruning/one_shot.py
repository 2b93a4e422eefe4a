"""One-shot pruning with calibration data: SparseGPT and Wanda on any function.

For each matrix that multiplies, y = x w with w [columns, outputs], the inputs that it
meets in a few batches say what its weights are worth. Wanda keeps, per output, the
largest |w_ij| ||x_i||; SparseGPT removes w_ij with the least w_ij^2 / [H^-1]_ii, where
H = X^T X, and lets the weights after it make up for the loss:

    sparse_params, masks, report = sparsegpt(apply, params, batches, sparsity=0.5)

Earlier layers are pruned first, and later ones see what that does to their inputs
(`error_propagation`). Frantar and Alistarh, SparseGPT, arXiv:2301.00774; Sun et al., A
Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jopt.arrays.arguments import check_flags
from jopt.arrays.patterns import Pattern, Unstructured
from jopt.programs.batches import begin, require_targets
from jopt.programs.targets import find_targets
from jopt.pruning.allocation import Allocation
from jopt.pruning.arguments import check_allocation
from jopt.pruning.goals import check_groups, resolve_goals
from jopt.pruning.in_order import prune_layers
from jopt.pruning.one_shot_report import OneShotReport
from jopt.pruning.solving import Method, check
from jopt.pruning.sparsegpt import check_options, prepare, prune_prepared
from jopt.pruning.wanda import prune_given_squares
from jopt.trees import rules

_UNSTRUCTURED = Unstructured()

SparsityOrRules = float | rules.Rules[float | None] | None
PatternOrRules = Pattern | rules.Rules[Pattern | None]


def sparsegpt(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    sparsity: SparsityOrRules = None,
    pattern: PatternOrRules = _UNSTRUCTURED,
    select: rules.Select = None,
    error_propagation: bool = True,
    allocation: Allocation | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, Any, OneShotReport]:
    """Prune by SparseGPT: what stays makes up for what goes.

    Per matrix, with H = X^T X + damping mean(diag(X^T X)) I over all rows X that meet
    it, columns are treated in blocks of `block_size`; in each block the weights of
    least w_ij^2 / [H^-1]_ii go, and the error moves to the columns after them.

    What it costs: with `error_propagation`, one forward pass over all batches for each
    layer of each group of sites with one input (query, key and value share theirs), and
    one Gram matrix per size of input at a time. Without it, one pass, and all Gram
    matrices, float32 `[columns, columns]` per layer, at once. An allocation takes a
    pass more.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of arrays.
        batches: of inputs; each item is the tuple of inputs after `params`, and a bare
            array or dict counts as one input. Passed over more than once: an iterator
            is read into a list, any other iterable must give the same batches again.
        sparsity: the fraction of zeros in each matrix, or rules `{path pattern:
            fraction or None}`, the first match deciding; None for N:M.
        pattern: `jopt.Unstructured()` or `jopt.NM(n, m)`, whose groups run along the
            inputs of each site, in the order of the leaf's axes; or rules of them.
        select: which leaves: a predicate `(path, leaf) -> bool` such as
            `jopt.matching(...)`, a tree of bools, or None for float leaves that only
            multiply, of two axes or more not counting stacked layers.
        error_propagation: whether a layer sees the inputs that the pruned layers before
            it give, instead of those of the dense model.
        allocation: one of `jopt.allocation`, to give each layer a sparsity of its own
            with `sparsity` over all of them. It sees Wanda's scores of the dense model.
        block_size: columns whose mask is chosen together.
        damping: part of the mean of the diagonal that is added to it.
        errors: whether the report says what each layer loses.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(sparse_params, masks, report)`. The params are as they were but for exact
        zeros and the weights that make up for them; `masks` has bool leaves, True =
        keep, where something was pruned and `optax.MaskedNode()` elsewhere, as
        `jopt.apply_masks` takes them; the report has a row per layer with the relative
        error ||X W - X W'||^2 / ||X W||^2, and lists what was left alone and why.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: sparsity and pattern do not go together, there is no batch or
            nothing to prune, inputs do not divide into groups of m, a leaf is
            compressed, or the inputs of a site are not finite.

    References:
        Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately
        Pruned in One-Shot, arXiv:2301.00774.

    >>> import jax.numpy as jnp
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[1.0], [0.1], [2.0], [0.3]])}
    >>> x = jnp.eye(4).at[0, 1].set(1.0)
    >>> sparse, masks, _ = sparsegpt(apply, params, [x], sparsity=0.5)
    >>> masks["w"][:, 0]
    Array([ True, False,  True, False], dtype=bool)
    """
    check_options(block_size, damping)
    options = (("block_size", block_size), ("damping", damping))
    method = Method("sparsegpt", prune_prepared, "gram", prepare, options)
    return _one_shot(
        method,
        apply,
        params,
        batches,
        sparsity=sparsity,
        pattern=pattern,
        select=select,
        error_propagation=error_propagation,
        allocation=allocation,
        errors=errors,
        progress=progress,
    )


def wanda(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    sparsity: SparsityOrRules = None,
    pattern: PatternOrRules = _UNSTRUCTURED,
    select: rules.Select = None,
    error_propagation: bool = True,
    allocation: Allocation | None = None,
    errors: bool = True,
    progress: bool = True,
) -> tuple[Any, Any, OneShotReport]:
    """Prune by weights and activations: keep the largest |w_ij| ||x_i|| per output.

    x_i are all values of input i that meet the matrix; the weights that stay do not
    change. Arguments, results and errors are those of `sparsegpt`.

    What it costs: with `error_propagation` the passes of `sparsegpt`, and its Gram
    matrices for the errors. Without it, two passes: one for the norms, float32
    `[columns]` per layer, one that multiplies by what was removed, for the errors.
    Without `errors`, no Gram matrix and no second pass. An allocation takes a pass more
    with `error_propagation`, none without.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of arrays.
        batches: of inputs, as for `sparsegpt`.
        sparsity: the fraction of zeros for each output, or rules; None for N:M.
        pattern: `jopt.Unstructured()` or `jopt.NM(n, m)`, or rules.
        select: which leaves, as for `sparsegpt`.
        error_propagation: whether a layer sees what pruned layers before it give.
        allocation: one of `jopt.allocation`, to give each layer its own sparsity. Every
            output of a layer keeps the same number of inputs, so the budget of a layer
            is rounded to a multiple of its outputs: in layers of few inputs it may be
            off by some per cent, and what all layers keep need not add up to the count
            asked for. `sparsegpt` keeps it to six decimals of a layer's sparsity.
        errors: whether the report says what each layer loses, which is most of the work
            where there are many inputs: without, no Gram matrix is made.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(sparse_params, masks, report)`, as for `sparsegpt`.

    Raises:
        TypeError: an argument is of a wrong type, or `batches` are no inputs.
        ValueError: as for `sparsegpt`.

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
        arXiv:2306.11695.

    >>> import jax.numpy as jnp
    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.array([[1.0], [0.5], [2.0], [0.3]])}
    >>> x = jnp.diag(jnp.array([1.0, 9.0, 1.0, 1.0]))
    >>> sparse, masks, report = wanda(apply, params, [x], sparsity=0.5)
    >>> sparse["w"][:, 0]
    Array([0. , 0.5, 2. , 0. ], dtype=float32)
    >>> print(report)
      layer    shape   sparsity      error
     ──────────────────────────────────────
      w       [4, 1]     50.0 %   4.30e-02
    """
    return _one_shot(
        Method("wanda", prune_given_squares, "squares"),
        apply,
        params,
        batches,
        sparsity=sparsity,
        pattern=pattern,
        select=select,
        error_propagation=error_propagation,
        allocation=allocation,
        errors=errors,
        progress=progress,
    )


def _one_shot(
    method: Method,
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    sparsity: Any,
    pattern: Any,
    select: rules.Select,
    error_propagation: bool,
    allocation: Allocation | None,
    errors: bool,
    progress: bool,
) -> tuple[Any, Any, OneShotReport]:
    """Prune by any method."""
    check_flags(error_propagation=error_propagation, errors=errors, progress=progress)
    goals = resolve_goals(sparsity, pattern, params)
    _check_allocation(allocation, sparsity, pattern)
    batches, analysis = begin(method.name, apply, params, batches)
    targets, left = find_targets(
        analysis.table,
        params,
        goals,
        select,
        without_goal="no rule gives it a sparsity",
    )
    for target in targets:
        check_groups(target)
    require_targets(method.name, "prune", targets, left)
    check(method, targets)  # before the first pass
    return prune_layers(
        method,
        apply,
        params,
        batches,
        analysis,
        targets,
        left,
        None if allocation is None else (allocation, float(sparsity)),
        error_propagation=error_propagation,
        errors=errors,
        progress=progress,
    )


def _check_allocation(allocation: Any, sparsity: Any, pattern: Any) -> None:
    if allocation is None:
        return
    check_allocation(allocation)
    if not isinstance(sparsity, int | float) or not isinstance(pattern, Unstructured):
        raise ValueError(
            "allocation must come with one sparsity and jopt.Unstructured(), which it "
            f"divides among layers, got sparsity={sparsity!r} and pattern={pattern!r}; "
            "rules need no allocation"
        )
