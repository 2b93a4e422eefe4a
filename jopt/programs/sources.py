"""When the sites of a program run, and which of them see the same input.

An algorithm that goes through a model layer by layer needs an order, of sites and of
the steps of the loops around them, and spares work where several products (query, key,
value) read one value. Two sites do if their inputs are one variable, through calls,
casts and reshapes; where that is not plain to see they are taken for different.
"""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from jopt.programs import bodies, compat, view_rules
from jopt.programs.flows import Key
from jopt.programs.operations import Site

# One operand, and nothing that depends on where the operation stands.
_PLAIN = view_rules.SAME | {"broadcast_in_dim", "reshape", "squeeze", "transpose"}


_CALLS = bodies.Inner | bodies.Remat


class _Scope(NamedTuple):
    """A body in the program, and the equation that runs it."""

    body: bodies.Body
    makers: dict[Any, int]  # variable to the position of the equation that computes it
    caller: Any = None
    control: Any = None
    outer: Key = ()  # the key of the body that the caller stands in


class Sources:
    """Finds bodies by key, and values by what computes them.

    Attributes:
        body: of the whole program.
    """

    def __init__(self, body: bodies.Body) -> None:
        self._scopes: dict[Key, _Scope] = {(): _Scope(body, _makers(body))}

    def order(self, site: Site, layers: Mapping[Key, int]) -> tuple[int | str, ...]:
        """Say when a site runs.

        Args:
            site: of the program.
            layers: key of a loop around it to which of its steps; by default the first.

        Returns:
            What to sort by.
        """
        loops = {a.key: a.size for a in site.around if a.kind != "devices"}
        moment: list[int | str] = []
        for i, part in enumerate(site.key):
            moment.append(part)
            key = site.key[: i + 1]
            if key in loops:
                layer = layers.get(key)
                scan = self._scope(key).control
                if layer is not None and scan.reverse:
                    layer = loops[key] - 1 - layer
                moment.append(layer or 0)
        return tuple(moment)

    def input_of(self, site: Site) -> Hashable:
        """Name what a site computes its input matrix from.

        Args:
            site: that multiplies.

        Returns:
            Equal for two sites only if `input_matrix` gives the same at both.
        """
        side = 1 - site.operand
        self._scope(site.key[:-1])
        match site.primitive:
            case "dot_general":
                contracted, batch = site.params["dimension_numbers"]
                order = sorted(
                    range(len(contracted[side])),
                    key=lambda i: contracted[site.operand][i],
                )
                columns = tuple(contracted[side][i] for i in order)
                arranged: Hashable = (tuple(batch[side]), columns)
            case "conv_general_dilated":
                numbers = site.params["dimension_numbers"]
                kernel = site.in_shapes[site.operand].shape
                window = tuple(kernel[axis] for axis in numbers.rhs_spec[2:])
                arranged = (window, str(sorted(site.params.items(), key=str)))
            case _:
                return site.key
        # Only what runs together: not in other branches, nor as often in other loops.
        places = (site.key[:i] for i in range(1, len(site.key)))
        together = tuple(
            place
            for place in places
            if place in self._scopes
            and not isinstance(self._scopes[place].control, _CALLS)
        )
        return arranged, together, self._value(site.key[:-1], site.eqn.invars[side])

    def _value(self, place: Key, var: Any) -> Hashable:
        """Name a value by what it comes from."""
        scope = self._scope(place)
        if isinstance(var, compat.Literal):
            return "literal", str(var.aval), str(var.val)
        if var not in scope.makers:
            return self._argument(place, scope, var)
        i = scope.makers[var]
        eqn = scope.body.eqns[i]
        position = list(eqn.outvars).index(var)
        inner = compat.control(eqn)
        if isinstance(inner, _CALLS):
            key = (*place, i)
            return self._value(key, self._scope(key).body.outvars[position])
        if eqn.primitive.name in _PLAIN and len(eqn.invars) == 1:
            params = tuple(sorted((k, str(v)) for k, v in eqn.params.items()))
            return eqn.primitive.name, params, self._value(place, eqn.invars[0])
        return place, i, position

    def _argument(self, place: Key, scope: _Scope, var: Any) -> Hashable:
        """Follow what a body is given to where it is called."""
        given = list(scope.body.invars)
        if var not in given or scope.caller is None:
            return place, "given", (given + list(scope.body.constvars)).index(var)
        i = given.index(var)
        if isinstance(scope.control, _CALLS):
            return self._value(scope.outer, scope.caller.invars[i])
        return place, "given", i

    def _scope(self, key: Key) -> _Scope:
        """Find the body that a key leads to, from the top."""
        place: Key = ()
        while place != key:
            eqn = self._scopes[place].body.eqns[int(key[len(place)])]
            control: Any = compat.control(eqn)
            is_choice = isinstance(control, bodies.Cond | bodies.While)
            inner = key[: len(place) + 1 + is_choice]
            if inner not in self._scopes:
                body = _chosen(control, inner[-1])
                self._scopes[inner] = _Scope(body, _makers(body), eqn, control, place)
            place = inner
        return self._scopes[key]


def _chosen(control: Any, which: Any) -> bodies.Body:
    match control:
        case bodies.Cond():
            branch: bodies.Body = control.branches[which]
            return branch
        case bodies.While():
            return control.condition if which == "condition" else control.body
    body: bodies.Body = control.body
    return body


def _makers(body: bodies.Body) -> dict[Any, int]:
    return {var: i for i, eqn in enumerate(body.eqns) for var in eqn.outvars}
