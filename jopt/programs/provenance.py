"""What every value of a program comes from, followed through all of its bodies.

A value is constant, a view of one leaf, derived from leaves alone, or data: dependent
on the inputs. Control flow joins what meets: a carry or a branch that may be either is
the less certain of the two. Where a view or a derived value meets data in an operation
that multiplies or looks up is a site; where it meets data in any other is an other use.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jopt.programs import bodies, compat, operations, primitives, view_rules
from jopt.programs.flows import CONSTANT, DATA, Flow, Key, Kind, join, of_view
from jopt.programs.operations import Around, Site
from jopt.programs.views import View


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the program a body stands."""

    key: Key = ()
    around: tuple[Around, ...] = ()
    guards: tuple[str, ...] = ()
    runs: int = 1
    why_not: str | None = None

    def enter(self, *key: int | str, **changes: Any) -> "_Place":
        return dataclasses.replace(self, key=self.key + key, **changes)


class Walk:
    """Follows flows through a program, and notes sites and other uses on the way.

    Attributes:
        sites: in program order, not yet named.
        other_uses: leaf to the primitives that consume it outside of sites.
        flows: key of a body to its variables, and what they come from.
    """

    def __init__(self, leaf_shapes: Sequence[tuple[int, ...]], *, inline: bool) -> None:
        self.sites: list[Site] = []
        self._known: dict[Any, tuple[Any, Any]] = {}
        self.other_uses: dict[int, dict[str, None]] = {}
        self.flows: dict[Key, dict[Any, Flow]] = {}
        self._shapes = leaf_shapes
        self._inline = inline

    def run(self, body: bodies.Body, flows: Sequence[Flow]) -> int:
        """Walk the whole program.

        Args:
            body: of the program.
            flows: of its arguments.

        Returns:
            The floating point operations of one call.
        """
        results, flops = self._body(body, flows, _Place())
        self._use("the result", [flow for flow in results if flow.is_param])
        return flops

    def _body(
        self, body: bodies.Body, flows: Sequence[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        env: dict[Any, Flow] = {
            var: DATA if compat.is_ref(var.aval) else CONSTANT for var in body.constvars
        }
        env.update(zip(body.invars, flows, strict=True))
        total = 0
        for i, eqn in enumerate(body.eqns):
            operands = [_read(env, var) for var in eqn.invars]
            results, flops = self._eqn(eqn, operands, place, i)
            env.update(zip(eqn.outvars, results, strict=True))
            total += flops
        self.flows[place.key] = env
        return [_read(env, var) for var in body.outvars], total

    def _eqn(
        self, eqn: Any, flows: list[Flow], place: _Place, i: int
    ) -> tuple[list[Flow], int]:
        inner = compat.control(eqn)
        if inner is not None:
            place = place.enter(i)
            enter = functools.partial(
                _ENTER[type(inner)], self, inner, list(flows), place
            )
            is_loop = isinstance(inner, bodies.Scan | bodies.While)
            return self._once(place, flows, enter) if is_loop else enter()
        operation = operations.TABLE.get(eqn.primitive.name)
        if operation is not None and eqn.primitive.name not in _LOOKUPS:
            return self._operation(eqn, flows, place.enter(i), operation)
        params = [i for i, flow in enumerate(flows) if flow.is_param]
        if eqn.primitive.name in primitives.REFS:  # what is read was written elsewhere
            self._use(eqn.primitive.name, [flows[i] for i in params])
            return [DATA] * len(eqn.outvars), 0
        if not params:
            is_data = any(flow.kind == "data" for flow in flows)
            return [DATA if is_data else CONSTANT] * len(eqn.outvars), 0
        return self._views(eqn, flows, place, i, params), 0

    def _views(
        self, eqn: Any, flows: list[Flow], place: _Place, i: int, params: list[int]
    ) -> list[Flow]:
        """Look through what has params among its operands."""
        name = eqn.primitive.name
        if name == "optimization_barrier":
            return list(flows)
        leaves = frozenset().union(*(flow.leaves for flow in flows))
        is_chosen = any(flow.is_chosen for flow in flows)
        if len(params) == 1 and flows[params[0]].view is not None:
            found = self._looked_at(eqn, flows, params[0])
            by_data = name in _LOOKUPS and any(f.kind == "data" for f in flows)
            # By an index that the inputs give, a matrix is chosen, but a row is read.
            is_row = by_data and _num_axes(found[0]) < 2
            if all(view is not None for view in found) and not is_row:
                is_chosen |= by_data
                return [of_view(view, leaves, is_chosen=is_chosen) for view in found]
            if params == [0] and (name == "gather" or by_data):
                self._note(eqn, flows, place.enter(i))
                return [DATA]
        if all(flow.kind != "data" for flow in flows):
            parts = _joined(name, flows)
            return [Flow("derived", None, leaves, is_chosen, parts)] * len(eqn.outvars)
        is_opaque = primitives.is_opaque(name, holds_bodies=compat.holds_bodies(eqn))
        self._use(name + " (opaque)" * is_opaque, [flows[i] for i in params])
        return [DATA] * len(eqn.outvars)

    def _looked_at(
        self, eqn: Any, flows: list[Flow], position: int
    ) -> list[View | None]:
        view = flows[position].view
        assert view is not None
        is_const = [flow.kind == "constant" for flow in flows]
        return view_rules.step(eqn, view, position, is_const)

    def _operation(
        self,
        eqn: Any,
        flows: list[Flow],
        place: _Place,
        operation: operations.Operation,
    ) -> tuple[list[Flow], int]:
        flops = operation.flops(eqn)
        pair = flows[:2]
        if all(flow.is_param for flow in pair) and not any(
            flow.is_chosen for flow in pair
        ):
            leaves = pair[0].leaves | pair[1].leaves
            self._use(f"{eqn.primitive.name} of params alone", pair)
            return [Flow("derived", None, leaves)], flops
        if all(flow.kind == "constant" for flow in pair):
            return [CONSTANT], flops
        self._note(eqn, flows, place)
        is_data = any(flow.kind == "data" or flow.is_chosen for flow in flows)
        leaves = pair[0].leaves | pair[1].leaves
        return [DATA if is_data else Flow("derived", None, leaves)], flops

    def _note(self, eqn: Any, flows: list[Flow], place: _Place) -> None:
        pair = flows[:2]
        params = [i for i, flow in enumerate(pair) if flow.is_param]
        # Where both are params, the one that the inputs did not choose is the weight.
        operand = min(params, key=lambda i: pair[i].is_chosen, default=1)
        view = pair[operand].view
        kind: Kind = "gather" if eqn.primitive.name in _LOOKUPS else "weight"
        if pair[operand].kind == "derived":
            kind = "derived"
        elif not pair[operand].is_param:
            is_constant = any(flow.kind == "constant" for flow in pair)
            kind = "constant" if is_constant else "activation"
        site = Site(
            key=place.key,
            kind=kind,
            eqn=eqn,
            operand=operand,
            view=view,
            parts=pair[operand].parts,
            leaves=pair[operand].leaves,
            around=place.around,
            guards=place.guards,
            runs=place.runs,
            why_not=place.why_not,
        )
        if view is not None and any(a.kind == "steps" for a in place.around):
            around = _with_indexed_layers(site, self._shapes[view.leaf])
            site = dataclasses.replace(site, around=around)
        self.sites.append(site)

    def _use(self, name: str, flows: Iterable[Flow]) -> None:
        for flow in flows:
            for leaf in flow.leaves:
                self.other_uses.setdefault(leaf, {})[name] = None

    def _inner(
        self, inner: Any, flows: list[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        return self._body(inner.body, flows, place)

    def _custom_rule(
        self, inner: bodies.CustomRule, flows: list[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        if not self._inline:
            why_not = f"inside {inner.name}, whose gradient rule would be lost"
            place = place.enter(why_not=place.why_not or why_not)
        return self._body(inner.body, flows, place)

    def _cond(
        self, inner: bodies.Cond, flows: list[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        results: list[list[Flow]] = []
        flops = [0]
        for i, branch in enumerate(inner.branches):
            guards = (*place.guards, f"branch {i}")
            found, count = self._body(branch, flows[1:], place.enter(i, guards=guards))
            results.append(found)
            flops.append(count)
        joined = [
            functools.reduce(join, column) for column in zip(*results, strict=True)
        ]
        if flows[0].kind == "data":  # which branch ran depends on the inputs
            joined = [
                flow if len({f.placed(()) for f in column}) == 1 else DATA
                for flow, column in zip(joined, zip(*results, strict=True), strict=True)
            ]
        return joined, max(flops)

    def _scan(
        self, inner: bodies.Scan, flows: list[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        first = inner.num_consts + inner.num_carry
        consts, carry = flows[: inner.num_consts], flows[inner.num_consts : first]
        xs = [flow.unstacked(place.key) for flow in flows[first:]]
        is_layered = any(flow.is_param for flow in flows[first:])
        loop = Around(place.key, inner.length, "layers" if is_layered else "steps")
        place = place.enter(
            around=(*place.around, loop), runs=place.runs * inner.length
        )

        def body(carry: list[Flow]) -> tuple[list[Flow], int]:
            return self._body(inner.body, [*consts, *carry, *xs], place)

        results, flops = self._fixpoint(body, carry)
        ys = [flow.stacked() for flow in results[inner.num_carry :]]
        return results[: inner.num_carry] + ys, flops * inner.length

    def _while(
        self, inner: bodies.While, flows: list[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        first = inner.num_condition_consts + inner.num_body_consts
        consts = flows[inner.num_condition_consts : first]
        place = place.enter("body", guards=(*place.guards, "while"))

        def body(carry: list[Flow]) -> tuple[list[Flow], int]:
            return self._body(inner.body, [*consts, *carry], place)

        results, flops = self._fixpoint(body, flows[first:])
        why_not = place.why_not or "in the condition of a while loop"
        condition = dataclasses.replace(
            place, key=(*place.key[:-1], "condition"), why_not=why_not
        )
        operands = flows[: inner.num_condition_consts] + results
        stops, count = self._body(inner.condition, operands, condition)
        if stops[0].kind == "data":  # how often the body ran depends on the inputs
            results = [
                after if after.placed(()) == before.placed(()) else DATA
                for before, after in zip(flows[first:], results, strict=True)
            ]
        return results, flops + count

    def _fixpoint(
        self, body: Callable[[list[Flow]], tuple[list[Flow], int]], first: list[Flow]
    ) -> tuple[list[Flow], int]:
        """Run a body until its carry is what it was; only the last run is kept."""
        carry = first
        while True:
            (results, flops), found = self._aside(functools.partial(body, carry))
            joined = [join(a, b) for a, b in zip(carry, results, strict=False)]
            if joined == carry:
                break
            carry = joined
        self._keep(*found)
        pairs = zip(first, carry, strict=True)
        self._use("the carry of a loop", [a for a, b in pairs if b == DATA])
        return carry + results[len(carry) :], flops

    def _once(
        self,
        place: _Place,
        flows: list[Flow],
        run: Callable[[], tuple[list[Flow], int]],
    ) -> tuple[list[Flow], int]:
        """Walk a loop once for all that flows into it, however often loops nest."""
        key = place, tuple(flows)
        if key not in self._known:
            self._known[key] = self._aside(run)
        (results, flops), found = self._known[key]
        self._keep(*found)
        return list(results), flops

    def _aside(self, run: Callable[[], Any]) -> tuple[Any, tuple[Any, Any]]:
        """Run, and return what was found beside the results."""
        before = self.sites, self.other_uses
        self.sites, self.other_uses = [], {}
        results = run()
        found = self.sites, self.other_uses
        self.sites, self.other_uses = before
        return results, found

    def _keep(self, sites: list[Site], uses: dict[int, dict[str, None]]) -> None:
        self.sites += sites
        for leaf, names in uses.items():
            self.other_uses.setdefault(leaf, {}).update(names)

    def _shard_map(
        self, inner: bodies.ShardMap, flows: list[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        sizes = compat.axis_sizes(inner.mesh)
        devices = math.prod(sizes[name] for name in inner.axis_names)
        shapes = [var.aval.shape for var in inner.body.invars]
        flows = [flow.resized(shape) for flow, shape in zip(flows, shapes, strict=True)]
        around = (*place.around, Around(place.key, devices, "devices"))
        place = place.enter(around=around, runs=place.runs * devices)
        results, flops = self._body(inner.body, flows, place)
        return [flow.stacked() for flow in results], flops * devices


_ENTER: dict[type, Any] = {
    bodies.Inner: Walk._inner,
    bodies.Remat: Walk._inner,
    bodies.CustomRule: Walk._custom_rule,
    bodies.Cond: Walk._cond,
    bodies.Scan: Walk._scan,
    bodies.While: Walk._while,
    bodies.ShardMap: Walk._shard_map,
}


def _with_indexed_layers(site: Site, shape: tuple[int, ...]) -> tuple[Around, ...]:
    """Take steps for layers where their counter slices layers off the leaf."""
    stacked = {shape[axis] for axis, role in site.roles.items() if role == "stacked"}
    return tuple(
        a._replace(kind="layers") if a.kind == "steps" and a.size in stacked else a
        for a in site.around
    )


_LOOKUPS = ("gather", "dynamic_slice")


def _joined(name: str, flows: Sequence[Flow]) -> tuple[View, ...]:
    """The views that a concatenation, perhaps cast afterwards, is made of."""
    if name == "concatenate":
        return tuple(flow.view for flow in flows if flow.view is not None) * all(
            flow.view is not None for flow in flows
        )
    return flows[0].parts if name in view_rules.SAME and len(flows) == 1 else ()


def _num_axes(view: View | None) -> int:
    """Count the axes along which more than one element of a leaf lies."""
    if view is None:
        return 0
    return sum(math.prod(atom.size for atom in dim) > 1 for dim in view.dims)


def _read(env: dict[Any, Flow], var: Any) -> Flow:
    return CONSTANT if isinstance(var, compat.Literal) else env[var]
