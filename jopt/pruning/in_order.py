"""The order of one-shot pruning: layer after layer, or all at once.

In order, each step asks a pass over the batches for the moments of one input, prunes
what reads it, and the next pass runs with the pruned params. All at once, one pass
gives the moments of everything.
"""

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
from jopt.pruning import passes
from jopt.pruning.allocation import Allocation, Units
from jopt.pruning.reconstruction import LayerRow, OneShotReport
from jopt.pruning.solving import (
    Method,
    Solved,
    is_met,
    on_every_device,
    placed_as,
    read,
    solve,
    write,
)
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
        self, method: Method, params: Any, targets: Sequence[Target], left: Any
    ) -> None:
        self.method = method
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
        layer: int | None,
        moments: jax.Array,
        seen: jax.Array,
        sparsities: Any,
    ) -> Solved | None:
        """Prune a target, all of its layers or one.

        Args:
            i: which target.
            layer: which layer, or None for all.
            moments: `[layers, batch, columns, ...]`.
            seen: `[layers, batch, columns]`.
            sparsities: per layer, or None for the goal's.

        Returns:
            What became of its matrices; None if they are not what was met.
        """
        target = self.targets[i]
        leaf = on_every_device(jnp.asarray(self.leaves[target.leaf]))
        matrices = read(leaf, layer, layout=target.layout)
        if layer is not None:
            matrices = matrices[None]
        moments = on_every_device(moments)
        facts = (jnp.isfinite(moments).all(), is_met(on_every_device(seen), matrices))
        is_finite, was_met = jax.device_get(facts)
        if not is_finite:
            raise ValueError(
                f"inputs of every site must be finite, got NaN or infinity at "
                f"{target.layer_name(layer or 0)!r}; look at the batches, or leave "
                f"{target.path!r} out with select"
            )
        if not was_met.all():
            self.left[target.name] = _NOT_MET
            return None
        layers, batch, *each = matrices.shape
        n = layers * batch
        solved = solve(
            matrices.reshape(n, *each),
            moments.reshape(n, *moments.shape[2:]),
            None if sparsities is None else jnp.repeat(sparsities, batch),
            method=self.method,
            sparsity=target.goal.sparsity if sparsities is None else None,
            pattern=target.goal.pattern,
        )
        if not bool(jnp.isfinite(solved.weights).all()):
            raise ValueError(
                "damping must make every Gram matrix positive definite, got one that "
                f"is not at {target.layer_name(layer or 0)!r}; raise damping, or bring "
                "more rows than inputs"
            )
        self._keep(target, leaf, layer, solved, (layers, batch, *each))
        return solved

    def _keep(
        self,
        target: Target,
        leaf: jax.Array,
        layer: int | None,
        solved: Solved,
        shape: tuple[int, ...],
    ) -> None:
        """Put pruned matrices back."""
        if not bool(solved.reached.any()):
            return
        shape = shape if layer is None else shape[1:]
        pruned = write(solved.weights.reshape(shape), leaf, layer, layout=target.layout)
        self.leaves[target.leaf] = placed_as(pruned, self.leaves[target.leaf])
        before = self.masks.get(target.leaf)
        before = jnp.ones_like(leaf, jnp.bool_) if before is None else before
        mask = write(
            solved.mask.reshape(shape),
            on_every_device(before),
            layer,
            layout=target.layout,
        )
        self.masks[target.leaf] = placed_as(mask, self.dense[target.leaf])

    def note(self, i: int, layer: int, solved: Solved, errors: Any) -> None:
        """Write down what became of one layer.

        Args:
            i: which target.
            layer: which layer.
            solved: its matrices alone.
            errors: `[2]`, squared norms of what was lost and of all.
        """
        target = self.targets[i]
        name = target.layer_name(layer)
        reached, num_kept = jax.device_get((solved.reached, solved.mask.sum()))
        if not reached.all():
            several = reached.size > 1
            count = f" in {np.sum(~reached)} of {reached.size} matrices"
            self.left[name] = _NOT_REACHED + count * several
        if not reached.any():
            return
        batch, *shape = solved.mask.shape
        lost, whole = map(float, errors)
        self.rows[i, layer] = LayerRow(
            name=name,
            path=target.path,
            layer=layer if target.is_stacked else None,
            shape=tuple(shape) if batch == 1 else (batch, *shape),
            sparsity=1 - int(num_kept) / solved.mask.size,
            error=lost / whole if whole else 0.0,
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
        progress: whether to show a bar.

    Returns:
        Params, masks and report.
    """
    work = _Work(method, params, targets, left)
    shares = None
    if budget is not None:
        observe = passes.moments_of_all(apply, targets, "squares")
        found = passes.total(observe, params, batches, {})
        shares = _shares(budget, work, _squares_of(targets, found, "squares"))
    steps = _steps(Sources(analysis.traced.body), targets)
    observe = passes.moments_of_some(apply, targets, "gram")
    for step in track(steps, f"pruning by {method.name}", progress):
        active = [i for i in step.targets if targets[i].name not in work.left]
        if not active:
            continue
        asked = [targets[i] for i in active]
        values = passes.asked(targets, asked[0], asked, step.layer)
        found = passes.total(observe, work.params, batches, values)
        _, batch, columns, _ = asked[0].layout.sizes
        gram = found["moments"][str((batch, columns, columns))]
        for i in active:
            seen = passes.seen_by(targets[i], found["seen"])
            own = None if shares is None else shares[i][step.layer : step.layer + 1]
            solved = work.prune(i, step.layer, gram[None], seen[None], own)
            if solved is not None:
                errors = jax.device_get(solved.errors).sum(0)
                work.note(i, step.layer, solved, errors)
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
    progress: bool,
) -> Result:
    """Prune every layer with the inputs of the dense model; as `prune_in_order`."""
    work = _Work(method, params, targets, left)
    label = f"measuring for {method.name}"
    observe = passes.moments_of_all(apply, targets, method.moments)
    found = passes.total(observe, params, track(batches, label, progress), {})
    shares: Any = [None] * len(targets)
    if budget is not None:
        shares = _shares(budget, work, _squares_of(targets, found, method.moments))
    everything: dict[int, Solved] = {}
    order = [
        (i, step.layer)
        for step in _steps(Sources(analysis.traced.body), targets)
        for i in step.targets
    ]
    for i in dict.fromkeys(i for i, _ in order):
        target = targets[i]
        moments = passes.of_target(target, found, "moments")
        seen = passes.of_target(target, found, "seen")
        solved = work.prune(i, None, moments, seen, shares[i])
        if solved is not None:
            everything[i] = solved._replace(weights=None)  # not kept twice
    errors = {i: s.errors for i, s in everything.items()}
    if method.moments != "gram":
        errors = _measured_errors(apply, params, batches, targets, everything, progress)
    for i, solved in everything.items():
        layers = targets[i].layout.sizes[0]
        sums = jax.device_get(errors[i]).reshape(layers, -1, 2).sum(1)
        split = jax.tree.map(lambda x, n=layers: x.reshape(n, -1, *x.shape[1:]), solved)
        for layer in range(layers):
            one = jax.tree.map(lambda x, layer=layer: x[layer], split)
            work.note(i, layer, one, sums[layer])
    return work.result(order)


def _measured_errors(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    targets: Sequence[Target],
    solved: dict[int, Solved],
    progress: bool,
) -> dict[int, jax.Array]:
    """Multiply what was met by what was removed, in another pass."""
    if not solved:
        return {}
    pruned = [targets[i] for i in solved]
    masks = {
        place: solved[i].mask.reshape(targets[i].layout.sizes)
        for place, i in enumerate(solved)
    }
    measure = passes.errors_of_all(apply, pruned)
    values = passes.removing(pruned, masks)
    batches = track(batches, "measuring errors", progress)
    found = passes.total(measure, params, batches, values)
    return {i: passes.of_target(targets[i], found, "errors") for i in solved}


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
        leaf = on_every_device(jnp.asarray(work.leaves[target.leaf]))
        weights = jnp.abs(read(leaf, None, layout=target.layout).astype(jnp.float32))
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
