"""Which leaf is quantized how: one spec, or ordered rules from path to spec."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays.specs import QuantSpec, check_spec
from jopt.programs.sites import SiteTable
from jopt.quantization.roles import LeafRoles, leaf_roles, leaf_spec, require_table
from jopt.trees import paths, rules
from jopt.trees.calibration import Calibration

SpecOrRules = (
    QuantSpec | Mapping[str, QuantSpec | None] | Sequence[tuple[str, QuantSpec | None]]
)


def resolve_specs(
    spec_or_rules: SpecOrRules,
    tree: Any,
    *,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
    sites: SiteTable | None = None,
    required: bool = True,
    is_checked: bool = True,
) -> Any:
    """Return a tree of specs, `optax.MaskedNode()` where a leaf is left alone.

    A leaf needs both: to be selected, and a spec that is not None. Stacked axes are
    added to the axes that keep a scale of their own. With `sites`, what multiplies or
    is looked up is selected by default, and the roles of its axes say which of them
    keep scales and which are stacked.

    Raises:
        ValueError: a rule matches nothing, or nothing that is selected by default; a
            spec does not fit its leaf, unless that is checked later, when it is known
            which leaves are left alone; one spec for all finds no leaf in `sites`,
            where that is required.
    """
    leaves, treedef = paths.flatten_with_path(tree)
    if isinstance(spec_or_rules, QuantSpec):
        specs: list[QuantSpec | None] = [spec_or_rules] * len(leaves)
    elif isinstance(spec_or_rules, Mapping | list | tuple):
        specs = rules.resolve(spec_or_rules, tree)
    else:
        raise TypeError(
            "spec_or_rules must be a jopt.QuantSpec or rules {pattern: spec}, got "
            f"{spec_or_rules!r}; for example jopt.QuantSpec(jopt.formats.int8)"
        )
    roles: dict[str, LeafRoles] = {}
    is_default = select is None
    if sites is not None:
        require_table(sites, dict(leaves))
        roles = leaf_roles(sites)
        if is_default:
            select = functools.partial(_multiplies, roles)
    chosen = rules.select_leaves(select, tree, stacked_axes=stacked_axes)
    if is_default:
        # A compressed leaf is not left alone: it is quantized already.
        held = {
            path
            for (path, leaf), keep in zip(leaves, chosen, strict=True)
            if keep or paths.is_whole_leaf(leaf)
        }
        if isinstance(spec_or_rules, QuantSpec):
            if sites is not None and required and leaves and not held:
                kinds = {
                    path: f"{leaf.dtype}, no float"
                    for path, leaf in leaves
                    if path in roles and not jnp.issubdtype(leaf.dtype, jnp.floating)
                }
                raise nothing_found("spec", "leaf to round", sites, kinds)
        else:
            _require_effect(spec_or_rules, leaves, held, sites)
    stacks = rules.stacked_axis_of(stacked_axes, tree)
    found: list[Any] = []
    for (path, leaf), spec, keep, stack in zip(
        leaves, specs, chosen, stacks, strict=True
    ):
        if spec is None or not keep:
            found.append(optax.MaskedNode())
            continue
        if not isinstance(spec, QuantSpec):
            raise TypeError(
                f"spec_or_rules must give a jopt.QuantSpec or None for {path!r}, "
                f"got {spec!r}"
            )
        if path in roles:
            spec = leaf_spec(spec, leaf.ndim, roles[path])
        if stack is not None:
            spec = keep_axis(spec, leaf.ndim, stack)
        if is_checked:
            check_spec(leaf.shape, spec, path=path)
        found.append(spec)
    return treedef.unflatten(found)


def nothing_found(
    argument: str, what: str, sites: SiteTable, kinds: Mapping[str, str] | None = None
) -> ValueError:
    """Return the error that a function has nothing that an argument speaks of.

    Args:
        argument: its name.
        what: what it should find.
        sites: of the function.
        kinds: path to why a leaf that multiplies is nothing to find.

    Returns:
        The error, with the reasons that the table has.
    """
    whys = {**sites.uncovered, **(kinds or {})}
    reasons = [f"{path!r}: {why}" for path, why in whys.items()]
    reasons = reasons or ["leaves are looked up only"]
    shown = [text if len(text) <= 90 else f"{text[:87]}..." for text in reasons[:3]]
    if len(reasons) > 3:
        shown.append(f"and {len(reasons) - 3} more")
    way_out = "print(jopt.sites(apply, params, *inputs)) shows what multiplies"
    if argument != "spec":  # which some callers cannot do without
        way_out = f"pass None as {argument}; {way_out}"
    if sites.activations:
        way_out = f"'activation:.*' as a rule names products of two inputs; {way_out}"
    return ValueError(
        f"{argument} must have at least one {what}, got a function without: "
        f"{', '.join(shown)}; {way_out}"
    )


def _require_effect(
    given: Any, leaves: Any, held: set[str], sites: SiteTable | None
) -> None:
    """Raise for a rule with a spec that matches nothing but leaves that are left alone.

    Those that match more are broad patterns, such as 'layers/.*', and may.
    """
    pairs = given.items() if isinstance(given, Mapping) else given
    for pattern, spec in pairs:
        matched = [(p, leaf) for p, leaf in leaves if re.fullmatch(pattern, p)]
        if spec is None or not matched or any(path in held for path, _ in matched):
            continue
        alone = [f"{path!r} {_why_alone(path, leaf, sites)}" for path, leaf in matched]
        more = [f"and {len(alone) - 3} more"] if len(alone) > 3 else []
        raise ValueError(
            f"rules must give specs to leaves that are quantized, got {pattern!r} for "
            f"{', '.join(alone[:3] + more)}, left alone by default; choose with "
            f"select=jopt.matching({pattern!r}) in jopt.quantize and "
            "jopt.quantize_weights, or leave the rule out"
        )


def _why_alone(path: str, leaf: Any, sites: SiteTable | None) -> str:
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
        return f"({getattr(leaf, 'dtype', type(leaf).__name__)})"
    if sites is None:
        return f"(of shape {leaf.shape}, without two axes to multiply by)"
    return f"({sites.uncovered.get(path, 'looked up as single numbers')})"


def known_specs(calibration: Calibration, params: Any) -> dict[str, QuantSpec | None]:
    """Turn the specs that a calibration carries into rules for these params.

    Raises:
        ValueError: a spec is for no leaf of these.
    """
    names = set(paths.leaf_paths(params))
    strangers = [path for path, _ in calibration.weight_specs if path not in names]
    if strangers:
        raise ValueError(
            f"calibration must be of these params, got specs for {strangers}, which "
            f"are none of {sorted(names)[:5]}; call jopt.calibrate again"
        )
    return {re.escape(path): spec for path, spec in calibration.weight_specs}


def listed_specs(params: Any, specs: Any) -> tuple[tuple[str, QuantSpec], ...]:
    """List the paths of the leaves with a spec, and the specs."""
    found = paths.flatten_with_path(params)[1].flatten_up_to(specs)
    return tuple(
        (path, spec)
        for path, spec in zip(paths.leaf_paths(params), found, strict=True)
        if isinstance(spec, QuantSpec)
    )


def _multiplies(roles: Mapping[str, LeafRoles], path: str, leaf: Any) -> bool:
    """Select float leaves that are no compressed arrays already."""
    if path not in roles or paths.is_whole_leaf(leaf):
        return False
    return roles[path].is_matrix and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def keep_axis(spec: QuantSpec, ndim: int, axis: int) -> QuantSpec:
    """Return `spec` with a scale of its own along `axis`, whatever else it keeps."""
    axis = axis % ndim
    if spec.axis is None:
        layer = [a for a in range(ndim) if a != axis]
        kept = {layer[-1]} if len(layer) >= 2 else set()
    else:
        axes = (spec.axis,) if isinstance(spec.axis, int) else spec.axis
        kept = {a % ndim for a in axes}
    return dataclasses.replace(spec, axis=tuple(sorted(kept | {axis})))


def check_trainable(specs: Any, *, learned: bool, bits: Any) -> None:
    """Raise if a spec cannot have learned scales or a width that changes."""
    for path, spec in paths.leaves_with_path(specs):
        is_free = spec.format.group_size is None and spec.is_narrow
        if learned and not (spec.symmetric and is_free):
            raise ValueError(
                "scales='learned' needs a symmetric format with free, positive scales "
                f"for {path!r}, got {spec}; use scales='moving'"
            )
        if bits is not None and spec.format.kind != "integer":
            raise ValueError(
                f"bits_schedule needs an integer format for {path!r}, got {spec}; "
                "give this leaf an integer format or no schedule"
            )


def require_zeros(inner_state: Any, specs: Any) -> None:
    """Raise if weights are pruned and then snapped to a grid without a zero.

    Args:
        inner_state: of the transformation that steps latents.
        specs: tree of specs, `optax.MaskedNode()` where nothing is quantized.

    Raises:
        ValueError: a leaf has a mask and a format without a zero.
    """
    without = {
        path: spec
        for path, spec in paths.leaves_with_path(specs)
        if isinstance(spec, QuantSpec)
        and spec.format.kind == "codebook"
        and 0.0 not in spec.format.values
    }
    for path in masks_by_path(inner_state) if without else ():
        if path in without:
            raise ValueError(
                f"spec_or_rules must give a format with a zero to {path!r}, whose "
                f"weights are pruned inside, got {without[path]}, which has no zero; "
                "take jopt.formats.ternary"
            )


def masks_by_path(inner_state: Any) -> dict[str, list[jax.Array]]:
    """Find the masks of leaves by the name of the field, `masks`.

    Args:
        inner_state: of any transformation.

    Returns:
        Path to masks, packed or not, of the leaves that have any.
    """
    found: dict[str, list[jax.Array]] = {}
    for _, masks in optax.tree.get_all_with_path(inner_state, "masks"):
        for path, mask in paths.leaves_with_path(masks):
            if getattr(mask, "dtype", None) in (jnp.bool_, jnp.uint8):
                found.setdefault(path, []).append(mask)
    return found
