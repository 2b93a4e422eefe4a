"""Quantization-aware computation: what the shipped model will compute, with gradients.

    y = apply'(params, x):   every weight and every input of a site rounded,
                             x_q = s round(x / s),   dx_q/dx = 1 inside the range

Weights are rounded leaf by leaf, exactly as `jopt.quantize(params, spec, sites=...)`
will store them; inputs where they meet a weight. So what is trained is what ships:
`execute` multiplies the same codes.

References:
    Jacob et al., arXiv:1712.05877; Bengio et al., arXiv:1308.3432 (straight through);
    Esser et al., arXiv:1902.08153 (LSQ); Choi et al., arXiv:1805.06085 (PACT).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import quantized
from jopt.arrays.quantized import QuantSpec
from jopt.arrays.rounding import Rounding, nearest
from jopt.programs import interpret, sites
from jopt.programs.handlers import Handler, Use
from jopt.quantization import learned_ranges
from jopt.quantization.arguments import Arguments, require_step
from jopt.quantization.backward import round_gradients
from jopt.quantization.operands import (
    Activations,
    check_activations,
    is_float,
    ranges_of,
    require_static,
    round_operand,
    site_specs,
)
from jopt.quantization.roles import operand_spec
from jopt.quantization.specs import (
    SpecOrRules,
    known_specs,
    listed_specs,
    resolve_specs,
)
from jopt.trees import paths, rules
from jopt.trees.calibration import Calibration, Pair

Ranges = Literal["current", "learned", "pact"]
Gradients = (
    QuantSpec
    | Mapping[str, QuantSpec | None]
    | Sequence[tuple[str, QuantSpec | None]]
    | None
)


def fake_quantize(
    target: Any,
    spec: SpecOrRules | Calibration | None,
    *,
    activations: Activations = None,
    calibration: Calibration | None = None,
    ranges: Ranges = "current",
    gradients: Gradients = None,
    gradient_rounding: Rounding = nearest,
    begin_step: int | None = None,
    **array_options: Any,
) -> Any:
    """Round the weights and activations of a function, or one array, with gradients.

    x_q = s clip(round(x / s)),   dx_q/dx = 1 inside the range, 0 outside

    Args:
        target: a pure function `apply(params, *inputs)`, or a float array.
        spec: of the weights: a `jopt.QuantSpec` for every leaf that multiplies or is
            looked up, rules `{pattern: spec or None}` over leaf paths, None to leave
            weights alone, or a calibration, which carries specs of both. Axes resolve
            by roles: one scale per output, groups along the inputs. Weights that are
            computed from leaves (weight norm) are rounded where they are used.
        activations: of what meets a weight: a `jopt.QuantSpec`, or rules over site
            names, which may name products of two activations too
            (`{"activation:.*": spec}`). Without a calibration each batch has its own
            range: with `axis=None` one scale per token, with `axis=()` one per tensor,
            with `group_size` one per group of a token; integers are axes of the input.
        calibration: what `jopt.calibrate` returned: static ranges, one per site; or
            what training made of it, with the ranges of weights too.
        ranges: "current" for the range of the batch or of the calibration; "learned"
            for LSQ and "pact" for PACT: ranges become trainable.
        gradients: of the cotangents that arrive at products from behind: a
            `jopt.QuantSpec` for all that have a weight, or rules over site names. With
            `axis=None` scales are those that each product of the backward pass allows;
            integers are axes of the result. Forward mode is then not supported.
        gradient_rounding: `jopt.rounding.stochastic` for gradients that are right on
            average; the function then takes `key=`, and passes it on to an `apply` that
            names it as an argument too.
        begin_step: from which `step` on to round; the function then takes `step=`, and
            passes it on to an `apply` that names it as an argument too.
        **array_options: for an array, those of `jopt.arrays.quantized.fake_quantize`:
            scale, bits, rounding, key.

    Returns:
        For an array, the rounded array. For a function, `apply'(params, *inputs)`; with
        learned ranges the pair of `apply'(params, *inputs, ranges=...)` and
        `init_ranges(params, *inputs)`, which returns a `Calibration` to be trained
        beside the params, and given to `jopt.quantize` and `jopt.execute` in the end.

    Raises:
        TypeError: an argument belongs to arrays and `target` is a function, or the
            other way round, or it is of no type that it may be.
        ValueError: there is nothing to learn, `begin_step` is no count, or activations
            with given ranges have groups; (when called) a rule matches nothing, a spec
            does not fit, or the function has no site for it.

    >>> import jopt
    >>> int8 = jopt.QuantSpec(jopt.formats.int8)
    >>> apply = lambda params, x: x @ params["w"]
    >>> qat = fake_quantize(apply, int8, activations=int8)
    >>> params = {"w": jnp.array([[1.0], [0.3]])}
    >>> x = jnp.full((1, 2), 127.0)
    >>> jax.grad(lambda p: qat(p, x).sum())(params)["w"].ravel()
    Array([127., 127.], dtype=float32)
    """
    options = [activations, calibration, gradients, begin_step]
    is_function = callable(target) and not hasattr(target, "dtype")
    if not is_function:
        if any(option is not None for option in options) or ranges != "current":
            raise TypeError(
                "activations, calibration, ranges, gradients and begin_step belong to "
                "functions, "
                f"got an array of type {type(target).__name__}"
            )
        if not isinstance(spec, QuantSpec):
            raise TypeError(
                f"spec must be a jopt.QuantSpec for a bare array, got {spec!r}; rules "
                "and calibrations belong to functions of params"
            )
        return quantized.fake_quantize(target, spec, **array_options)
    if array_options:
        raise TypeError(
            f"{sorted(array_options)} belong to arrays, got a function; pass "
            "activations, calibration, ranges, gradients or begin_step"
        )
    if ranges not in ("current", "learned", "pact"):
        raise ValueError(
            f"ranges must be 'current', 'learned' or 'pact', got {ranges!r}"
        )
    if not isinstance(calibration, Calibration | None):
        raise TypeError(
            f"calibration must be a jopt.Calibration or None, got {calibration!r}; "
            "specs are given as spec= and activations="
        )
    check_activations(spec, argument="spec")
    check_activations(activations)
    check_activations(gradients, argument="gradients", is_measured=False)
    require_step("begin_step", begin_step)
    if isinstance(spec, Calibration):
        calibration = spec if calibration is None else calibration
    if activations is None and calibration is not None:
        activations = calibration
    if isinstance(activations, Calibration) and calibration is None:
        calibration = activations
    if ranges != "current" and (
        activations is None and (spec is None or ranges == "pact")
    ):
        some = "spec or activations" if ranges == "learned" else "activations"
        raise ValueError(
            f"ranges={ranges!r} must have {some} to learn the ranges of, got None; "
            "pass activations=jopt.QuantSpec(jopt.formats.int8), for example"
        )
    if ranges != "current" or calibration is not None:
        require_static(activations)
    if gradients is None and gradient_rounding is not nearest:
        raise ValueError(
            "gradients must be a spec where gradient_rounding is given, got None; pass "
            "gradients=jopt.QuantSpec(jopt.formats.int8), for example"
        )
    behind = Behind(gradients, gradient_rounding)
    plan = Plan(target, spec, activations, calibration, ranges, begin_step, behind)
    if ranges == "current":
        return plan.function()
    return plan.function(), plan.init_ranges


class Behind(NamedTuple):
    """How gradients are rounded."""

    gradients: Gradients
    rounding: Rounding

    def specs(self, table: sites.SiteTable) -> dict[str, QuantSpec]:
        """Find the spec of the cotangent of each site."""
        pairs = site_specs(self.gradients, table, argument="gradients")
        return {name: a or b for name, (a, b) in pairs.items() if a or b}


class Plan:
    """One function and how its numbers are rounded."""

    def __init__(
        self,
        apply: Callable[..., Any],
        spec: SpecOrRules | Calibration | None,
        activations: Activations,
        calibration: Calibration | None,
        ranges: Ranges,
        begin_step: int | None,
        behind: "Behind",
    ) -> None:
        self._apply = apply
        self._spec = spec
        self._activations = activations
        self._calibration = calibration
        self._rule: Any = None if ranges == "current" else ranges
        self._begin_step = begin_step
        self._behind = behind
        is_random = behind.rounding is not nearest
        self._arguments = Arguments(
            apply,
            step=None if begin_step is None else "begin_step was given",
            ranges=None if ranges == "current" else "they are learned",
            key="gradients are rounded by chance" if is_random else None,
        )
        self._run = interpret.compiled_if_eager(self._evaluate)

    def function(self) -> Callable[..., Any]:
        """Return the rewritten function."""

        def rounded(params: Any, *inputs: Any, **kwargs: Any) -> Any:
            kwargs, own = self._arguments.split((params, *inputs), kwargs)
            step, ranges = own.get("step"), own.get("ranges")
            require_step("step", step)
            if not isinstance(ranges, Calibration | None):
                raise TypeError(
                    "ranges must be a jopt.Calibration, got a "
                    f"{type(ranges).__name__}; init_ranges returns one"
                )
            return self._run(params, inputs, kwargs, step, ranges, own.get("key"))

        if not hasattr(self._apply, "__name__"):
            return rounded
        return functools.wraps(self._apply)(rounded)

    def init_ranges(self, params: Any, *inputs: Any, **kwargs: Any) -> Calibration:
        """Return the ranges that training starts from.

        Args:
            params: the parameters.
            *inputs: one batch, which is measured where there is no calibration.
            **kwargs: the same by name.

        Returns:
            The ranges of all sites, and for "learned" of all weights.
        """
        table = sites.analyse(self._apply, params, inputs, kwargs).table
        specs = self._weight_specs(params, table)
        return learned_ranges.start(
            functools.partial(self._apply, **kwargs),
            params,
            inputs,
            specs if self._rule == "learned" else None,
            weight_specs=listed_specs(params, specs),
            activations=self._activations,
            calibration=self._calibration,
        )

    def _weight_specs(self, params: Any, table: sites.SiteTable) -> Any:
        spec = self._spec
        if spec is None:
            return paths.map_with_path(lambda path, leaf: optax.MaskedNode(), params)
        if isinstance(spec, Calibration):
            spec = known_specs(spec, params)
        return resolve_specs(
            spec, params, sites=table, required=not self._derived_specs(table)
        )

    def _evaluate(
        self,
        params: Any,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Any,
        ranges: Calibration | None,
        key: jax.Array | None,
    ) -> Any:
        analysis = sites.analyse(self._apply, params, inputs, kwargs)
        calibration = self._calibration if ranges is None else ranges
        pairs = site_specs(self._activations, analysis.table)
        values = ranges_of(calibration, pairs)
        if calibration is not None:
            pairs = {name: pair for name, pair in pairs.items() if name in values}
        is_on = None
        if self._begin_step is not None:
            is_on = jnp.asarray(step) >= self._begin_step
        if self._spec is not None:
            specs = self._weight_specs(params, analysis.table)
            params = self._round_weights(params, specs, ranges, is_on)
        derived = self._derived_specs(analysis.table)
        behind = self._behind.specs(analysis.table)

        def call(use: Use) -> jax.Array:
            def compute(*operands: Any) -> jax.Array:
                given = dataclasses.replace(use, operands=operands)
                rounded = self._round(given, pairs, derived, is_on)
                if use.site.name not in behind:
                    return use.default(*rounded)
                return round_gradients(
                    use.default,
                    rounded,
                    use.site,
                    behind[use.site.name],
                    rounding=self._behind.rounding,
                    key=key,
                    is_on=is_on,
                )

            if use.value is not None:
                # The backward pass needs the rounded input and where it was clipped.
                # Both follow from the input, which is all that is kept.
                compute = jax.checkpoint(compute)
            return compute(*use.operands)

        names = {*pairs, *derived, *behind}
        handler = Handler(call, select=lambda site: site.name in names)
        return interpret.evaluate(analysis, handler, params, inputs, kwargs, values)

    def _derived_specs(self, table: sites.SiteTable) -> dict[str, QuantSpec]:
        """Find the specs of operands that are computed from leaves.

        Rules give one its leaves' spec where they have the same. A calibration rounds
        what is stored, as `execute` runs it.
        """
        found = [
            s for s in table if s.kind == "derived" and s.reachable and not s.parts
        ]
        if self._spec is None or isinstance(self._spec, Calibration):
            return {}
        if isinstance(self._spec, QuantSpec):
            return {site.name: self._spec for site in found}
        tree = dict(table.leaves)
        values = rules.resolve(self._spec, tree)
        by_path = dict(zip(paths.leaf_paths(tree), values, strict=True))
        specs = {s.name: {by_path[path] for path in s.leaf_paths} for s in found}
        return {
            name: spec
            for name, (spec, *others) in specs.items()
            if spec is not None and not others
        }

    def _round(
        self,
        use: Use,
        pairs: dict[str, Pair],
        derived: dict[str, QuantSpec],
        is_on: jax.Array | None,
    ) -> list[Any]:
        site, operands = use.site, list(use.operands)
        for i, spec in enumerate(pairs.get(site.name, (None, None))):
            if spec is not None and is_float(operands[i]):
                q = round_operand(use, i, spec, rule=self._rule)
                operands[i] = _switch(is_on, q, operands[i])
        if site.name in derived and is_float(operands[site.operand]):
            w = operands[site.operand]
            spec = operand_spec(derived[site.name], site.operand_roles[site.operand])
            q = quantized.fake_quantize(w, spec, path=site.name)
            operands[site.operand] = _switch(is_on, q, w)
        return operands

    def _round_weights(
        self, params: Any, specs: Any, ranges: Calibration | None, is_on: Any
    ) -> Any:
        given = (ranges, self._calibration, self._spec)
        found = [c.weights for c in given if isinstance(c, Calibration) and c.weights]
        trained = found[0] if found else {}

        def snap(path: str, w: Any, spec: Any) -> Any:
            if not isinstance(spec, QuantSpec):
                return w
            ends = trained.get(path)
            if ends is None:
                q = quantized.fake_quantize(w, spec, path=path)
            else:
                is_learning = self._rule == "learned"
                q = learned_ranges.round_weight(
                    w, spec, ends, is_learning=is_learning, path=path
                )
            return _switch(is_on, q, w)

        return paths.map_with_path(snap, params, specs)


def _switch(is_on: jax.Array | None, rounded: jax.Array, x: jax.Array) -> jax.Array:
    return rounded if is_on is None else jnp.where(is_on, rounded, x)
