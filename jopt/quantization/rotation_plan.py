"""Which products are rotated, and how: with each other, in the weights or as they run.

Sites that read one input share one rotation, and so do those that read one leaf: they
are one group. Its rotation goes into the outputs of the product before, where
`programs.producers` proves that there is one and nothing else sees it; else it stays in
the program, before the input of each site. What cannot be rotated is listed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.arrays.hadamard import block_size
from jopt.programs import passes
from jopt.programs.layouts import Layout
from jopt.programs.operations import Site
from jopt.programs.probes import is_met
from jopt.programs.producers import Producer, contracted_axes, find_producer
from jopt.programs.sites import Analysis
from jopt.programs.sources import Sources
from jopt.programs.spread import as_automatic, automatic, on_every_device, read
from jopt.programs.targets import Target, find_targets
from jopt.programs.weights import parts
from jopt.trees import rules

_PRIMITIVES = ("dot_general", "ragged_dot", "ragged_dot_general")


class Group(NamedTuple):
    """Targets whose inputs are rotated alike.

    Attributes:
        targets: positions in the plan.
        sites: that read them, in the order of the program.
        sizes: of the contracted axes.
        producer: position of the target whose outputs take the rotation of the input;
            None where it stays in the program.
        biases: positions of the leaves that take it too.
    """

    targets: tuple[int, ...]
    sites: tuple[Site, ...]
    sizes: tuple[int, ...]
    producer: int | None = None
    biases: tuple[int, ...] = ()


class Plan(NamedTuple):
    """What is rotated.

    Attributes:
        targets: all matrices, rotated or not.
        groups: of those that are.
        left: path to the reason why it is left alone.
    """

    targets: tuple[Target, ...]
    groups: tuple[Group, ...]
    left: Mapping[str, str]


def make_plan(analysis: Analysis, params: Any, select: rules.Select) -> Plan:
    """Decide what to rotate.

    Args:
        analysis: of the function.
        params: the parameters.
        select: which leaves, as for `rotate`.

    Returns:
        The plan.

    Raises:
        ValueError: as `find_targets`.
    """
    table = analysis.table
    goals = [True] * len(jax.tree.leaves(params))
    found, left = find_targets(table, params, goals, select, without_goal="")
    # What is not rotated itself may still take the rotation of what reads it.
    every, _ = find_targets(
        table, params, goals, lambda path, leaf: _is_matrix(leaf), without_goal=""
    )
    reasons = {t.leaf: _reason(analysis, t.path, t.leaf, found) for t in found}
    # Joined leaves meet one input: all of them, or none.
    for _ in found:
        for target in found:
            joined = {p.view.leaf for site, _ in target.uses for p in parts(site)}
            odd = [leaf for leaf in joined if reasons.get(leaf, "it is") is not None]
            if reasons[target.leaf] is None and odd:
                reasons[target.leaf] = "it is joined with a leaf that is left alone"
    left = dict(left)
    left |= {t.path: why for t in found if (why := reasons[t.leaf]) is not None}
    chosen = [t for t in found if reasons[t.leaf] is None]
    others = [t for t in every if t.leaf not in {c.leaf for c in chosen}]
    targets = (*chosen, *others)
    groups = _groups(analysis, targets, len(chosen))
    return Plan(targets, tuple(groups), left)


def sizes_of(site: Site) -> tuple[int, ...]:
    """List the sizes of the contracted axes of a product, in the parameter's order."""
    shape = site.in_shapes[site.operand].shape
    return tuple(shape[axis] for axis, _ in contracted_axes(site))


def find_met(plan: Plan, params: Any, seen: Mapping[str, Any]) -> list[bool]:
    """Tell of each target of a plan whether its matrices are what inputs met.

    Args:
        plan: with targets.
        params: the parameters.
        seen: what a pass over them gave.

    Returns:
        A bool per target.
    """
    leaves = jax.tree.leaves(params)
    return [
        _is_met(
            as_automatic(leaves[target.leaf]),
            on_every_device(passes.of_target(target, seen, "seen")),
            target.layout,
        )
        for target in plan.targets
    ]


@automatic()
def _is_met(leaf: jax.Array, seen: jax.Array, layout: Layout) -> bool:
    pairs = zip(seen, read(leaf, layout=layout), strict=True)
    return all(bool(is_met(*pair)) for pair in pairs)


def _is_matrix(leaf: Any) -> bool:
    is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return is_float and hasattr(leaf, "devices") and leaf.ndim >= 2


def _reason(
    analysis: Analysis, path: str, leaf: int, found: Sequence[Target]
) -> str | None:
    """Say why a leaf cannot be rotated, if it cannot."""
    reason = _obstacle(analysis, path, leaf, found)
    if reason is not None:
        return reason
    sizes = next(sizes_of(t.uses[0][0]) for t in found if t.leaf == leaf)
    if all(block_size(n) == 1 for n in sizes):
        return f"{math.prod(sizes)} inputs, an odd number, have no Hadamard matrix"
    return None


def _obstacle(
    analysis: Analysis, path: str, leaf: int, found: Sequence[Target]
) -> str | None:
    """Say why a leaf must stay what it is, whatever the sizes."""
    table = analysis.table
    uses = [site for t in found if t.leaf == leaf for site, _ in t.uses]
    known = {site.name for site in uses}
    others = [s.name for s in table if leaf in s.leaves and s.name not in known]
    others += table.other_uses.get(path, ())
    if others:
        return f"also used by {', '.join(others)}, which would see it rotated"
    strange = next((s for s in uses if s.primitive not in _PRIMITIVES), None)
    if strange is not None:
        return f"{strange.primitive} reads it, not a product of matrices"
    if len({sizes_of(site) for site in uses}) > 1:
        return "its sites contract it along different axes"
    inputs = [s.in_shapes[1 - s.operand].dtype for s in uses]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in inputs):
        return "its inputs are no floats"
    return None


def _groups(
    analysis: Analysis, targets: Sequence[Target], num_chosen: int
) -> list[Group]:
    """Put what shares inputs or leaves together."""
    sources = Sources(analysis.traced.body)
    members: list[tuple[set[Any], list[int]]] = []
    for i, target in enumerate(targets[:num_chosen]):
        shared: set[Any] = {("leaf", target.leaf)}
        for site, _ in target.uses:
            shared |= {("site", site.name), ("input", sources.input_of(site))}
        mine = [i]
        for other in [m for m in members if m[0] & shared]:
            members.remove(other)
            shared |= other[0]
            mine = other[1] + mine
        members.append((shared, mine))
    groups = [_group(analysis, targets, sorted(mine)) for _, mine in members]
    return sorted(groups, key=lambda group: min(group.targets))


def _group(analysis: Analysis, targets: Sequence[Target], mine: list[int]) -> Group:
    names = {site.name for i in mine for site, _ in targets[i].uses}
    sites = tuple(site for site in analysis.table if site.name in names)
    group = Group(tuple(mine), sites, sizes_of(sites[0]))
    products = [site for site in analysis.table if site.reachable and site.is_weight]
    leaves = len(analysis.table.leaves)
    producer = find_producer(analysis.traced.body, sites, products, leaves)
    position = None if producer is None else _position(producer, analysis, targets)
    if producer is None or position is None:
        return group
    return group._replace(producer=position, biases=producer.biases)


def _position(
    producer: Producer, analysis: Analysis, targets: Sequence[Target]
) -> int | None:
    """Find the target whose outputs a producer computes, if nothing else reads it."""
    for i, target in enumerate(targets):
        (site, part), *others = target.uses
        if site.key != producer.key:
            continue
        same = [t for t in targets if t.leaf == target.leaf]
        # Its outputs take a rotation though its inputs may be of an odd number.
        is_free = _obstacle(analysis, target.path, target.leaf, same) is None
        whole = part.axis is None and target.layout.is_whole
        return i if is_free and whole and not others else None
    return None
