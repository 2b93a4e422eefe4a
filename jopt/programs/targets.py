"""Which matrices of which leaves an algorithm on columns works on, and which it leaves.

A target is one leaf, or a part of it, that all of its products read as the same
matrices. What is left alone is never skipped in silence: it is listed with the reason.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.programs.handlers import is_compressed
from jopt.programs.layouts import Layout
from jopt.programs.operations import Site
from jopt.programs.sites import SiteTable
from jopt.programs.weights import LayoutError, Part, layered, layout, parts
from jopt.trees import paths, rules


class Target(NamedTuple):
    """Matrices of one leaf, and where they multiply.

    Attributes:
        name: of the first site, and of the leaf where others are part of it too.
        path: of the leaf.
        leaf: its position in `jax.tree.leaves(params)`.
        layout: of its matrices.
        uses: the sites that multiply by them, and as which part of their operand.
        goal: what is to become of them: a sparsity and a pattern, a spec.
    """

    name: str
    path: str
    leaf: int
    layout: Layout
    uses: tuple[tuple[Site, Part], ...]
    goal: Any

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
    table: SiteTable,
    params: Any,
    goals: Sequence[Any],
    select: rules.Select,
    *,
    without_goal: str,
) -> tuple[list[Target], dict[str, str]]:
    """Choose the matrices to work on.

    Args:
        table: of the sites.
        params: the parameters.
        goals: one per leaf; None for those that a rule leaves alone.
        select: as `rules.select_leaves` takes it; None for float leaves that only
            multiply, of two axes or more not counting stacked ones.
        without_goal: why leaves without a goal are left alone.

    Returns:
        The targets, in the order of leaves, and path to reason of what is left alone.

    Raises:
        ValueError: a leaf is compressed, or a selected one no float array.
    """
    leaves = paths.leaves_with_path(params)
    chosen = rules.select_leaves(select, params)
    targets: list[Target] = []
    left: dict[str, str] = {}
    for i, (path, leaf) in enumerate(leaves):
        if is_compressed(leaf) and (select is None or chosen[i]):
            kind = type(leaf).__name__
            raise ValueError(
                f"params must hold plain arrays, got {kind} at {path!r}; start from "
                "the floats, or leave it out with select"
            )
        if not chosen[i]:
            continue
        if goals[i] is None:
            left[path] = without_goal
            continue
        found = _of_leaf(table, i, path, goals[i], is_default=select is None)
        if isinstance(found, str):
            left[path] = found
        else:
            targets += found
    return _named_apart(targets), left


def _named_apart(targets: list[Target]) -> list[Target]:
    """Add the paths of leaves to the name of a site that several are part of."""
    counts = Counter(target.name for target in targets)
    return [
        target._replace(name=f"{target.name} ({target.path})")
        if counts[target.name] > 1
        else target
        for target in targets
    ]


def _of_leaf(
    table: SiteTable, i: int, path: str, goal: Any, *, is_default: bool
) -> list[Target] | str:
    """Find the targets of a leaf, or the reason why there are none."""
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
        return f"also {' and '.join(kinds)}; select it to take it all the same"
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


def require_finite(targets: Sequence[Target], leaves: Sequence[Any]) -> None:
    """Raise for weights that no score and no grid can order.

    Args:
        targets: what is worked on.
        leaves: of the params.

    Raises:
        ValueError: a leaf holds NaN or infinity.
    """
    for target in targets:
        if not _is_finite(leaves[target.leaf]):
            raise ValueError(
                f"params must be finite, got NaN or infinity in {target.path!r}; "
                "repair it, or leave it out with select"
            )


def blame(params: Any) -> str:
    """Say where to look for what made numbers in a program NaN or infinite.

    Args:
        params: of the program; compressed leaves are not looked into.

    Returns:
        The way out, for an error.
    """
    for path, leaf in paths.leaves_with_path(params):
        is_float = not is_compressed(leaf) and jnp.issubdtype(
            jnp.result_type(leaf), jnp.inexact
        )
        if is_float and not _is_finite(leaf):
            return f"look at {path!r} of the params, which is not finite"
    return "look at the batches"


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()
