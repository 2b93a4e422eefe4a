"""What is rounded at a site: which operands, by which spec, at which scales."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.quantized import fake_quantize
from jopt.arrays.ranges import Range, Rule, learned_fake_quantize, scale_of
from jopt.arrays.specs import QuantSpec
from jopt.programs.handlers import Use
from jopt.programs.operations import Site
from jopt.programs.sites import SiteTable
from jopt.quantization.roles import operand_spec
from jopt.quantization.specs import nothing_found
from jopt.trees import rules
from jopt.trees.calibration import Calibration, Pair

Activations = (
    QuantSpec
    | Mapping[str, QuantSpec | None]
    | Sequence[tuple[str, QuantSpec | None]]
    | Calibration
    | None
)
_PRODUCTS = ("weight", "derived")


def site_specs(
    activations: Activations, table: SiteTable, *, argument: str = "activations"
) -> dict[str, Pair]:
    """Find the specs of both operands of every site whose inputs are rounded.

    Args:
        activations: one spec, for what meets a parameter; rules from patterns of site
            names (or leaf paths) to specs, which may name products of two activations
            too; what a calibration found; or None.
        table: of the function.
        argument: what errors call `activations`.

    Returns:
        Name to the specs of both operands, None for one that is left alone.

    Raises:
        TypeError: `activations` is none of these.
        ValueError: a rule matches no site, or one that cannot be entered; there is no
            site at all.
    """
    check_activations(activations, argument=argument)
    if activations is None:
        return {}
    products = [s for s in table if s.kind != "gather"]
    if isinstance(activations, Calibration):
        return _known(dict(activations.activation_specs), products)
    if isinstance(activations, QuantSpec):
        chosen = {
            s.name: activations for s in products if s.kind in _PRODUCTS and s.reachable
        }
        if not chosen:
            raise nothing_found(argument, "site to round the input of", table)
    else:
        chosen = _by_rules(activations, products, argument)
        # Rules are checked against names; where there are none, nothing else is said.
        if not products and any(spec is not None for spec in _specs_of(activations)):
            raise nothing_found(argument, "site to round the input of", table)
    sites = {s.name: s for s in products}
    return {name: _pair(sites[name], spec) for name, spec in chosen.items()}


def check_activations(
    given: Any, *, argument: str = "activations", is_measured: bool = True
) -> None:
    """Raise for what does not say how numbers are rounded, whatever the function.

    Args:
        given: by the caller.
        argument: what errors call it.
        is_measured: whether a calibration may say it.

    Raises:
        TypeError: it is nothing that may be given.
    """
    known = (QuantSpec, Mapping, list, tuple, *([Calibration] if is_measured else []))
    if given is not None and not isinstance(given, known):
        found = ", a jopt.Calibration" if is_measured else ""
        got = "a jopt.Calibration" if isinstance(given, Calibration) else repr(given)
        raise TypeError(
            f"{argument} must be a jopt.QuantSpec, rules {{pattern: spec}}{found} or "
            f"None, got {got}; for example jopt.QuantSpec(jopt.formats.int8)"
        )


def require_static(activations: Activations) -> None:
    """Raise if inputs cannot have ranges that are known before they are.

    Args:
        activations: what is rounded.

    Raises:
        ValueError: one of its specs has groups, or a full range.
    """
    for spec in _specs_of(activations):
        if isinstance(spec, QuantSpec) and spec.group_size is not None:
            raise ValueError(
                "activations must have no groups where a calibration or ranges= gives "
                f"their ranges, got {spec}; take a format without groups and "
                "group_size=None, or ranges from each batch"
            )
        if isinstance(spec, QuantSpec) and not spec.is_narrow:
            raise ValueError(
                "activations must have narrow_range=True where a calibration or "
                f"ranges= gives their ranges, which are -t to t, got {spec}; leave it "
                "out, or take ranges from each batch"
            )


def _specs_of(activations: Activations) -> list[Any]:
    if isinstance(activations, Mapping):
        return list(activations.values())
    if isinstance(activations, list | tuple):
        return [spec for _, spec in activations]
    return [activations]


def _pair(site: Site, spec: QuantSpec) -> Pair:
    if site.kind in _PRODUCTS:
        return (None, spec) if site.operand == 0 else (spec, None)
    return spec, spec


def _known(found: dict[str, Pair], products: list[Site]) -> dict[str, Pair]:
    names = {s.name for s in products if s.reachable}
    strangers = sorted(set(found) - names)
    if strangers:
        raise ValueError(
            f"activations must be calibrated on this function, got {strangers} where "
            f"the sites are {sorted(names)}; call jopt.calibrate again"
        )
    return found


def _by_rules(
    activations: Any, products: list[Site], argument: str
) -> dict[str, QuantSpec]:
    """Resolve rules; a later use of a leaf answers to the path of the leaf too."""
    names = {s.name: s.path or s.name for s in products}
    both = sorted({*names, *names.values()})
    resolved = rules.resolve(activations, dict.fromkeys(both, 0), default=_UNMATCHED)
    value = dict(zip(both, resolved, strict=True))
    chosen: dict[str, QuantSpec] = {}
    for site in products:
        spec = value[site.name]
        if spec is _UNMATCHED:
            spec = value[names[site.name]]
        if spec is _UNMATCHED or spec is None:
            continue
        if not isinstance(spec, QuantSpec):
            raise TypeError(
                f"{argument} must give a jopt.QuantSpec or None for {site.name!r}, "
                f"got {spec!r}"
            )
        if not site.reachable:
            raise ValueError(
                f"{argument} must name sites that can be entered, got {site.name!r}, "
                f"which is {site.why_not}; leave it out by a rule with None before"
            )
        chosen[site.name] = spec
    return chosen


_UNMATCHED: Any = object()


def round_operand(
    use: Use, i: int, spec: QuantSpec, *, rule: Rule | None = None
) -> jax.Array:
    """Round one operand of a site, at the range that came with it or at its own.

    Args:
        use: of the site; `use.value` holds the ranges of both operands, or None.
        i: which operand.
        spec: of it.
        rule: how the ends of the range get gradients; None for not at all.

    Returns:
        The rounded operand, of its shape and dtype.
    """
    x, name = use.operands[i], use.site.name
    ends = range_at(use, i)
    roles = use.site.operand_roles[i]
    if ends is None:
        return fake_quantize(x, operand_spec(spec, roles), path=f"input of {name}")
    spec = static_spec(spec)
    if rule is None:
        scale = scale_of(ends, spec, x.ndim)
        return fake_quantize(x, spec, scale=scale, path=f"input of {name}")
    inner = [n for n, role in zip(x.shape, roles, strict=True) if role == "in"]
    return learned_fake_quantize(x, spec, ends, rule, math.prod(inner or x.shape))


def range_at(use: Use, i: int) -> Range | None:
    """Take the range that came with an operand.

    Args:
        use: of the site.
        i: which operand.

    Returns:
        Its range; None where there is none.

    Raises:
        ValueError: it has a range per index of an input of another size.
    """
    ends: Range | None = None if use.value is None else use.value[i]
    if ends is None:
        return None
    shape, x = ends.high.shape, use.operands[i]
    fits = len(shape) == x.ndim and all(
        n in (1, size) for n, size in zip(shape, x.shape, strict=True)
    )
    if shape and not fits:
        raise ValueError(
            f"calibration must be of inputs of this size, got ranges of shape {shape} "
            f"for the input of {use.site.name!r} of shape {x.shape}; calibrate at this "
            "size, or with axis=()"
        )
    return ends


def static_spec(spec: QuantSpec) -> QuantSpec:
    """Resolve the axes of a spec whose range is known beforehand: one, by default."""
    return dataclasses.replace(spec, axis=()) if spec.axis is None else spec


def is_float(x: Any) -> bool:
    """Tell whether an operand can be rounded."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def ranges_of(calibration: Calibration | None, pairs: Mapping[str, Pair]) -> Any:
    """Pick the ranges of the sites whose inputs are rounded.

    Args:
        calibration: what was measured, or None for ranges from each batch.
        pairs: name of a site to its specs.

    Returns:
        Name to a pair of `Range`s.

    Raises:
        ValueError: there is none for a site, and it was not found to be unreached.
    """
    if calibration is None:
        return {}
    missing = set(pairs) - set(calibration.activations) - set(calibration.unreached)
    if missing:
        raise ValueError(
            f"calibration must have ranges for all sites that are rounded, got none for"
            f" {sorted(missing)}; calibrate with the same activations"
        )
    return {
        name: calibration.activations[name]
        for name in pairs
        if name in calibration.activations
    }
