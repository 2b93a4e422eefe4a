"""Which matrices of which leaves one-shot pruning works on, and which it leaves alone.

A target is one leaf, or a part of it, that all of its products read as the same
matrices. What is left alone is never skipped in silence: it is listed with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jopt.arrays.patterns import NM, Pattern, Unstructured
from jopt.programs.handlers import is_compressed
from jopt.programs.layouts import Layout
from jopt.programs.operations import Site
from jopt.programs.sites import SiteTable
from jopt.programs.weights import LayoutError, Part, layered, layout, parts
from jopt.trees import paths, rules

_UNSTRUCTURED = Unstructured()


class Goal(NamedTuple):
    """How sparse a leaf is to be; without a sparsity, as its pattern says."""

    sparsity: float | None
    pattern: Pattern


class Target(NamedTuple):
    """Matrices of one leaf, and where they multiply.

    Attributes:
        name: of the first site.
        path: of the leaf.
        leaf: its position in `jax.tree.leaves(params)`.
        layout: of its matrices.
        uses: the sites that multiply by them, and as which part of their operand.
        goal: how sparse they are to be.
    """

    name: str
    path: str
    leaf: int
    layout: Layout
    uses: tuple[tuple[Site, Part], ...]
    goal: Goal

    @property
    def is_stacked(self) -> bool:
        """Whether the leaf stacks layers."""
        return any(self.own_layers(*self.uses[0]))

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer: of the leaf, or of the matrices in a part of it."""
        if not self.layout.is_whole:
            return self.layout.sizes[1:]
        stacked = self.layout.stacked_axes
        return tuple(n for a, n in enumerate(self.layout.shape) if a not in stacked)

    def own_layers(self, site: Site, part: Part) -> tuple[bool, ...]:
        """Say which leading axes of a site's statistics are layers of the leaf."""
        return layered(site, part.view, self.layout.shape)

    def layer_name(self, layer: int) -> str:
        """Name one of the layers."""
        return f"{self.name}[{layer}]" if self.is_stacked else self.name


def find_targets(
    table: SiteTable, params: Any, goals: Sequence[Goal | None], select: rules.Select
) -> tuple[list[Target], dict[str, str]]:
    """Choose the matrices to prune.

    Args:
        table: of the sites.
        params: the parameters.
        goals: one per leaf; None for those that a rule leaves alone.
        select: as `rules.select_leaves` takes it; None for float leaves that only
            multiply, of two axes or more not counting stacked ones.

    Returns:
        The targets, in the order of leaves, and path to reason of what is left alone.

    Raises:
        ValueError: a leaf is compressed, a selected one no float array, or its inputs
            do not divide into the groups of its pattern.
    """
    leaves = paths.leaves_with_path(params)
    chosen = rules.select_leaves(select, params)
    targets: list[Target] = []
    left: dict[str, str] = {}
    for i, (path, leaf) in enumerate(leaves):
        if is_compressed(leaf) and (select is None or chosen[i]):
            kind = type(leaf).__name__
            raise ValueError(
                f"params must hold plain arrays, got {kind} at {path!r}; prune "
                "before you quantize, or leave it out with select"
            )
        if not chosen[i]:
            continue
        found = _of_leaf(table, i, path, goals[i], is_default=select is None)
        if isinstance(found, str):
            left[path] = found
        else:
            targets += found
    for target in targets:
        _check_groups(target)
    return targets, left


def _of_leaf(
    table: SiteTable, i: int, path: str, goal: Goal | None, *, is_default: bool
) -> list[Target] | str:
    """Find the targets of a leaf, or the reason why there are none."""
    if goal is None:
        return "no rule gives it a sparsity"
    consumers = [site for site in table if i in site.leaves]
    uses = [
        (site, part)
        for site in consumers
        if site.reachable and site.kind != "gather"
        for part in parts(site)
        if part.view.leaf == i
    ]
    known = {site.name for site, _ in uses}
    if not uses:
        lookup = next((s for s in consumers if s.kind == "gather"), None)
        unread = next((s for s in consumers if s.kind == "derived"), None)
        if lookup is not None:
            return "it is looked up, not multiplied by"
        if unread is not None and unread.reachable:
            return f"computed with before it reaches {unread.name}"
        return table.uncovered.get(path, "no product reads it")
    lookups = [s.name for s in consumers if s.kind == "gather"]
    others = [s.name for s in consumers if s.name not in (*known, *lookups)]
    others += table.other_uses.get(path, ())
    if (lookups or others) and is_default:
        kinds = ["looked up"] * bool(lookups)
        kinds += [f"used by {', '.join(others)}"] * bool(others)
        return f"also {' and '.join(kinds)}; select it to prune it all the same"
    try:
        layouts = [
            layout(site, table.leaves[path].shape, view=part.view)
            for site, part in uses
        ]
    except LayoutError as error:
        return str(error)
    if is_default and len(layouts[0].shape) - len(layouts[0].stacked_axes) < 2:
        return "a vector in each layer"
    groups: dict[Layout, list[tuple[Site, Part]]] = {}
    for found, use in zip(layouts, uses, strict=True):
        groups.setdefault(found, []).append(use)
    distinct = list(groups)
    for k, one in enumerate(distinct):
        for other in distinct[:k]:
            if one.overlaps(other):
                names = [groups[x][0][0].name for x in (other, one)]
                return f"{' and '.join(names)} read it as different matrices"
    return [
        Target(group[0][0].name, path, i, found, tuple(group), goal)
        for found, group in groups.items()
    ]


def _check_groups(target: Target) -> None:
    pattern, columns = target.goal.pattern, target.layout.sizes[2]
    if isinstance(pattern, NM) and columns % pattern.m:
        raise ValueError(
            f"pattern {pattern} must divide the inputs of every leaf into groups of "
            f"{pattern.m}, got {columns} inputs at {target.path!r}; leave it out with "
            "select, or give it another pattern by a rule"
        )


def resolve_goals(sparsity: Any, pattern: Any, params: Any) -> list[Goal | None]:
    """Say how sparse each leaf is to be.

    Args:
        sparsity: a fraction, None for N:M, or rules `{path pattern: fraction or None}`.
        pattern: one, or rules `{path pattern: pattern or None}`; leaves that no rule
            matches are unstructured.
        params: the parameters.

    Returns:
        A goal per leaf, None for those that a rule leaves alone.

    Raises:
        TypeError: a pattern is none of `Unstructured()` and `NM(n, m)`, or a sparsity
            is no number.
        ValueError: a sparsity is missing, out of [0, 1], or given beside N:M.
    """
    names = paths.leaf_paths(params)
    wanted = _per_leaf(sparsity, params, None)
    patterns = _per_leaf(pattern, params, _UNSTRUCTURED)
    for found in (*_values(pattern), *patterns):
        if found is not None:
            _check_pattern(found)
    for found in _values(sparsity):
        if found is not None:
            _check_sparsity(found)
    for found in () if _is_rules(pattern) else (pattern,):
        _check_pair(sparsity, found)
    goals: list[Goal | None] = []
    for path, own, form in zip(names, wanted, patterns, strict=True):
        if form is None or (own is None and not isinstance(form, NM)):
            goals.append(None)
        elif isinstance(form, NM):
            if own is not None and _is_rules(sparsity):
                raise ValueError(
                    f"sparsity must be None where the pattern is {form}, got {own} at "
                    f"{path!r}; give one of the two rules None there"
                )
            goals.append(Goal(None, form))
        else:
            goals.append(Goal(float(own), form))
    return goals


def _check_pair(sparsity: Any, pattern: Any) -> None:
    """Raise if one pattern for all and the sparsity do not go together."""
    if isinstance(pattern, NM) and sparsity is not None:
        raise ValueError(
            f"sparsity must be None for {pattern}, got {sparsity!r}; the pattern fixes "
            f"it at {pattern.m - pattern.n} of {pattern.m}"
        )
    if not isinstance(pattern, NM) and sparsity is None:
        raise ValueError(
            f"sparsity must be given for {pattern}, got None; 50 % of zeros is 0.5"
        )


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, Unstructured | NM):
        raise TypeError(
            "pattern must be jopt.Unstructured(), jopt.NM(n, m) or rules of them, got "
            f"{pattern!r}"
        )
    if isinstance(pattern, NM) and pattern.axis != -2:
        raise ValueError(
            f"pattern {pattern} must leave its axis out, got axis={pattern.axis}: N:M "
            "runs along the inputs of each site"
        )


def _check_sparsity(sparsity: Any) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(
            "sparsity must be a number or rules {path pattern: number}, got "
            f"{sparsity!r}"
        )
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(
            f"sparsity must be a fraction in [0, 1], got {sparsity}; 50 % of zeros is "
            "0.5"
        )


def _is_rules(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _values(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return [own for _, own in value] if _is_rules(value) else [value]


def _per_leaf(value: Any, params: Any, default: Any) -> list[Any]:
    if _is_rules(value):
        return rules.resolve(value, params, default=default)
    return [value] * len(paths.leaf_paths(params))
