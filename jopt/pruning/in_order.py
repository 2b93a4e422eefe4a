"""The order of one-shot pruning: layer after layer, or all at once.

In order, each step asks a pass over the batches for the moments of one input, prunes
what reads it, and the next pass runs with the pruned params. All at once, one pass
gives the moments of everything.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt.programs.record import track
from jopt.programs.sites import Analysis
from jopt.programs.sources import Sources
from jopt.pruning import passes, removal
from jopt.pruning.allocation import Allocation, Units
from jopt.pruning.reconstruction import LayerRow, OneShotReport
from jopt.pruning.solving import Facts, Inputs, Method, prepare, prune_layer, read
from jopt.pruning.spread import as_automatic, on_every_device
from jopt.pruning.targets import Target

Budget = tuple[Allocation, float] | None
Result = tuple[Any, Any, OneShotReport]

_NOT_MET = "what multiplies is not made of its numbers alone, or not in their order"
_NOT_REACHED = "no input but zeros reached it"


class _Step(NamedTuple):
    """Targets that see one input, and a layer of theirs."""

    targets: list[int]
    layer: int


class _Work:
    """Params, masks and rows as they grow."""

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
        self.rows: dict[tuple[int, int], LayerRow] = {}
        self.dense: list[Any]
        self.treedef: Any
        self.dense, self.treedef = jax.tree.flatten(params)
        self.leaves = list(self.dense)
        self.masks: dict[int, jax.Array] = {}

    @property
    def params(self) -> Any:
        """As they are now."""
        return self.treedef.unflatten(self.leaves)

    def prune(
        self,
        i: int,
        layer: int,
        inputs: Inputs,
        seen: jax.Array,
        sparsity: Any,
    ) -> Facts | None:
        """Prune a layer of a target.

        Args:
            i: which target.
            layer: which layer.
            inputs: of the layer.
            seen: `[batch, columns]`.
            sparsity: of this layer, or None for the goal's.

        Returns:
            What became of its matrices; None if they were left alone.
        """
        target = self.targets[i]
        at = target.leaf
        name = target.layer_name(layer)
        leaf, mask, facts = prune_layer(
            self.leaves[at],
            self.masks.get(at),
            inputs,
            seen,
            layer,
            sparsity,
            target=target,
            method=self.method,
            is_own=at in self.masks,
            errors=self.errors,
        )
        if facts.is_pruned or at in self.masks:
            self.leaves[at], self.masks[at] = leaf, mask
        if not facts.is_finite:
            raise ValueError(
                f"inputs of every site must be finite, got NaN or infinity at {name!r};"
                f" look at the batches, or leave {target.path!r} out with select"
            )
        if not facts.is_met:
            self.left[target.name] = _NOT_MET
            return None
        if not facts.is_solved:
            raise ValueError(
                "damping must make every Gram matrix positive definite, got one that "
                f"is not at {name!r}; raise damping, or bring more rows than inputs"
            )
        if not facts.reached.all():
            several = facts.reached.size > 1
            count = f" in {np.sum(~facts.reached)} of {facts.reached.size} matrices"
            self.left[name] = _NOT_REACHED + count * several
        return facts if facts.reached.any() else None

    def note(self, i: int, layer: int, facts: Facts, errors: Any) -> None:
        """Write down what became of one layer.

        Args:
            i: which target.
            layer: which layer.
            facts: of it.
            errors: `[2]`, squared norms of what was lost and of all.
        """
        target = self.targets[i]
        _, batch, *shape = target.layout.sizes
        num_weights = math.prod((batch, *shape))
        lost, whole = map(float, errors)
        error = lost / whole if whole else 0.0
        self.rows[i, layer] = LayerRow(
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
        rows = tuple(self.rows[key] for key in order if key in self.rows)
        report = OneShotReport(rows, self.left)
        return self.params, self.treedef.unflatten(masks), report


def prune_in_order(
    method: Method,
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    analysis: Analysis,
    targets: Sequence[Target],
    left: dict[str, str],
    budget: Budget,
    *,
    errors: bool,
    progress: bool,
) -> Result:
    """Prune layer after layer, each with the inputs that those before it give.

    Args:
        method: what to do with a matrix.
        apply: the function.
        params: its parameters.
        batches: of inputs, that can be passed over again.
        analysis: of the function at the first of them.
        targets: what to prune.
        left: path to reason of what is left alone.
        budget: an allocation and the sparsity that it divides.
        errors: whether to measure what is lost.
        progress: whether to show a bar.

    Returns:
        Params, masks and report.
    """
    work = _Work(method, params, targets, left, errors=errors)
    shares = None
    if budget is not None:
        observe = passes.moments_of_all(apply, targets, "squares")
        found = passes.total(observe, params, batches, {})
        shares = _shares(budget, work, _squares_of(targets, found, "squares"))
    steps = _steps(Sources(analysis.traced.body), targets)
    kind: passes.Moments = "gram" if errors else method.moments
    observe = passes.moments_of_some(apply, targets, kind)
    for step in track(steps, f"pruning by {method.name}", progress):
        active = [i for i in step.targets if targets[i].name not in work.left]
        if not active:
            continue
        asked = [targets[i] for i in active]
        values = passes.asked(targets, asked[0], asked, step.layer)
        found = passes.total(observe, work.params, batches, values)
        _, batch, columns, _ = asked[0].layout.sizes
        shape = (batch, columns, columns) if kind == "gram" else (batch, columns)
        inputs = prepare(found["moments"].pop(str(shape)), method=method)
        for i in active:
            seen = passes.seen_by(targets[i], found["seen"])
            own = None if shares is None else shares[i][step.layer]
            facts = work.prune(i, step.layer, inputs, seen, own)
            if facts is not None:
                work.note(i, step.layer, facts, facts.errors)
        del inputs  # before the next pass
    return work.result([(i, step.layer) for step in steps for i in step.targets])


def prune_all_at_once(
    method: Method,
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    analysis: Analysis,
    targets: Sequence[Target],
    left: dict[str, str],
    budget: Budget,
    *,
    errors: bool,
    progress: bool,
) -> Result:
    """Prune every layer with the inputs of the dense model; as `prune_in_order`."""
    work = _Work(method, params, targets, left, errors=errors)
    label = f"measuring for {method.name}"
    observe = passes.moments_of_all(apply, targets, method.moments)
    found = passes.total(observe, params, track(batches, label, progress), {})
    shares: Any = [None] * len(targets)
    if budget is not None:
        shares = _shares(budget, work, _squares_of(targets, found, method.moments))
    pruned: dict[tuple[int, int], Facts] = {}
    order = [
        (i, step.layer)
        for step in _steps(Sources(analysis.traced.body), targets)
        for i in step.targets
    ]
    for i in dict.fromkeys(i for i, _ in order):
        target = targets[i]
        moments = passes.of_target(target, found, "moments")
        seen = passes.of_target(target, found, "seen")
        for layer in range(target.layout.sizes[0]):
            inputs = prepare(moments[layer], method=method)
            own = None if shares[i] is None else shares[i][layer]
            facts = work.prune(i, layer, inputs, seen[layer], own)
            if facts is not None:
                pruned[i, layer] = facts
    measured: dict[int, Any] = {}
    if errors and method.moments != "gram":
        measured = _measured_errors(apply, params, batches, work, pruned, progress)
    for (i, layer), facts in pruned.items():
        lost = measured[i][layer] if measured else facts.errors
        work.note(i, layer, facts, lost)
    return work.result(order)


def _measured_errors(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    work: _Work,
    done: Iterable[tuple[int, int]],
    progress: bool,
) -> dict[int, Any]:
    """Multiply what was met by what was removed, in another pass."""
    numbers = list(dict.fromkeys(i for i, _ in done))
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


def _steps(sources: Sources, targets: Sequence[Target]) -> list[_Step]:
    """Sort the layers of all targets, those with one input together."""
    groups: dict[Any, list[tuple[Any, int]]] = {}
    for i, target in enumerate(targets):
        _, batch, columns, _ = target.layout.sizes
        for layer in range(target.layout.sizes[0]):
            inputs: list[Hashable] = []
            moments = []
            for site, part in target.uses:
                index = passes.layer_index(target, site, part, layer)
                loops = [a.key for a in site.around if a.kind == "layers"]
                layers = {
                    key: at
                    for key, at in zip(loops, index, strict=True)
                    if isinstance(at, int)
                }
                inputs.append((sources.input_of(site), tuple(layers.items())))
                moments.append(sources.order(site, layers))
            key: Any = (frozenset(Counter(inputs).items()), batch, columns, layer)
            groups.setdefault(key, []).append((min(moments), i))
    ordered = sorted((sorted(members), key[-1]) for key, members in groups.items())
    return [_Step([i for _, i in members], layer) for members, layer in ordered]


def _squares_of(
    targets: Sequence[Target], found: Any, kind: passes.Moments
) -> list[jax.Array]:
    """Take the squared norms of inputs, `[layers, batch, columns]`, out of moments."""
    every = [passes.of_target(target, found, "moments") for target in targets]
    if kind == "squares":
        return every
    return [jnp.diagonal(gram, axis1=-2, axis2=-1) for gram in every]


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
