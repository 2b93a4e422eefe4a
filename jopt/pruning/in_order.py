"""What becomes of params that are pruned in one shot: layer after layer, or at once."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt.programs import passes
from jopt.programs.layer_by_layer import (
    run_all_at_once,
    run_in_order,
    settle,
    steps_of,
)
from jopt.programs.record import track
from jopt.programs.sites import Analysis
from jopt.programs.spread import as_automatic, automatic, on_every_device, read
from jopt.programs.targets import Target, require_finite
from jopt.pruning import removal
from jopt.pruning.allocation import Allocation, Units
from jopt.pruning.one_shot_report import LayerRow, OneShotReport
from jopt.pruning.solving import Facts, Inputs, Method, prepare, prune_layer

Budget = tuple[Allocation, float] | None
Result = tuple[Any, Any, OneShotReport]

_NOT_REACHED = "no input but zeros reached it, or numbers whose squares are zero"


class _Work:
    """Params, masks and facts as they grow."""

    def __init__(
        self,
        method: Method,
        params: Any,
        targets: Sequence[Target],
        left: Any,
        *,
        errors: bool,
    ) -> None:
        self.method = method
        self.errors = errors
        self.targets = targets
        self.left: dict[str, str] = dict(left)
        self.shares: list[np.ndarray[Any, Any]] | None = None
        self.facts: dict[tuple[int, int], Facts] = {}
        self.dense: list[Any]
        self.treedef: Any
        self.dense, self.treedef = jax.tree.flatten(params)
        require_finite(targets, self.dense)
        self.leaves = list(self.dense)
        self.masks: dict[int, jax.Array] = {}

    @property
    def params(self) -> Any:
        """As they are now."""
        return self.treedef.unflatten(self.leaves)

    def prepare(self, moments: jax.Array) -> Inputs:
        """Get ready what several matrices share."""
        return prepare(moments, method=self.method)

    def solve(self, i: int, layer: int, inputs: Inputs, seen: jax.Array) -> None:
        """Prune a layer of a target.

        Args:
            i: which target.
            layer: which layer.
            inputs: of the layer.
            seen: `[batch, columns]`.
        """
        target = self.targets[i]
        at = target.leaf
        leaf, mask, facts = prune_layer(
            self.leaves[at],
            self.masks.get(at),
            inputs,
            seen,
            layer,
            None if self.shares is None else self.shares[i][layer],
            target=target,
            method=self.method,
            is_own=at in self.masks,
            errors=self.errors,
        )
        if facts.is_pruned or at in self.masks:
            self.leaves[at], self.masks[at] = leaf, mask
        is_met = settle(
            target,
            layer,
            facts,
            self.left,
            params=self.params,
            unreached=_NOT_REACHED,
        )
        if is_met and facts.reached.any():
            self.facts[i, layer] = facts

    def row(self, i: int, layer: int) -> LayerRow:
        """Write down what became of one layer."""
        target, facts = self.targets[i], self.facts[i, layer]
        _, batch, *shape = target.layout.sizes
        num_weights = math.prod((batch, *shape))
        lost, whole = map(float, facts.errors)
        error = lost / whole if whole else 0.0
        return LayerRow(
            name=target.layer_name(layer),
            path=target.path,
            layer=layer if target.is_stacked else None,
            shape=tuple(shape) if batch == 1 else (batch, *shape),
            sparsity=1 - int(facts.num_kept.sum(dtype=np.int64)) / num_weights,
            error=error if self.errors else None,
        )

    def result(self, order: Sequence[tuple[int, int]]) -> Result:
        """Return what users get, rows in an order of targets and layers."""
        masks = [self.masks.get(i, optax.MaskedNode()) for i in range(len(self.dense))]
        rows = tuple(self.row(*key) for key in order if key in self.facts)
        report = OneShotReport(rows, self.left)
        return self.params, self.treedef.unflatten(masks), report


def prune_layers(
    method: Method,
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    analysis: Analysis,
    targets: Sequence[Target],
    left: dict[str, str],
    budget: Budget,
    *,
    error_propagation: bool,
    errors: bool,
    progress: bool,
) -> Result:
    """Prune all layers.

    Args:
        method: what to do with a matrix.
        apply: the function.
        params: its parameters.
        batches: of inputs, that can be passed over again.
        analysis: of the function at the first of them.
        targets: what to prune.
        left: path to reason of what is left alone.
        budget: an allocation and the sparsity that it divides.
        error_propagation: whether layers see what pruned ones before them give.
        errors: whether to measure what is lost.
        progress: whether to show a bar.

    Returns:
        Params, masks and report.
    """
    work = _Work(method, params, targets, left, errors=errors)
    steps = steps_of(analysis, targets)
    order = [(i, step.layer) for step in steps for i in step.targets]
    if error_propagation:
        if budget is not None:
            observe = passes.moments_of_all(apply, targets, "squares")
            found = passes.total(observe, params, batches, {})
            work.shares = _shares(budget, work, _squares_of(targets, found, "squares"))
        kind: passes.Moments = "gram" if errors else method.moments
        label = f"pruning by {method.name}"
        run_in_order(
            work, apply, batches, targets, steps, kind, label=label, progress=progress
        )
        return work.result(order)
    label = f"measuring for {method.name}"
    observe = passes.moments_of_all(apply, targets, method.moments)
    found = passes.total(observe, params, track(batches, label, progress), {})
    if budget is not None:
        squares = _squares_of(targets, found, method.moments)
        work.shares = _shares(budget, work, squares)
    run_all_at_once(work, targets, steps, found)
    if errors and method.moments != "gram":
        measured = _measured_errors(apply, params, batches, work, progress)
        for (i, layer), facts in work.facts.items():
            work.facts[i, layer] = facts._replace(errors=measured[i][layer])
    return work.result(order)


def _measured_errors(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    work: _Work,
    progress: bool,
) -> dict[int, Any]:
    """Multiply what was met by what was removed, in another pass."""
    numbers = list(dict.fromkeys(i for i, _ in work.facts))
    if not numbers:
        return {}
    pruned = [work.targets[i] for i in numbers]
    masks = [read(work.masks[t.leaf], layout=t.layout) for t in pruned]
    measure = removal.errors_of_all(apply, pruned)
    values = removal.removing(pruned, dict(enumerate(masks)))
    batches = track(batches, "measuring errors", progress)
    found = passes.total(measure, params, batches, values)
    return {
        i: jax.device_get(passes.of_target(target, found, "errors"))
        for i, target in zip(numbers, pruned, strict=True)
    }


def _squares_of(
    targets: Sequence[Target], found: Any, kind: passes.Moments
) -> list[jax.Array]:
    """Take the squared norms of inputs, `[layers, batch, columns]`, out of moments."""
    every = [passes.of_target(target, found, "moments") for target in targets]
    if kind == "squares":
        return every
    return [jnp.diagonal(gram, axis1=-2, axis2=-1) for gram in every]


@automatic()
def _shares(
    budget: tuple[Allocation, float], work: _Work, squares: Sequence[jax.Array]
) -> list[np.ndarray[Any, Any]]:
    """Let an allocation divide one sparsity among all layers, by Wanda's scores."""
    allocation, sparsity = budget
    units = []
    start = 0
    for target, each in zip(work.targets, squares, strict=True):
        leaf = as_automatic(work.leaves[target.leaf])
        weights = jnp.abs(read(leaf, layout=target.layout).astype(jnp.float32))
        layers = weights.shape[0]
        scores = weights * jnp.sqrt(on_every_device(each))[..., None]
        units.append(
            Units(
                scores,
                tuple(range(start, start + layers)),
                tuple(map(target.layer_name, range(layers))),
                target.layer_shape,
            )
        )
        start += layers
    shares = []
    for unit, kept in zip(units, allocation(units, sparsity), strict=True):
        high, low = (np.asarray(limb, np.float64) for limb in jax.device_get(kept))
        size = unit.scores[0].size
        shares.append((1 - (high * 2**16 + low) / size).astype(np.float32))
    return shares
