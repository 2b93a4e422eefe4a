"""Evaluate a traced program, equation by equation, with a handler at chosen ones.

Bodies on the way to a chosen site are opened and written down again as they were: a
scan as a scan, a branch as a branch. All others are bound as they stand.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jopt.arrays.compressed import CompressedArray
from jopt.programs import bodies, compat
from jopt.programs.flows import Key
from jopt.programs.handlers import Handler, Use, is_compressed, to_array
from jopt.programs.operations import Around, Site

Values = list[Any]
Aux = dict[str, Any]


class Interpreter:
    """Evaluates bodies; opens those on the way to a chosen site.

    Attributes:
        handler: what to do there.
        chosen: key to site.
        has_compressed: whether any operand of the program is a compressed array.
    """

    def __init__(
        self, handler: Handler, chosen: Mapping[Key, Site], has_compressed: bool
    ) -> None:
        self._handler = handler
        self._chosen = chosen
        self._has_compressed = has_compressed
        self._on_the_way = {key[:i] for key in chosen for i in range(len(key))}

    def body(
        self, body: bodies.Body, operands: Sequence[Any], key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        """Evaluate a body.

        Args:
            body: what to evaluate.
            operands: its arguments.
            key: the way to it from the top of the program.
            values: those of the sites inside.

        Returns:
            The results, and the aux values of the sites inside.
        """
        env: dict[Any, Any] = dict(zip(body.constvars, body.consts, strict=True))
        env.update(zip(body.invars, operands, strict=True))
        all_aux: Aux = {}
        choosers = compat.choosers(body)
        for scope, eqns in compat.scopes(body):
            with scope:
                for i, eqn in eqns:
                    inputs = [_read(env, var) for var in eqn.invars]
                    if i in choosers and (*key, i) in self._on_the_way:
                        inputs[0] = _read(env, choosers[i])
                    results, aux = self._eqn(eqn, inputs, (*key, i), values)
                    env.update(zip(eqn.outvars, results, strict=True))
                    all_aux.update(aux)
        return [_read(env, var) for var in body.outvars], all_aux

    def _eqn(
        self, eqn: Any, operands: Values, key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        if key in self._chosen:
            with compat.context(eqn):
                return self._site(eqn, operands, self._chosen[key], values)
        if key in self._on_the_way:
            inner = compat.control(eqn)
            values = {
                site.name: values[site.name]
                for site in self._inside(key)
                if site.name in values
            }
            with compat.context(eqn):
                return _ENTER[type(inner)](self, inner, operands, key, values)
        if self._has_compressed and any(map(is_compressed, operands)):
            view = _view(eqn, operands)
            if view is not None:
                return list(view) if isinstance(view, tuple) else [view], {}
            operands = [to_array(value) for value in operands]
        return compat.bind(eqn, operands), {}

    def _site(
        self, eqn: Any, operands: Values, site: Site, values: Aux
    ) -> tuple[Values, Aux]:
        rest = operands[2:]

        def default(*pair: Any) -> jax.Array:
            return compat.bind(eqn, [*map(to_array, pair), *rest])[0]

        value = values.get(site.name)
        use = Use(site, tuple(operands[:2]), default, tuple(rest), value)
        result, aux = self._handler.call(use), None
        if self._handler.initial is not None:
            result, aux = result
        expected = eqn.outvars[0].aval
        if jnp.shape(result) != expected.shape:
            raise ValueError(
                f"handler must return shape {expected.shape} at site {site.name!r}, "
                f"got {jnp.shape(result)}"
            )
        if result.dtype != expected.dtype:
            result = result.astype(expected.dtype)
        return [result], {} if self._handler.initial is None else {site.name: aux}

    def _inner(
        self, inner: bodies.Inner, operands: Values, key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        operands = _constrained(operands, inner.in_shardings)
        results, aux = self.body(inner.body, operands, key, values)
        return _constrained(results, inner.out_shardings), aux

    def _custom_rule(
        self, inner: bodies.CustomRule, operands: Values, key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        return self.body(inner.body, operands, key, values)

    def _remat(
        self, inner: bodies.Remat, operands: Values, key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        @functools.partial(
            jax.checkpoint, policy=inner.policy, prevent_cse=inner.prevent_cse
        )
        def run(operands: Values, values: Aux) -> tuple[Values, Aux]:
            results, aux = self.body(inner.body, operands, key, values)
            return [to_array(value) for value in results], aux

        return run(operands, values)

    def _scan(
        self, inner: bodies.Scan, operands: Values, key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        first = inner.num_consts + inner.num_carry
        consts = operands[: inner.num_consts]
        carry = [to_array(value) for value in operands[inner.num_consts : first]]
        layered = {
            site.name for site in self._inside(key) if (key, "layers") in _kinds(site)
        }
        shared, split = _partition(values, layered)
        # Over steps that are no layers a site has one aux value, if they can be merged,
        # and over layers if the handler asks for it.
        merged = {} if self._handler.merge is None else self._initial(key, one=True)

        def step(
            carry: tuple[Values, Aux], each: tuple[Values, Aux]
        ) -> tuple[tuple[Values, Aux], tuple[Values, Aux]]:
            (state, before), (xs, own) = carry, each
            results, aux = self.body(
                inner.body, [*consts, *state, *xs], key, {**shared, **own}
            )
            results = [to_array(value) for value in results]
            state, ys = results[: inner.num_carry], results[inner.num_carry :]
            kept = {name: aux.pop(name) for name in before}
            return (state, self._merged(before, kept, key)), (ys, aux)

        (carry, merged), (ys, aux) = lax.scan(
            step,
            (carry, merged),
            (operands[first:], split),
            length=inner.length,
            reverse=inner.reverse,
            unroll=inner.unroll,
        )
        return [*carry, *ys], {**aux, **merged}

    def _cond(
        self, inner: bodies.Cond, operands: Values, key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        def branch(i: int) -> Callable[..., tuple[Values, Aux]]:
            def run(*operands: Any) -> tuple[Values, Aux]:
                branch, place = inner.branches[i], (*key, i)
                results, aux = self.body(branch, operands, place, values)
                everything = self._initial(key)
                everything.update(compat.vary(aux))
                return [to_array(value) for value in results], everything

            return run

        index, *rest = operands
        branches = [branch(i) for i in range(len(inner.branches))]
        if inner.platforms is not None:
            return _by_platform(inner.platforms, branches, rest)
        if index.dtype == bool:
            return lax.cond(index, branches[1], branches[0], *rest)
        return lax.switch(index, branches, *rest)

    def _while(
        self, inner: bodies.While, operands: Values, key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        num_condition = inner.num_condition_consts
        first = num_condition + inner.num_body_consts
        stops, consts = operands[:num_condition], operands[num_condition:first]
        carry = [to_array(value) for value in operands[first:]]
        is_batched = bool(jnp.ndim(inner.condition.outvars[0].aval))

        def who_goes_on(carry: Values) -> jax.Array:
            place = (*key, "condition")
            return self.body(inner.condition, [*stops, *carry], place, {})[0][0]

        def goes_on(state: tuple[Values, Aux]) -> jax.Array:
            who = who_goes_on(state[0])
            return jnp.any(who) if is_batched else who

        def step(state: tuple[Values, Aux]) -> tuple[Values, Aux]:
            carry, before = state
            place = (*key, "body")
            results, now = self.body(inner.body, [*consts, *carry], place, values)
            results = [to_array(value) for value in results]
            if is_batched:  # some examples may be done before others
                results = _where(who_goes_on(carry), results, carry)
            return results, self._merged(before, now, key)

        return lax.while_loop(goes_on, step, (carry, self._initial(key)))

    def _shard_map(
        self, inner: bodies.ShardMap, operands: Values, key: Key, values: Aux
    ) -> tuple[Values, Aux]:
        names = tuple(n for n in inner.mesh.axis_names if n in inner.axis_names)
        sizes = compat.axis_sizes(inner.mesh)
        in_specs = list(inner.in_specs)
        for i, value in enumerate(operands):
            if not isinstance(value, CompressedArray):
                continue
            specs = value.partition_specs(in_specs[i], sizes)
            operands[i] = value.to_array() if specs is None else value
            in_specs[i] = in_specs[i] if specs is None else specs
        same = PartitionSpec()  # type: ignore[no-untyped-call]
        stacked = PartitionSpec(names)  # type: ignore[no-untyped-call]

        def run(values: Aux, *operands: Any) -> tuple[Values, Aux]:
            results, aux = self.body(inner.body, operands, key, values)
            aux = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), aux)
            return [to_array(value) for value in results], aux

        return jax.shard_map(
            run,
            mesh=inner.mesh,
            in_specs=(same, *in_specs),
            out_specs=(list(inner.out_specs), stacked),
            axis_names=set(inner.axis_names),
            check_vma=inner.check_vma,
        )(values, *operands)

    def _initial(self, key: Key, *, one: bool = False) -> Aux:
        """The aux values of the sites inside an equation, as if none had run.

        With `one`, those of one step of a scan that is not over their layers.
        """
        initial = self._handler.initial
        if initial is None:
            return {}
        values = {}
        for site in self._inside(key):
            loops = self._stacks(site, key)
            if one and (key, "layers") in _kinds(site) and self._handler.stacks_layers:
                continue
            lengths = tuple(loop.size for loop in loops)
            values[site.name] = jax.tree.map(
                lambda leaf, lengths=lengths: jnp.broadcast_to(
                    jnp.expand_dims(leaf, tuple(range(len(lengths)))),
                    lengths + jnp.shape(leaf),
                ),
                initial(site),
            )
        return compat.vary(values)

    def _stacks(self, site: Site, key: Key) -> list[Around]:
        """What stacks the aux values of a site inside an equation."""
        merged = [] if self._handler.merge is None else ["steps"]
        merged += [] if self._handler.stacks_layers else ["layers"]
        return [
            around
            for around in site.around
            if around.key[: len(key)] == key and around.kind not in merged
        ]

    def _inside(self, key: Key) -> list[Site]:
        return [s for k, s in self._chosen.items() if k[: len(key)] == key]

    def _merged(self, before: Aux, now: Aux, key: Key) -> Aux:
        """Merge the aux values of two runs of a body."""
        merged = {}
        for site in self._inside(key):
            if site.name not in before:
                continue
            merge = self._handler.merge
            if merge is None:
                raise ValueError(
                    f"handler must have a merge for site {site.name!r} inside a while "
                    "loop, got None; or leave the site out with select"
                )
            for _ in self._stacks(site, key):
                merge = jax.vmap(merge)
            merged[site.name] = merge(before[site.name], now[site.name])
        return compat.vary(merged)


_ENTER: dict[type, Any] = {
    bodies.Inner: Interpreter._inner,
    bodies.Remat: Interpreter._remat,
    bodies.CustomRule: Interpreter._custom_rule,
    bodies.Scan: Interpreter._scan,
    bodies.Cond: Interpreter._cond,
    bodies.While: Interpreter._while,
    bodies.ShardMap: Interpreter._shard_map,
}


def _read(env: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, compat.Literal) else env[var]


def _where(goes_on: jax.Array, after: Values, before: Values) -> Values:
    """Keep the state of the examples of a batch that are done."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        lanes = tuple(range(goes_on.ndim, new.ndim))
        return jnp.where(jnp.expand_dims(goes_on, lanes), new, old)

    return list(map(choose, after, before))


def _by_platform(
    platforms: Sequence[tuple[str, ...] | None],
    branches: Sequence[Callable[..., Any]],
    operands: Values,
) -> Any:
    """Choose a branch when the program is compiled for a platform."""
    chosen: dict[str, Any] = {}
    for names, branch in zip(platforms, branches, strict=True):
        chosen.update(dict.fromkeys(names or ("default",), branch))
    return lax.platform_dependent(*operands, **chosen)


def _kinds(site: Site) -> list[tuple[Key, str]]:
    return [(around.key, around.kind) for around in site.around]


def _partition(values: Aux, names: set[str]) -> tuple[Aux, Aux]:
    """Split values into those of other sites and those of the named ones."""
    return (
        {name: value for name, value in values.items() if name not in names},
        {name: value for name, value in values.items() if name in names},
    )


def _view(eqn: Any, operands: Values) -> Any:
    """Let a compressed operand take a view of itself."""
    first, *rest = operands
    if not is_compressed(first):
        return None
    return first.after(eqn.primitive.name, eqn.params, rest)


def _constrained(values: Values, shardings: Sequence[Any]) -> Values:
    """Keep the shardings that an inner `jit` asked for."""
    if all(sharding is None for sharding in shardings):
        return values
    constrain: Any = lax.with_sharding_constraint
    return [
        value if sharding is None else constrain(to_array(value), sharding)
        for value, sharding in zip(values, shardings, strict=True)
    ]
