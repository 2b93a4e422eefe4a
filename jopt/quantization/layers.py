"""What becomes of params that are quantized with calibration data."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jopt.arrays.quantized import QuantizedArray, from_codes
from jopt.arrays.quantized_plus_low_rank import QuantizedPlusLowRank
from jopt.arrays.scales import Scale, compute_range, compute_scale
from jopt.arrays.specs import QuantSpec, group_axis
from jopt.programs import flags, passes, sites
from jopt.programs.layer_by_layer import run_all_at_once, run_in_order, steps_of
from jopt.programs.record import inputs_of, require_batches, track
from jopt.programs.sites import SiteTable
from jopt.programs.targets import Target, find_targets
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

_NOT_MET = "what multiplies is not made of its numbers alone, or not in their order"
_NOT_REACHED = "rounded to nearest, no input but zeros reached it"


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
    ) -> None:
        self.method = method
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
        self.static = {t.leaf: _scale_of(self.dense[t.leaf], t.goal) for t in targets}

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
        name = target.layer_name(layer)
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
        )
        if facts.is_met or at in self.codes:
            self.leaves[at], self.codes[at] = leaf, codes
        if not facts.is_finite:
            raise ValueError(
                f"inputs of every site must be finite, got NaN or infinity at {name!r};"
                f" look at the batches, or leave {target.path!r} out with select"
            )
        if not facts.is_met:
            self.left[target.name] = _NOT_MET
            return
        if not facts.is_solved:
            raise ValueError(
                "params must be finite, and damping make every Gram matrix positive "
                f"definite, got one that is not at {name!r}; look at {target.path!r}, "
                "raise damping, or bring more rows than inputs"
            )
        if not facts.reached.all():
            several = facts.reached.size > 1
            count = f" in {np.sum(~facts.reached)} of {facts.reached.size} matrices"
            self.left[name] = _NOT_REACHED + count * several
        self.facts[i, layer] = facts
        self.solved[i, layer] = solved

    def pack(self, at: int) -> QuantizedArray | QuantizedPlusLowRank:
        """Put codes and scales of a leaf together."""
        leaf, scale, input_scale = self.dense[at], self.static[at], None
        spec = next(t.goal for t in self.targets if t.leaf == at)
        factors: dict[int, tuple[jax.Array, jax.Array]] = {}
        layout = None
        for i, target in enumerate(self.targets):
            found = {k: s for (j, k), s in self.solved.items() if j == i}
            if target.leaf != at or not found:
                continue
            own = {layer: solved.scale for layer, solved in found.items()}
            scale = _joined(scale, own, leaf.shape, target.layout, spec)
            by_input = {
                layer: solved.input_scale
                for layer, solved in found.items()
                if solved.input_scale is not None
            }
            if by_input:
                more = _joined_inputs(by_input, leaf.shape, target.layout)
                input_scale = more if input_scale is None else input_scale * more
            factors = {
                layer: solved.low_rank
                for layer, solved in found.items()
                if solved.low_rank is not None
            }
            layout = target.layout
        packed = from_codes(
            self.codes[at], scale, spec, leaf.dtype, input_scale=input_scale
        )
        # A method with factors has refused leaves of several targets.
        return packed if layout is None else add_factors(packed, factors, layout)

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
                    error=(lost / whole if whole else 0.0) if self.errors else None,
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


@functools.partial(jax.jit, static_argnums=1)
def _scale_of(leaf: jax.Array, spec: QuantSpec) -> Scale:
    return compute_scale(*compute_range(leaf, spec), spec)


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
) -> tuple[Any, QuantizationReport]:
    """Quantize all layers by any method; see `post_training` for the arguments."""
    require_batches(batches)
    if isinstance(batches, Iterator):
        batches = list(batches)
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("batches must have at least one item, got none")
    inputs = flags.fix(inputs_of(first))
    analysis = sites.analyse(apply, params, inputs, {})
    targets, left = _targets(analysis.table, params, spec_or_rules, select)
    if method.refuse is not None:
        reasons = {target.path: method.refuse(target) for target in targets}
        left |= {path: why for path, why in reasons.items() if why is not None}
        targets = [target for target in targets if reasons[target.path] is None]
    if not targets:
        listed = "; ".join(f"{path}: {why}" for path, why in left.items())
        raise ValueError(
            f"{method.name} must have something to quantize, got no leaf that it can "
            f"({listed or 'none is selected'}); choose others with select"
        )
    work = _Work(method, params, targets, left, errors=errors)
    steps = steps_of(analysis, targets)
    kind: passes.Moments = "gram" if errors else method.moments
    if error_propagation:
        label = f"quantizing by {method.name}"
        run_in_order(
            work, apply, batches, targets, steps, kind, label=label, progress=progress
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
    specs = resolve_specs(spec_or_rules, params, select=select, sites=table)
    goals = [
        None if is_masked_node(spec) else spec
        for spec in jax.tree.leaves(specs, is_leaf=is_masked_node)
    ]
    targets, left = find_targets(
        table, params, goals, select, without_goal="no rule gives it a spec"
    )
    for target in targets:
        _check_grid(target)
    return targets, left


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
