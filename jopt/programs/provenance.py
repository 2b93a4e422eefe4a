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

from jopt.programs import compat, operations, primitives, views
from jopt.programs.flows import CONSTANT, DATA, Flow, Key, Kind, join, of_view
from jopt.programs.operations import Around, Site


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
    """

    def __init__(self, leaf_shapes: Sequence[tuple[int, ...]], *, inline: bool) -> None:
        self.sites: list[Site] = []
        self.other_uses: dict[int, dict[str, None]] = {}
        self._shapes = leaf_shapes
        self._inline = inline

    def run(self, body: compat.Body, flows: Sequence[Flow]) -> int:
        """Walk the whole program.

        Args:
            body: of the program.
            flows: of its arguments.

        Returns:
            The floating point operations of one call.
        """
        results, flops = self._body(body, flows, _Place())
        self._use("returned", [flow for flow in results if flow.is_param])
        return flops

    def _body(
        self, body: compat.Body, flows: Sequence[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        env: dict[Any, Flow] = dict.fromkeys(body.constvars, CONSTANT)
        env.update(zip(body.invars, flows, strict=True))
        total = 0
        for i, eqn in enumerate(body.eqns):
            operands = [_read(env, var) for var in eqn.invars]
            results, flops = self._eqn(eqn, operands, place, i)
            env.update(zip(eqn.outvars, results, strict=True))
            total += flops
        return [_read(env, var) for var in body.outvars], total

    def _eqn(
        self, eqn: Any, flows: list[Flow], place: _Place, i: int
    ) -> tuple[list[Flow], int]:
        inner = compat.control(eqn)
        if inner is not None:
            return _ENTER[type(inner)](self, inner, flows, place.enter(i))
        operation = operations.TABLE.get(eqn.primitive.name)
        if operation is not None and eqn.primitive.name != "gather":
            return self._operation(eqn, flows, place.enter(i), operation)
        params = [i for i, flow in enumerate(flows) if flow.is_param]
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
        is_const = [flow.kind == "constant" for flow in flows]
        leaves = frozenset().union(*(flow.leaves for flow in flows))
        if len(params) == 1 and flows[params[0]].view is not None:
            view = flows[params[0]].view
            assert view is not None
            found = views.step(eqn, view, params[0], is_const)
            if all(v is not None for v in found):
                return [of_view(v, leaves) for v in found]
            if name == "gather" and params == [0]:
                self._note(eqn, flows, place.enter(i))
                return [DATA]
        if all(flow.kind != "data" for flow in flows):
            return [Flow("derived", None, leaves)] * len(eqn.outvars)
        is_opaque = primitives.is_opaque(name, holds_bodies=compat.holds_bodies(eqn))
        self._use(name + " (opaque)" * is_opaque, [flows[i] for i in params])
        return [DATA] * len(eqn.outvars)

    def _operation(
        self,
        eqn: Any,
        flows: list[Flow],
        place: _Place,
        operation: operations.Operation,
    ) -> tuple[list[Flow], int]:
        flops = operation.flops(eqn)
        pair = flows[:2]
        if all(flow.is_param for flow in pair):
            leaves = pair[0].leaves | pair[1].leaves
            return [Flow("derived", None, leaves)], flops
        if all(flow.kind == "constant" for flow in pair):
            return [CONSTANT], flops
        self._note(eqn, flows, place)
        is_data = any(flow.kind == "data" for flow in flows)
        leaves = pair[0].leaves | pair[1].leaves
        return [DATA if is_data else Flow("derived", None, leaves)], flops

    def _note(self, eqn: Any, flows: list[Flow], place: _Place) -> None:
        pair = flows[:2]
        operand = next((i for i, flow in enumerate(pair) if flow.is_param), 1)
        view = pair[operand].view
        kind: Kind = "gather" if eqn.primitive.name == "gather" else "weight"
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
            rank=0 if view is None else len(self._shapes[view.leaf]),
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
        self, inner: compat.CustomRule, flows: list[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        if not self._inline:
            why_not = f"inside {inner.name}, whose gradient rule would be lost"
            place = place.enter(why_not=place.why_not or why_not)
        return self._body(inner.body, flows, place)

    def _cond(
        self, inner: compat.Cond, flows: list[Flow], place: _Place
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
                flow if len(set(column)) == 1 else DATA
                for flow, column in zip(joined, zip(*results, strict=True), strict=True)
            ]
        return joined, max(flops)

    def _scan(
        self, inner: compat.Scan, flows: list[Flow], place: _Place
    ) -> tuple[list[Flow], int]:
        first = inner.num_consts + inner.num_carry
        consts, carry = flows[: inner.num_consts], flows[inner.num_consts : first]
        xs = [flow.unstacked() for flow in flows[first:]]
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
        self, inner: compat.While, flows: list[Flow], place: _Place
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
                after if after == before else DATA
                for before, after in zip(flows[first:], results, strict=True)
            ]
        return results, flops + count

    def _fixpoint(
        self, body: Callable[[list[Flow]], tuple[list[Flow], int]], carry: list[Flow]
    ) -> tuple[list[Flow], int]:
        """Run a body until its carry is what it was; only the last run is kept."""
        while True:
            num_sites = len(self.sites)
            uses = {leaf: dict(names) for leaf, names in self.other_uses.items()}
            results, flops = body(carry)
            joined = [join(a, b) for a, b in zip(carry, results, strict=False)]
            if joined == carry:
                return carry + results[len(carry) :], flops
            carry = joined
            del self.sites[num_sites:]
            self.other_uses = uses

    def _shard_map(
        self, inner: compat.ShardMap, flows: list[Flow], place: _Place
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
    compat.Inner: Walk._inner,
    compat.Remat: Walk._inner,
    compat.CustomRule: Walk._custom_rule,
    compat.Cond: Walk._cond,
    compat.Scan: Walk._scan,
    compat.While: Walk._while,
    compat.ShardMap: Walk._shard_map,
}


def _with_indexed_layers(site: Site, shape: tuple[int, ...]) -> tuple[Around, ...]:
    """Take steps for layers where their counter slices layers off the leaf."""
    stacked = {shape[axis] for axis, role in site.roles.items() if role == "stacked"}
    return tuple(
        a._replace(kind="layers") if a.kind == "steps" and a.size in stacked else a
        for a in site.around
    )


def _read(env: dict[Any, Flow], var: Any) -> Flow:
    return CONSTANT if isinstance(var, compat.Literal) else env[var]
