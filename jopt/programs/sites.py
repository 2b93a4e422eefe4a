"""Which operation consumes which parameter: the sites of a pure function.

A site is one operation that multiplies or looks up: `dot_general`,
`conv_general_dilated`, `ragged_dot_general`, `gather`. It is named by the path of the
leaf it consumes, `'block_0/attn/kernel'`, with `'#1'`, `'#2'` for later uses of the
same leaf in program order, whatever framework wrote the program:

    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones((2, 4))}}
    >>> def apply(params, x):
    ...     return x @ params["dense"]["kernel"] + params["dense"]["bias"]
    >>> analyse(apply, params, (jnp.ones((2, 3)),), {}).table.names
    ('dense/kernel',)

What is not covered is listed with the reason, never skipped.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import rich.box
import rich.table
import rich.text

from jopt.programs import bodies, compat, flags, provenance, views
from jopt.programs.flows import DATA, Flow, Key
from jopt.programs.operations import Site
from jopt.trees import paths, report


@dataclasses.dataclass(frozen=True, eq=False)
class SiteTable:
    """All sites of a function at given shapes, in program order.

    Attributes:
        sites: all of them, covered or not.
        leaves: path to shape and dtype, of every leaf of the params.
        other_uses: path to the primitives that consume the leaf outside of sites.
        flops: floating point operations of all sites, multiply and add counted as two,
            scan bodies as often as they run, of branches the dearest, `while` bodies
            once.
        compressed: name of a site that consumes a compressed leaf to whether it reaches
            the site in its few bytes; where not, it is decompressed before.
    """

    sites: tuple[Site, ...]
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    other_uses: Mapping[str, tuple[str, ...]]
    flops: int
    compressed: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites that consume one leaf: matrix products, convolutions, lookups."""
        return tuple(s.name for s in self.sites if s.is_weight and s.reachable)

    @property
    def activations(self) -> tuple[str, ...]:
        """The products of two values that depend on the inputs, as in attention."""
        return tuple(s.name for s in self.sites if s.kind == "activation")

    @property
    def derived(self) -> tuple[str, ...]:
        """The sites that consume a value computed from leaves: A @ B, weight norm.

        Leaves that are merely joined, as the gates of an LSTM, count as covered.
        """
        return tuple(s.name for s in self.sites if s.kind == "derived")

    @property
    def uncovered(self) -> dict[str, str]:
        """The leaves that no reachable site consumes, and what becomes of them."""
        covered = {p for s in self.sites if s.reachable for p in s.roles_by_path}
        return {path: self._reason(path) for path in self.leaves if path not in covered}

    @property
    def bytes(self) -> int:
        """Bytes that the sites read and write, as often as they run."""
        return sum(s.bytes for s in self.sites)

    def _reason(self, path: str) -> str:
        for site in self.sites:
            if path in site.leaf_paths and not site.reachable:
                return f"{site.primitive}: {site.why_not}"
            if path in site.leaf_paths and site.kind == "derived":
                return f"computed before it reaches {site.name}"
        uses = self.other_uses.get(path, ())
        return "used by " + ", ".join(uses) if uses else "never used"

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"no site {name!r}; there are {[s.name for s in self.sites]}")

    def __str__(self) -> str:
        """Draw the table, and list what is not covered below it."""
        table = rich.table.Table(box=rich.box.SIMPLE, show_footer=True)
        footer = {"runs": "", "MFLOP": _mega(self.flops), "kB": _kilo(self.bytes)}
        for column in ("site", "operation", "operands", "result", "roles"):
            table.add_column(column, "total" if column == "site" else "", no_wrap=True)
        for column, total in footer.items():
            table.add_column(column, total, justify="right", no_wrap=True)
        for site in self.sites:
            row = _row(site, self.compressed.get(site.name))
            table.add_row(*map(rich.text.Text, row))
        lines = [report.draw(table)]
        if self.uncovered:
            lines.append(" not covered:")
            lines += [f"   {path}: {reason}" for path, reason in self.uncovered.items()]
        also = {p: u for p, u in self.other_uses.items() if p not in self.uncovered}
        if also:
            lines.append(" used elsewhere too:")
            lines += [f"   {path}: {', '.join(uses)}" for path, uses in also.items()]
        return "\n".join(lines)

    __repr__ = __str__


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A traced program and its sites.

    Attributes:
        traced: the program.
        table: its sites.
        flows: key of a body to its variables, and what they come from.
    """

    traced: bodies.Traced
    table: SiteTable
    flows: Mapping[Key, Mapping[Any, Flow]]


def analyse(
    apply: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    inline_custom_rules: bool = False,
) -> Analysis:
    """Trace a function and find its sites.

    Args:
        apply: a pure function; JAX's cache of traces goes by its identity.
        params: a pytree of arrays, their shapes or compressed arrays.
        inputs: arrays or their shapes.
        kwargs: the same by name.
        inline_custom_rules: whether sites inside `custom_jvp` and `custom_vjp` count as
            reachable.

    Returns:
        The program and its table.

    Raises:
        ValueError: `params` has no leaf, or `apply` is not pure.
    """
    leaves, treedef = paths.flatten_with_path(params)
    if not leaves:
        raise ValueError(
            "params must have at least one leaf, got none; pass the tree that apply "
            "takes as its first argument"
        )
    avals = [compat.aval_of(leaf) for _, leaf in leaves]
    names = [path for path, _ in leaves]
    rest = jax.tree.map(compat.aval_of, flags.fix((inputs, dict(kwargs))))
    function = flags.taking(apply, rest)
    traced = compat.trace(function, (treedef.unflatten(avals), *rest[0]), rest[1])
    walk = provenance.Walk([a.shape for a in avals], inline=inline_custom_rules)
    flows = [
        Flow("view", views.whole(i, a.shape), frozenset({i}))
        for i, a in enumerate(avals)
    ]
    others = [DATA] * (len(traced.body.invars) - len(flows))
    flops = walk.run(traced.body, flows + others)
    table = SiteTable(
        _named(walk.sites, names),
        dict(zip(names, avals, strict=True)),
        {names[leaf]: tuple(uses) for leaf, uses in walk.other_uses.items()},
        flops,
    )
    return Analysis(traced, table, walk.flows)


def _named(sites: list[Site], names: list[str]) -> tuple[Site, ...]:
    """Name sites by leaf, or by kind and ordinal, in program order."""
    leaves = frozenset(names)
    streams: dict[str, Iterator[str]] = {}
    taken: set[str] = set()
    named = []
    for site in sites:
        leaf_paths = tuple(names[leaf] for leaf in sorted(site.leaves))
        stem = (
            leaf_paths[0] if site.is_weight else f"{site.kind}:{site.stack}".rstrip(":")
        )
        free = streams.setdefault(stem, _candidates(stem, is_path=site.is_weight))
        name = next(
            n for n in free if n not in taken and (n not in leaves or n == stem)
        )
        taken.add(name)
        named.append(dataclasses.replace(site, name=name, leaf_paths=leaf_paths))
    return tuple(named)


def _candidates(stem: str, *, is_path: bool) -> Iterator[str]:
    """Yield a, a#1, a#2 for a path, and a#0, a#1 for a kind."""
    return (stem if is_path and not k else f"{stem}#{k}" for k in itertools.count())


def _row(site: Site, is_compressed: bool | None) -> tuple[str, ...]:
    mark = "" if site.reachable else " (not entered)"
    storage = {None: "", True: ", compressed", False: ", decompressed before"}
    return (
        site.name + mark,
        f"{site.primitive} ({site.kind}{storage[is_compressed]})",
        " ".join(map(_shape, site.in_shapes)),
        _shape(site.out_shape),
        " ".join(f"{axis}:{role}" for axis, role in site.roles.items()),
        str(site.runs),
        _mega(site.flops),
        _kilo(site.bytes),
    )


def _shape(aval: jax.ShapeDtypeStruct) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def _mega(flops: int) -> str:
    return f"{flops / 1e6:,.3f}"


def _kilo(nbytes: int) -> str:
    return f"{nbytes / 1e3:,.1f}"
