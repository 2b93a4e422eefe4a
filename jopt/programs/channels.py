"""Which leaves can exchange factors per channel without changing the function.

    x = relu(z W + b),   y = x V:      (W / s, b / s, s V) computes the same y

for every s > 0 with one factor per channel of x. `find_groups` scales one leaf, follows
what is scaled through the program, and keeps what ends well: every value that is scaled
either passes its factors on (relu, pooling, reshapes, a gate, attention over values) or
is multiplied by a weight that can take them back. What is added on the way must be
scaled too, so biases join in. Whatever is not listed here ends it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jopt.programs import bodies, channel_rules, compat, matching, view_rules
from jopt.programs.channel_rules import Stop
from jopt.programs.flows import Flow, Key
from jopt.programs.matching import Link, NoMatchError
from jopt.programs.operations import Site
from jopt.programs.sites import Analysis
from jopt.programs.views import REPEATED, Atom, View
from jopt.trees import paths


class Group(NamedTuple):
    """Channels that can be scaled.

    Attributes:
        size: the number of factors.
        source: the site whose outputs they are; None for the leaf of a norm.
        made: links of the leaves to be multiplied by factors, the first of the source,
            then those that are added.
        read: links of the leaves to be divided by them.
        sites: names of the sites that read the channels.
    """

    size: int
    source: str | None
    made: tuple[Link, ...]
    read: tuple[Link, ...]
    sites: tuple[str, ...]


class NeedsLeaf(Exception):
    """A leaf is added to what is scaled, and must be scaled too."""

    def __init__(self, leaf: int, view: View) -> None:
        super().__init__(leaf, view)
        self.leaf, self.view = leaf, view


def find_groups(analysis: Analysis, params: Any) -> tuple[list[Group], dict[str, str]]:
    """Find all channels that can be scaled.

    Args:
        analysis: of the function.
        params: its parameters.

    Returns:
        The groups, in the order of the program, those of norms last; and path of a leaf
        that multiplies, or scales, to why its outputs cannot be scaled.
    """
    named = paths.leaves_with_path(params)
    shapes = [np.shape(leaf) for _, leaf in named]
    groups, reasons = [], {}
    products = [s for s in analysis.table if s.kind == "weight" and s.view is not None]
    starts: dict[int, Site | None] = {}
    for site in products:
        assert site.view is not None
        starts.setdefault(site.view.leaf, site)
    for i, (path, leaf) in enumerate(named):
        uses = analysis.table.other_uses.get(path, ())
        if i not in starts and "mul" in uses and jnp.ndim(leaf) > 0:
            starts[i] = None
    for i, start in starts.items():
        path, leaf = named[i]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        try:
            groups.append(_group(analysis, shapes, i, start))
        except (Stop, NoMatchError) as reason:
            reasons[path] = str(reason)
    return groups, reasons


def output_factors(
    shape: Sequence[int], site: Site | None
) -> tuple[View, tuple[int, ...]]:
    """View a leaf as scaled along all of its axes but those that a site contracts.

    Args:
        shape: of the leaf.
        site: that multiplies by it; None for all axes.

    Returns:
        The view, and the shape of the channels.
    """
    roles = {} if site is None else site.roles
    kept = tuple(1 if roles.get(a) == "in" else n for a, n in enumerate(shape))
    dims = tuple(
        () if n == 1 else (Atom(axis if m == n else REPEATED, n),)
        for axis, (n, m) in enumerate(zip(shape, kept, strict=True))
    )
    return View(-1, len(shape), dims, (0,) * len(shape)), kept


def _group(
    analysis: Analysis, shapes: Sequence[tuple[int, ...]], leaf: int, site: Site | None
) -> Group:
    if site is not None and "mixed" in site.roles.values():
        raise Stop("an axis of it is contracted in part")
    first, shape = output_factors(shapes[leaf], site)
    seeds = {leaf: first}
    while True:
        walk = Follow(analysis, shapes, seeds, shape)
        try:
            walk.run()
            break
        except NeedsLeaf as need:
            seeds[need.leaf] = need.view
    if not walk.read:
        raise Stop("no product reads its outputs")
    walk.check()
    made = [matching.link_whole(view, shape, i, shapes[i]) for i, view in seeds.items()]
    size = int(np.prod(shape))
    name = None if site is None else site.name
    return Group(size, name, tuple(made), tuple(walk.read.values()), tuple(walk.sites))


class Follow:
    """Follows factors from leaves through a program.

    With `only` a site, no further than to what is added to its results.

    Attributes:
        read: leaf to the link of what takes the factors back.
        sites: names of the sites that do.
    """

    def __init__(
        self,
        analysis: Analysis,
        shapes: Sequence[tuple[int, ...]],
        seeds: Mapping[int, View],
        shape: tuple[int, ...],
        *,
        only: Site | None = None,
    ) -> None:
        self._analysis = analysis
        self._shapes = shapes
        self._seeds = seeds
        self._shape = shape
        self._only = only
        self._key = None if only is None else only.key
        self._sites = {site.key: site for site in analysis.table}
        self._zeros: set[Any] = set()
        self.read: dict[int, Link] = {}
        self.sites: dict[str, None] = {}

    def run(self) -> None:
        """Follow them to the end.

        Raises:
            Stop: they cannot be passed on.
            NoMatchError: a leaf cannot hold them.
            NeedsLeaf: a further leaf must be scaled.
        """
        body = self._analysis.traced.body
        given = [self._seeds.get(i) for i in range(len(body.invars))]
        if any(self._body(body, given, ())):
            raise Stop("it is part of what the function returns")

    def check(self) -> None:
        """Raise if a leaf that takes factors back is used anywhere else."""
        table = self._analysis.table
        names = list(table.leaves)
        for leaf in self.read:
            sites = {site.name for site in table if leaf in site.leaves}
            if leaf in self._seeds or not sites <= set(self.sites):
                raise Stop(f"{names[leaf]!r} multiplies something else too")
            if names[leaf] in table.other_uses:
                uses = ", ".join(table.other_uses[names[leaf]])
                raise Stop(f"{names[leaf]!r} is used by {uses} too")

    def _body(
        self, body: bodies.Body, operands: Sequence[View | None], key: Key
    ) -> list[View | None]:
        env: dict[Any, View] = {}
        for var, view in zip(body.invars, operands, strict=True):
            if view is not None:
                env[var] = view
        for i, eqn in enumerate(body.eqns):
            given = [self._of(env, var) for var in eqn.invars]
            if not any(given):
                if eqn.primitive.name in channel_rules.COPIES and self._is_zero(
                    eqn.invars[0]
                ):
                    self._zeros.add(eqn.outvars[0])
                continue
            results = self._eqn(eqn, given, key, i)
            for var, result in zip(eqn.outvars, results, strict=True):
                if result is not None:
                    env[var] = matching.canonical(result)
        return [self._of(env, var) for var in body.outvars]

    def _is_zero(self, var: Any) -> bool:
        """Tell whether a value is known to be 0, which no factor changes."""
        if isinstance(var, compat.Literal):
            return bool(np.all(np.asarray(var.val) == 0))
        return var in self._zeros

    @staticmethod
    def _of(env: Mapping[Any, View], var: Any) -> View | None:
        return None if isinstance(var, compat.Literal) else env.get(var)

    def _eqn(
        self, eqn: Any, given: list[View | None], key: Key, i: int
    ) -> Sequence[View | None]:
        inner = compat.control(eqn)
        place = (*key, i)
        if isinstance(inner, bodies.Inner | bodies.Remat | bodies.CustomRule):
            for var, operand in zip(inner.body.invars, eqn.invars, strict=True):
                self._zeros.discard(var)  # the same body may be called elsewhere
                if self._is_zero(operand):
                    self._zeros.add(var)
            return self._body(inner.body, given, place)
        if isinstance(inner, bodies.Scan):
            return self._scan(inner, given, place)
        name = eqn.primitive.name
        position = next(i for i, view in enumerate(given) if view is not None)
        view = given[position]
        assert view is not None
        if inner is not None:
            raise Stop(f"it enters a {name}")
        is_plain = (
            name in view_rules.SAME or name in channel_rules.PLAIN or place == self._key
        )
        if self._only is not None and not is_plain:
            raise Stop(f"{name} comes before anything is added")
        if name in view_rules.SAME:
            for var in eqn.outvars:
                if not jnp.issubdtype(var.aval.dtype, jnp.floating):
                    raise Stop("it becomes an integer")
            return given if len(eqn.outvars) > 1 else [view]
        if name in ("dot_general", "conv_general_dilated"):
            if None not in given[:2]:
                raise Stop("it is multiplied by itself")
            result = channel_rules.multiplied(eqn, position, view)
            if result is None:
                self._absorb(place, eqn, position, view)
            return [result]
        if name in channel_rules.VIEWS:
            return channel_rules.viewed(eqn, position, view, len(given))
        if name in channel_rules.SUMS:
            return [channel_rules.broadcast(self._sum(eqn, given, key), eqn)]
        if name in channel_rules.COMPARISONS:
            self._sum(eqn, given, key)
            return [None]
        if name == "sign":
            return [None]
        is_product = name == "mul" and given.count(None) == 1
        if is_product or (name == "div" and given[1] is None):
            return [channel_rules.broadcast(view, eqn)]
        found_dims = channel_rules.reduced(eqn, view)
        if found_dims is None:
            raise Stop(f"{name} does not pass factors on")
        return [dataclasses.replace(view, dims=found_dims)]

    def _sum(self, eqn: Any, given: list[View | None], key: Key) -> View:
        """Factors must be the same on all that is added, chosen from or compared."""
        start = 1 if eqn.primitive.name == "select_n" else 0
        if start and given[0] is not None:
            raise Stop("it decides a choice")
        known = [v for v in given if v is not None]
        view = known[0]
        if any(
            channel_rules.channels_of(v) != channel_rules.channels_of(view)
            for v in known
        ):
            raise Stop(f"{eqn.primitive.name} joins different channels")
        for operand, own in list(zip(eqn.invars, given, strict=True))[start:]:
            if own is None and not self._is_zero(operand):
                self._add(eqn, operand, view, key)
        return view

    def _add(self, eqn: Any, operand: Any, view: View, key: Key) -> None:
        """Scale what is added, if it is a leaf."""
        name = eqn.primitive.name
        flow = self._flow(operand, key)
        if name not in ("add", "sub", "add_any") or flow is None or flow.view is None:
            what = "is not scaled" if self._only is None else "is no leaf"
            raise Stop(f"{name} joins it with what {what}")
        leaf = flow.view.leaf
        if leaf in self._seeds or len(flow.view.dims) != len(view.dims):
            raise Stop(f"{name} joins it with what has other channels")
        pairs = matching.pair_loops(view, flow.view)
        for a, b in zip(view.dims, flow.view.dims, strict=True):
            pairs += matching.pair(a, b)
        shape = self._shapes[leaf]
        raise NeedsLeaf(leaf, matching.spread(pairs, view, flow.view, shape))

    def _flow(self, var: Any, key: Key) -> Flow | None:
        if isinstance(var, compat.Literal):
            return None
        return self._analysis.flows[key].get(var)

    def _scan(
        self, inner: bodies.Scan, given: list[View | None], place: Key
    ) -> list[View | None]:
        first = inner.num_consts + inner.num_carry
        if any(given[inner.num_consts : first]):
            raise Stop("it is carried through a loop")
        xs = [
            None if v is None else channel_rules.unstacked(v, place)
            for v in given[first:]
        ]
        found = self._body(inner.body, [*given[:first], *xs], place)
        if any(found[: inner.num_carry]):
            raise Stop("it is carried through a loop")
        return [
            None if v is None else channel_rules.stacked(v, place, inner.length)
            for v in found
        ]

    def _absorb(self, place: Key, eqn: Any, i: int, view: View) -> None:
        """Let the weight of a site take back the factors of its input."""
        if self._only is not None:
            raise Stop("it is multiplied before anything is added")
        site = self._sites.get(place)
        flow = self._flow(eqn.invars[1 - i], place[:-1])
        if site is None or flow is None or flow.view is None or site.parts:
            raise Stop("it is multiplied by what is no leaf")
        pairs = matching.pair_loops(view, flow.view)
        for a, b in channel_rules.contracted_dims(eqn, i, view, flow.view):
            pairs += matching.pair(a, b)
        leaf = flow.view.leaf
        found = matching.link(pairs, view, self._shape, flow.view, self._shapes[leaf])
        self.read[leaf] = _merged(self.read.get(leaf), found)
        self.sites[site.name] = None


def _merged(before: Link | None, now: Link) -> Link:
    """Join what two sites read of one leaf, the same or other parts of it."""
    if before is None or np.array_equal(before.channel, now.channel):
        return now
    a, b = np.broadcast_arrays(before.channel, now.channel)
    if np.any((a >= 0) & (b >= 0) & (a != b)):
        raise Stop("one weight reads different channels")
    if np.any((a < 0) & (b < 0)) and before.channel.shape != now.channel.shape:
        raise Stop("one weight reads its channels in different ways")
    return Link(now.leaf, np.where(a >= 0, a, b))
