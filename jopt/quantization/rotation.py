"""Hadamard rotation: the same function, of weights and activations without outliers.

    y = x W = (x S H^T) (H S W),    H H^T = I,   S = diag(+1 or -1)

An input that is much larger than the others sets the scale of all. Rotated, it is a
little of each number, and a grid of few bits fits all of them. H is Hadamard's, applied
in O(n log n) along each contracted axis; the weights are rotated once, and what meets
them as the program runs, unless the product before can take the rotation:

    y = (x A + b) W = (x A S H^T + b S H^T) (H S W)

References:
    Ashkboos et al., QuaRot, arXiv:2404.00456; Tseng et al., QuIP#, arXiv:2402.04396.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.arguments import check_key
from jopt.arrays.axes import lay_like
from jopt.arrays.hadamard import block_size, hadamard_transform
from jopt.programs import flags, interpret, passes, sites
from jopt.programs.batches import begin, require_targets
from jopt.programs.handlers import Handler, Use, to_array
from jopt.programs.layer_by_layer import NOT_MET
from jopt.programs.layouts import Layout
from jopt.programs.producers import contracted_axes
from jopt.programs.spread import as_automatic, automatic, beside, placed_as
from jopt.quantization.rotation_plan import Plan, find_met, make_plan, sizes_of
from jopt.trees import rules
from jopt.trees.layer_report import LayerReport

_JOIN = " & "


@dataclasses.dataclass(frozen=True)
class RotatedRow:
    """One rotated leaf.

    Attributes:
        name: of its first site.
        path: of the leaf.
        sizes: of its contracted axes, each of which is rotated.
        blocks: how many numbers of each are mixed with each other.
        folded_into: path of the leaf whose outputs take the rotation of the input;
            None where the input is rotated as the program runs.
    """

    name: str
    path: str
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    folded_into: str | None

    @property
    def error(self) -> None:
        """None: nothing is lost but rounding."""
        return None

    def cells(self) -> Mapping[str, str]:
        """What the table shows, by the names of columns."""
        return {
            "inputs": str(list(self.sizes)),
            "mixed": str(list(self.blocks)),
            "input rotated": (
                "online" if self.folded_into is None else f"by {self.folded_into}"
            ),
        }


@dataclasses.dataclass(frozen=True, repr=False)
class RotationReport(LayerReport[RotatedRow]):
    """What was rotated, online or by the product before, and what was left alone."""


def rotate(
    apply: Callable[..., Any],
    params: Any,
    *inputs: Any,
    key: jax.Array,
    select: rules.Select = None,
) -> tuple[Callable[..., Any], dict[str, Any], RotationReport]:
    """Rotate weights and what meets them, so that both quantize well.

    y = x W = (x S H^T) (H S W)

    The function stays what it is, to rounding. Everything else takes the rotated one as
    any other: `jopt.fake_quantize`, `jopt.calibrate`, `jopt.gptq`, `jopt.quantize(...,
    sites=)`, `jopt.execute(rotated_apply, activations=...)`; inputs are rotated before
    they are rounded.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        *inputs: one batch, which shows what the weights meet.
        key: a PRNG key, for the signs S: without them numbers of one sign would add up
            to an outlier.
        select: which leaves, as for `jopt.gptq`: None for float leaves that only
            multiply, of two axes or more not counting stacked layers.

    Returns:
        `(rotated_apply, rotated_params, report)`. The params are a dict of `"params"`,
        a tree like the one given, and `"signs"`, float vectors of which only the signs
        count and which get no gradient, under the names of the sites that share one.
        They hold all that there is to know: of params that were restored,
        `jopt.execute_rotated(apply)` is the function. The report lists what is rotated
        online, what by the product before, and what was left alone and why.

    Raises:
        TypeError: a leaf or an input is no array, or anything is traced.
        ValueError: nothing can be rotated, or a leaf is compressed.

    References:
        Ashkboos et al., QuaRot, arXiv:2404.00456; Tseng et al., QuIP#,
        arXiv:2402.04396.

    >>> apply = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.eye(4)}, jnp.array([[8.0, 0.0, 0.0, 0.0]])
    >>> rotated, found, report = rotate(apply, params, x, key=jax.random.key(0))
    >>> rotated(found, x)
    Array([[8., 0., 0., 0.]], dtype=float32)
    >>> jnp.abs(found["params"]["w"][:, 0])
    Array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    >>> print(report)
      layer   inputs   mixed   input rotated
     ────────────────────────────────────────
      w          [4]     [4]          online
    """
    check_key(key, is_optional=False)
    _, analysis = begin("rotate", apply, params, [inputs])
    plan = _met(apply, params, inputs, make_plan(analysis, params, select))
    turned = [plan.targets[i] for group in plan.groups for i in group.targets]
    require_targets("rotate", "rotate", turned, plan.left)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    online = {}
    for group in plan.groups:
        name = _JOIN.join(site.name for site in group.sites)
        signs = _draw(key, name, math.prod(group.sizes))
        for i in group.targets:
            at, layout = plan.targets[i].leaf, plan.targets[i].layout
            leaves[at] = _rotate_leaf(leaves[at], signs, layout, group.sizes, 2)
        if group.producer is None:
            beside_leaf = beside(signs, leaves[plan.targets[group.targets[0]].leaf])
            online[name] = placed_as(beside_leaf, None)
            continue
        before = plan.targets[group.producer]
        leaves[before.leaf] = _rotate_leaf(
            leaves[before.leaf], signs, before.layout, group.sizes, 3
        )
        for at in group.biases:
            leaves[at] = _rotate_vector(leaves[at], signs, group.sizes)
    rotated = {"params": treedef.unflatten(leaves), "signs": online}
    return execute_rotated(apply), rotated, _report(plan)


def execute_rotated(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function on params that `rotate` returned.

    Args:
        apply: the function that was rotated, `apply(params, *inputs)`.

    Returns:
        `apply'(rotated_params, *inputs)`, the first result of `rotate`.

    Raises:
        TypeError: (when called) the params are not of the form that `rotate` returns.
        ValueError: (when called) they name a site that the function does not have.

    >>> apply = lambda params, x: x @ params["w"]
    >>> params = {"params": {"w": jnp.ones((2, 1))}, "signs": {"w": -jnp.ones(2)}}
    >>> execute_rotated(apply)(params, jnp.array([[3.0, 4.0]]))
    Array([[-4.242641]], dtype=float32)
    """

    @interpret.compiled_if_eager
    def run(params: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(params, Mapping) or set(params) != {"params", "signs"}:
            raise TypeError(
                "params must be the dict of 'params' and 'signs' that jopt.rotate "
                f"returned, got a {type(params).__name__}; pass rotated params"
            )
        signs = {
            name: value
            for names, value in params["signs"].items()
            for name in names.split(_JOIN)
        }
        analysis = sites.analyse(apply, params["params"], inputs, kwargs)
        known = {site.name for site in analysis.table if site.reachable}
        if not set(signs) <= known:
            raise ValueError(
                "params must be rotated for this function, got signs for "
                f"{sorted(set(signs) - known)} where the sites are {sorted(known)}; "
                "call jopt.rotate again"
            )
        handler = Handler(
            lambda use: use.run(x=_rotated_input(use, signs[use.site.name])),
            select=lambda site: site.name in signs,
        )
        return interpret.evaluate(
            analysis, handler, params["params"], inputs, kwargs, {}
        )

    def rotated(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return run(params, inputs, kwargs)

    return functools.wraps(apply)(rotated) if hasattr(apply, "__name__") else rotated


def _met(
    apply: Callable[..., Any], params: Any, inputs: tuple[Any, ...], plan: Plan
) -> Plan:
    """Leave out what is not what the inputs meet, with all that shares its rotation."""
    if not plan.groups:
        return plan
    observe = passes.moments_of_all(apply, plan.targets, "squares")
    met = find_met(plan, params, observe(params, flags.fix(inputs), {}))
    left, groups = dict(plan.left), []
    for group in plan.groups:
        if all(met[i] for i in group.targets):
            is_kept = group.producer is None or met[group.producer]
            online = group._replace(producer=None, biases=())
            groups.append(group if is_kept else online)
            continue
        for i in group.targets:
            shares = "it shares its rotation with a leaf that is left alone"
            left[plan.targets[i].path] = shares if met[i] else NOT_MET
    return Plan(plan.targets, tuple(groups), left)


def _report(plan: Plan) -> RotationReport:
    rows = {}
    for group in plan.groups:
        for i in group.targets:
            target, before = plan.targets[i], group.producer
            rows[i] = RotatedRow(
                target.name,
                target.path,
                group.sizes,
                tuple(map(block_size, group.sizes)),
                None if before is None else plan.targets[before].path,
            )
    return RotationReport(tuple(rows[i] for i in sorted(rows)), plan.left)


@automatic()
def _draw(key: jax.Array, name: str, size: int) -> jax.Array:
    """Draw the signs of a group."""
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return jax.random.rademacher(own, (size,), jnp.float32)


def _rotate_leaf(
    leaf: Any, signs: jax.Array, layout: Layout, sizes: tuple[int, ...], axis: int
) -> jax.Array:
    """Rotate the inputs (axis 2) or outputs (axis 3) of all matrices of a leaf."""
    with automatic():
        whole = as_automatic(leaf)
        whole = _rotate_matrices(
            whole, beside(signs, whole), layout=layout, sizes=sizes, axis=axis
        )
    return placed_as(whole, leaf)


@functools.partial(jax.jit, static_argnames=("layout", "sizes", "axis"))
def _rotate_matrices(
    leaf: jax.Array,
    signs: jax.Array,
    *,
    layout: Layout,
    sizes: tuple[int, ...],
    axis: int,
) -> jax.Array:
    matrices = layout.to_matrices(leaf)
    wide = jnp.moveaxis(_widened(matrices), axis, -1)
    wide = _rotated(wide, signs, sizes)
    return layout.from_matrices(jnp.moveaxis(wide, -1, axis), leaf)


def _rotate_vector(leaf: Any, signs: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Rotate a bias, whose elements lie as the outputs do."""
    with automatic():
        whole = as_automatic(leaf)
        whole = _rotate_bias(whole, beside(signs, whole), sizes=sizes)
    return placed_as(whole, leaf)


@functools.partial(jax.jit, static_argnames="sizes")
def _rotate_bias(
    leaf: jax.Array, signs: jax.Array, *, sizes: tuple[int, ...]
) -> jax.Array:
    flat = _rotated(_widened(leaf).reshape(-1), signs, sizes)
    return flat.reshape(leaf.shape).astype(leaf.dtype)


def _rotated(wide: jax.Array, signs: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Rotate the last axis, which is made of axes of some sizes."""
    signs = jnp.expand_dims(signs.astype(wide.dtype), tuple(range(wide.ndim - 1)))
    lead = wide.shape[:-1]
    split = (wide * signs).reshape(*lead, *sizes)
    for i in range(len(sizes)):
        split = hadamard_transform(split, axis=len(lead) + i)
    return split.reshape(wide.shape)


def _rotated_input(use: Use, signs: Any) -> jax.Array:
    """Rotate what meets a parameter along the axes that are contracted."""
    x = jnp.asarray(to_array(use.x))
    wide = _widened(x)
    places = [axis for _, axis in contracted_axes(use.site)]
    # Whatever an optimizer or a cast made of them, only their signs count.
    is_negative = jax.lax.stop_gradient(jnp.asarray(to_array(signs))) < 0
    factors = jnp.where(is_negative, -1, 1).astype(wide.dtype)
    factors = factors.reshape(sizes_of(use.site))
    order = sorted(range(len(places)), key=lambda i: places[i])
    others = tuple(axis for axis in range(x.ndim) if axis not in places)
    factors = jnp.expand_dims(jnp.transpose(factors, order), others)
    wide = wide * lay_like(factors, wide)
    for axis in places:
        wide = hadamard_transform(wide, axis=axis)
    return wide.astype(x.dtype)


def _widened(x: jax.Array) -> jax.Array:
    """Take half precision as float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
