"""What becomes of params that are quantized with calibration data."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jopt.arrays.arguments import check_flags, check_share
from jopt.arrays.quantized import QuantizedArray, from_codes
from jopt.arrays.quantized_plus_low_rank import QuantizedPlusLowRank
from jopt.arrays.scale_fits import Fit, check_fit, fitted
from jopt.arrays.scales import Scale
from jopt.arrays.specs import QuantSpec, check_spec, group_axis, scale_shape
from jopt.programs import passes
from jopt.programs.batches import begin, require_targets
from jopt.programs.drift import require_pairs
from jopt.programs.layer_by_layer import (
    run_all_at_once,
    run_in_order,
    settle,
    steps_of,
)
from jopt.programs.record import track
from jopt.programs.sites import SiteTable
from jopt.programs.spread import automatic, beside, on_every_device
from jopt.programs.targets import Target, find_targets, require_finite
from jopt.quantization.chosen_once import with_all_codes
from jopt.quantization.layer_report import (
    QuantizationReport,
    QuantizedRow,
    decibels,
)
from jopt.quantization.layer_scales import leaf_input_scale, leaf_scale
from jopt.quantization.layer_solving import (
    Facts,
    Inputs,
    Method,
    Solved,
    prepare,
    quantize_layer,
)
from jopt.quantization.low_rank import add_factors
from jopt.quantization.specs import SpecOrRules, resolve_specs
from jopt.trees import rules
from jopt.updates.states import is_masked_node

_NOT_REACHED = (
    "rounded to nearest, no input but zeros reached it, or numbers whose squares are "
    "zero in float32"
)


class _Work:
    """Params, codes and scales as they grow."""

    def __init__(
        self,
        method: Method,
        params: Any,
        targets: Sequence[Target],
        left: Any,
        *,
        errors: bool,
        correction: float,
    ) -> None:
        self.method = method
        self.correction = correction
        self.errors = errors
        self.targets = targets
        self.left: dict[str, str] = dict(left)
        self.facts: dict[tuple[int, int], Facts] = {}
        self.solved: dict[tuple[int, int], Solved] = {}
        self.dense: list[Any]
        self.treedef: Any
        self.dense, self.treedef = jax.tree.flatten(params)
        self.leaves = list(self.dense)
        self.codes: dict[int, jax.Array] = {}
        require_finite(targets, self.dense)
        self.static = {
            t.leaf: _scale_of(self.dense[t.leaf], t.goal, method.fit) for t in targets
        }

    @property
    def params(self) -> Any:
        """As they are now, floats on the grid among them."""
        return self.treedef.unflatten(self.leaves)

    def prepare(self, moments: jax.Array) -> Inputs:
        """Get ready what several matrices share."""
        return prepare(moments, method=self.method)

    def solve(self, i: int, layer: int, inputs: Inputs, seen: jax.Array) -> None:
        """Quantize a layer of a target.

        Args:
            i: which target.
            layer: which layer.
            inputs: of the layer.
            seen: `[batch, columns]`.
        """
        target = self.targets[i]
        at = target.leaf
        leaf, codes, solved, facts = quantize_layer(
            self.leaves[at],
            self.codes.get(at),
            self.static[at],
            inputs,
            seen,
            layer,
            target=target,
            method=self.method,
            is_own=at in self.codes,
            errors=self.errors,
            correction=self.correction,
        )
        if facts.is_met or at in self.codes:
            self.leaves[at], self.codes[at] = leaf, codes
        is_met = settle(
            target,
            layer,
            facts,
            self.left,
            params=self.treedef.unflatten(self.dense),
            unreached=_NOT_REACHED,
        )
        if not is_met:
            return
        self.facts[i, layer] = facts
        self.solved[i, layer] = solved

    def pack(self, at: int) -> QuantizedArray | QuantizedPlusLowRank:
        """Put codes and scales of a leaf together."""
        leaf, input_scale = self.dense[at], None
        scale = jax.tree.map(on_every_device, self.static[at])
        spec = next(t.goal for t in self.targets if t.leaf == at)
        factors: dict[int, tuple[jax.Array, jax.Array]] = {}
        layout = None  # of the one target that a leaf with factors has, see `refuse`
        for i, target in enumerate(self.targets):
            found = {k: s for (j, k), s in self.solved.items() if j == i}
            if target.leaf != at or not found:
                continue
            own = {layer: solved.scale for layer, solved in found.items()}
            by_input = {
                layer: solved.input_scale
                for layer, solved in found.items()
                if solved.input_scale is not None
            }
            layout = target.layout
            factors = {
                layer: solved.low_rank
                for layer, solved in found.items()
                if solved.low_rank is not None
            }
            with automatic():
                scale = _joined(scale, own, leaf.shape, target.layout, spec)
                if by_input:
                    more = _joined_inputs(by_input, leaf.shape, target.layout)
                    input_scale = more if input_scale is None else input_scale * more
        scale, input_scale = jax.tree.map(
            lambda x: beside(x, leaf), (scale, input_scale)
        )
        packed = from_codes(
            self.codes[at], scale, spec, leaf.dtype, input_scale=input_scale
        )
        if layout is None or not factors:
            return packed
        return add_factors(packed, factors, layout, like=leaf)

    def result(
        self, order: Sequence[tuple[int, int]]
    ) -> tuple[Any, QuantizationReport]:
        """Return what users get, rows in an order of targets and layers."""
        leaves = list(self.dense)
        for at in self.codes:
            leaves[at] = self.pack(at)
        rows = []
        for i, layer in order:
            if (i, layer) not in self.facts:
                continue
            target, facts = self.targets[i], self.facts[i, layer]
            _, batch, *shape = target.layout.sizes
            lost, whole = map(float, facts.errors)
            rows.append(
                QuantizedRow(
                    name=target.layer_name(layer),
                    path=target.path,
                    layer=layer if target.is_stacked else None,
                    shape=tuple(shape) if batch == 1 else (batch, *shape),
                    format=target.goal.format.name,
                    bits=leaves[target.leaf].bits_per_weight,
                    signal_to_noise=decibels(*map(float, facts.noise)),
                    error=lost / whole if self.errors and whole else None,
                )
            )
        report = QuantizationReport(tuple(rows), self.left)
        return self.treedef.unflatten(leaves), report


_joined = jax.jit(
    lambda static, layers, shape, layout, spec: leaf_scale(
        static, shape, layout, spec, layers
    ),
    static_argnums=(2, 3, 4),
)
_joined_inputs = jax.jit(
    lambda layers, shape, layout: leaf_input_scale(shape, layout, layers),
    static_argnums=(1, 2),
)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _scale_of(leaf: jax.Array, spec: QuantSpec, fit: Fit) -> Scale:
    return fitted(fit, leaf, spec)


def quantize_layers(
    method: Method,
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec_or_rules: SpecOrRules,
    *,
    select: rules.Select,
    error_propagation: bool,
    errors: bool,
    progress: bool,
    correction: float = 0.0,
) -> tuple[Any, QuantizationReport]:
    """Quantize all layers by any method; see `post_training` for the arguments."""
    _check_correction(correction, error_propagation)
    check_fit(method.fit)
    check_flags(error_propagation=error_propagation, errors=errors, progress=progress)
    batches, analysis = begin(method.name, apply, params, batches)
    if correction:
        require_pairs(analysis.table)
    targets, left = _targets(analysis.table, params, spec_or_rules, select)
    if method.refuse is not None:
        refused = {target.path: method.refuse(target) for target in targets}
        left |= {path: why for path, why in refused.items() if why is not None}
        targets = [target for target in targets if refused[target.path] is None]
    require_targets(method.name, "quantize", targets, left)
    if method.has_own_scales or correction:
        for target in targets:
            _check_outputs(target, method)
    work = _Work(method, params, targets, left, errors=errors, correction=correction)
    steps = steps_of(analysis, targets)
    is_enough = not errors or method.moments != "squares"
    kind: passes.Moments = method.moments if is_enough else "gram"
    if correction:
        kind = "drift"
    if error_propagation:
        label = f"quantizing by {method.name}"
        run_in_order(
            work,
            apply,
            batches,
            targets,
            steps,
            kind,
            label=label,
            progress=progress,
            floats=params,
        )
    else:
        label = f"measuring for {method.name}"
        observe = passes.moments_of_all(apply, targets, kind)
        found = passes.total(observe, params, track(batches, label, progress), {})
        run_all_at_once(work, targets, steps, found)
    return work.result([(i, step.layer) for step in steps for i in step.targets])


def _targets(
    table: SiteTable, params: Any, spec_or_rules: SpecOrRules, select: rules.Select
) -> tuple[list[Target], dict[str, str]]:
    """Find what to quantize, with the spec of each leaf."""
    specs = resolve_specs(
        spec_or_rules, params, select=select, sites=table, is_checked=False
    )
    goals: list[Any] = jax.tree.leaves(specs, is_leaf=is_masked_node)
    if not isinstance(spec_or_rules, QuantSpec):
        ruled = rules.resolve(spec_or_rules, params)
        goals = [
            None if own is None else goal
            for own, goal in zip(ruled, goals, strict=True)
        ]
    targets, left = find_targets(
        table, params, goals, select, without_goal="no rule gives it a spec"
    )
    for target in targets:
        if is_masked_node(target.goal):
            left[target.path] = "not selected, being no matrix"
    targets = [target for target in targets if target.path not in left]
    for target in targets:
        check_spec(target.layout.shape, target.goal, path=target.path)
        _check_grid(target)
    leaves = jax.tree.leaves(params)
    goals_of = {t.leaf: t.goal for t in targets}  # parts of a leaf have one
    chosen = {at: with_all_codes(leaves[at], goal) for at, goal in goals_of.items()}
    return [t._replace(goal=chosen[t.leaf]) for t in targets], left


def _check_correction(correction: Any, error_propagation: bool) -> None:
    """Raise for what is no share, or has nothing to correct for."""
    check_share("correction", correction, "0.5 is usual")
    if correction and not error_propagation:
        raise ValueError(
            "error_propagation must be True for a correction, which makes up for what "
            f"quantized layers before do, got correction={correction}; leave it at 0"
        )


def _check_outputs(target: Target, method: Method) -> None:
    """Raise if outputs share a scale, so that none can have the scale that it needs."""
    shape, spec = target.layout.shape, target.goal
    kept = scale_shape(shape, spec, path=target.path)
    rest = {a.axis for group in target.layout.groups for a in group}
    rest -= {a.axis for a in target.layout.groups[2]}
    if any(kept[axis] != shape[axis] for axis in rest):
        raise ValueError(
            f"axis must keep a scale per output of {target.path!r} for {method.name}, "
            f"got {spec} for shape {shape}, whose outputs are axes {sorted(rest)}; "
            "leave axis out"
        )


def _check_grid(target: Target) -> None:
    """Raise if scales vary along the inputs, or groups cut through a matrix."""
    spec, layout = target.goal, target.layout
    ndim = len(layout.shape)
    columns = layout.groups[2]
    kept = (spec.axis,) if isinstance(spec.axis, int) else spec.axis or ()
    inner = {atom.axis for atom in columns}
    if spec.group_size is None:
        if inner & {axis % ndim for axis in kept}:
            raise ValueError(
                f"axis must leave out the inputs of {target.path!r}, got {spec} for "
                f"shape {layout.shape}, whose inputs are axes {sorted(inner)}; leave "
                "axis out"
            )
        return
    along = group_axis(ndim, spec)
    last = columns[-1] if columns else None
    if last is None or along is None or last.axis != along % ndim:
        raise ValueError(
            f"groups must run along the inputs of {target.path!r}, got {spec} for "
            f"shape {layout.shape}, whose inputs are axes {sorted(inner)}; leave axis "
            "out"
        )
    fits = last.size % spec.group_size == 0 and last.stride == 1
    if not fits or layout.starts[last.axis] % spec.group_size:
        raise ValueError(
            f"group_size must divide the {last.size} inputs of {target.name!r} that "
            f"lie side by side, got {spec}; use smaller groups, or leave it out with "
            "select"
        )
