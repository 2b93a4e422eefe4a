"""Passes over the calibration batches: what meets each target, and what its loss costs.

A pass is one compiled program, run on every batch, whose results add up:

* `moments_of_all` keeps the Gram matrix (or the squared norms) of every layer at once,
  of large ones what is not above the diagonal;
* `moments_of_some` is told by flags, layer by layer, where to keep them, so that one
  program serves however many passes: what no flag asks for is not computed, and sites
  of one size share one result.

Both also keep what tells the weights that the inputs met, see `probes`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays.axes import gather_values
from jopt.programs import compat, flags, interpret, sites, statistics
from jopt.programs.handlers import Handler, Use
from jopt.programs.matrices import input_matrix
from jopt.programs.operations import Site
from jopt.programs.probes import seen_at
from jopt.programs.record import inputs_of
from jopt.programs.targets import Target
from jopt.programs.weights import Part, parts, shared_batch, shares_batch

# "magnitudes" is the Gram matrix with one more row below it, the sums of |x|; "drift"
# the Gram matrix, and X^T (X' - X) with the inputs X' that the floats give.
Moments = Literal["gram", "magnitudes", "squares", "drift"]
Pass = Callable[[Any, Any, Any], Any]
Found = dict[str, jax.Array]


def moments_shape(kind: Moments, batch: int, columns: int) -> tuple[int, ...]:
    """Return the shape of the moments of one layer.

    Args:
        kind: of moments.
        batch: entries of the layer.
        columns: of its inputs.

    Returns:
        The shape, the batch first.
    """
    if kind == "squares":
        return batch, columns
    if kind == "drift":
        return batch, 2, columns, columns
    return batch, columns + (kind == "magnitudes"), columns


def total(
    run: Pass, params: Any, batches: Iterable[Any], values: Mapping[str, Any]
) -> Any:
    """Run a pass over the batches.

    Args:
        run: the pass.
        params: the parameters.
        batches: of inputs, as `record` takes them.
        values: site name to what the pass is to know of the site.

    Returns:
        The sum of what it returns.
    """
    found = None
    for item in batches:
        now = run(params, flags.fix(inputs_of(item)), values)
        found = now if found is None else _add(found, now)
        del now  # before the next one is made
        # A pass that is on its way holds what it will find; more than one need not be.
        jax.block_until_ready(found)  # type: ignore[no-untyped-call]
    return found


@functools.partial(jax.jit, donate_argnums=0)
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def moments_of_all(
    apply: Callable[..., Any], targets: Sequence[Target], kind: Moments
) -> Pass:
    """Return the pass that keeps the moments of every site.

    Args:
        apply: the function.
        targets: whose sites.
        kind: of moments.

    Returns:
        The pass; it gives site name to `{"moments", "seen"}`, with leading axes for
        layers and devices.
    """
    statistic = statistics.summed(lambda use: measured(use, _moments(kind, use)))
    handler = Handler(
        lambda use: (use.run(), statistic.summarize(use)),
        at(targets),
        statistic.initial,
        statistic.merge,
    )
    return observed(apply, handler)


def moments_of_some(
    apply: Callable[..., Any], targets: Sequence[Target], kind: Moments
) -> Pass:
    """Return the pass that keeps moments where it is told to.

    Args:
        apply: the function.
        targets: whose sites may be asked for.
        kind: of moments.

    Returns:
        The pass; its values are what `asked` returns. It gives `moments`, the sum of
        those asked for by shape, and `seen` by site name.
    """
    return jax.jit(some_moments(apply, targets, functools.partial(_moments, kind)))


def some_moments(
    apply: Callable[..., Any],
    targets: Sequence[Target],
    moments_of: Callable[..., jax.Array],
) -> Pass:
    """Return a pass that keeps what is asked for, to be compiled.

    Args:
        apply: the function.
        targets: whose sites may be asked for.
        moments_of: `(use, onto=None)` to what to keep of a site, `[batch, ...]`, a sum
            over rows, and added to `onto` where there is one.

    Returns:
        The pass, as `moments_of_some`.
    """
    statistic = statistics.summed(lambda use: measured(use, moments_of(use)))
    by_name = {site.name: site for target in targets for site, _ in target.uses}

    def run(params: Any, inputs: Any, values: Any) -> Any:
        outside = compat.trace_state()
        moments: Found = {}

        def call(use: Use) -> tuple[jax.Array, Any]:
            nothing = _typed_zeros(statistic.summarize, use)

            def if_asked(name: str, before: Any = None) -> Any:
                def add() -> Any:
                    if before is not None and not shares_batch(use.site, view):
                        return compat.vary(moments_of(use, before))
                    now = statistic.summarize(use)[name]
                    return compat.vary(now if before is None else before + now)

                rest = nothing[name] if before is None else before
                return jax.lax.cond(use.value[name], add, lambda: compat.vary(rest))

            view = parts(use.site)[0].view
            found = {"seen": if_asked("seen")}
            if compat.trace_state() == outside:
                # One site after the other into one sum: side by side, what they do
                # not find would take the room of what they might. Out here a site is
                # run once per trace; what is traced again is inside of something.
                key = str(nothing["moments"].shape)
                moments[key] = if_asked("moments", moments.get(key))
            else:  # inside of a loop, a branch or a remat
                found["moments"] = if_asked("moments")
            return use.run(), found

        handler = Handler(
            call,
            at(targets),
            statistic.initial,
            statistic.merge,
            stacks_layers=False,
        )
        analysis = sites.analyse(apply, params, inputs, {})
        _, aux = interpret.evaluate(analysis, handler, params, inputs, {}, values)
        seen = {}
        for name, found in aux.items():
            # What the devices of a `shard_map` found.
            devices = [a for a in by_name[name].around if a.kind == "devices"]
            axes = tuple(range(len(devices)))
            found = jax.tree.map(lambda x, axes=axes: jnp.sum(x, axis=axes), found)
            found = jax.tree.map(gather_values, found)
            seen[name] = found["seen"]
            if "moments" in found:
                key = str(found["moments"].shape)
                moments[key] = found["moments"] + moments.get(key, 0)
        return {"moments": jax.tree.map(gather_values, moments), "seen": seen}

    return run


def asked(
    targets: Sequence[Target], kept: Target, seen: Sequence[Target], layer: int
) -> dict[str, Any]:
    """Ask for the moments of one target, and for what several targets are.

    Args:
        targets: all that the pass knows.
        kept: whose moments to keep.
        seen: whose weights to tell.
        layer: of all of them.

    Returns:
        Site name to flags, with an axis per scan over layers around the site.
    """
    values = {
        site.name: {
            name: np.zeros(lengths(site), np.bool_) for name in ("moments", "seen")
        }
        for target in targets
        for site, _ in target.uses
    }
    for name, wanted in (("moments", [kept]), ("seen", seen)):
        for target in wanted:
            for site, part in target.uses:
                values[site.name][name][layer_index(target, site, part, layer)] = True
    return values


def layer_index(
    target: Target, site: Site, part: Part, layer: int
) -> tuple[int | slice, ...]:
    """Find a layer of a target in the loops around one of its sites.

    Args:
        target: with layers.
        site: that multiplies by it.
        part: of the site's operand.
        layer: which one.

    Returns:
        Per scan over layers around the site, the step, or all where the leaf is the
        same in every step.
    """
    own = [
        is_own
        for is_own, around in zip(
            target.own_layers(site, part), stacking(site), strict=True
        )
        if around.kind == "layers"
    ]
    sizes = [n for n, is_own in zip(lengths(site), own, strict=True) if is_own]
    steps = iter(np.unravel_index(layer, sizes) if sizes else ())
    return tuple(int(next(steps)) if is_own else slice(None) for is_own in own)


def of_target(target: Target, found: Mapping[str, Any], name: str) -> jax.Array:
    """Add up what the sites of a target gave.

    Args:
        target: which one.
        found: what a pass over all gave, by site name.
        name: of the part of it.

    Returns:
        `[layers, ...]`.
    """
    every = []
    for site, part in target.uses:
        value = found[site.name][name]
        if isinstance(value, tuple):
            value = value[place(site, part)]
        own = target.own_layers(site, part)
        shared = tuple(i for i, is_own in enumerate(own) if not is_own)
        value = jnp.sum(value, axis=shared)
        every.append(value.reshape(target.layout.sizes[0], *value.shape[sum(own) :]))
    return functools.reduce(jnp.add, every)


def seen_by(target: Target, seen: Mapping[str, Any]) -> jax.Array:
    """Add up what `seen` says of a target in a pass that was asked for it.

    Args:
        target: which one.
        seen: by site name.

    Returns:
        `[batch, columns]`.
    """
    each = (seen[site.name][place(site, part)] for site, part in target.uses)
    return functools.reduce(jnp.add, each)


def _moments(kind: Moments, use: Use, onto: jax.Array | None = None) -> jax.Array:
    """Keep what meets the weights."""
    if kind == "squares":
        squares: jax.Array = statistics.norms().summarize(use)["squares"]
        return squares if onto is None else onto + squares
    x = input_matrix(use)
    moments = statistics.gram_below(x, onto)
    if kind == "magnitudes":
        sums = gather_values(jnp.sum(jnp.abs(x), axis=1))
        if onto is None:
            moments = jnp.pad(moments, ((0, 0), (0, 1), (0, 0)))
        moments = moments.at[:, -1].add(sums)
    return moments


def measured(use: Use, moments: jax.Array) -> Any:
    """Keep moments of what meets the weights, and what these are.

    Args:
        use: of a site.
        moments: `[batch, ...]`, a sum over its rows.

    Returns:
        `{"moments", "seen"}`.
    """
    site = use.site
    view = parts(site)[0].view
    return {"moments": shared_batch(site, moments, view), "seen": seen_at(use)}


def _typed_zeros(summarize: Callable[[Use], Any], use: Use) -> Any:
    """Make zeros of the type that a summary has, its place on a mesh included."""
    shapes = jax.eval_shape(lambda: summarize(use))

    def zeros(shape: Any) -> jax.Array:
        sharding = getattr(shape, "sharding", None)
        blank = jnp.zeros(shape.shape, shape.dtype)
        if sharding is None or sharding.mesh.empty:
            return blank
        return jnp.asarray(jax.sharding.reshard(blank, sharding))  # type: ignore[no-untyped-call]

    return jax.tree.map(zeros, shapes)


def observed(apply: Callable[..., Any], handler: Handler) -> Pass:
    """Compile what gives the aux values of a handler and nothing else."""

    @jax.jit
    def run(params: Any, inputs: Any, values: Any) -> Any:
        analysis = sites.analyse(apply, params, inputs, {})
        _, aux = interpret.evaluate(analysis, handler, params, inputs, {}, values)
        return jax.tree.map(gather_values, aux)

    return run


def at(targets: Sequence[Target]) -> Callable[[Site], bool]:
    """Select the sites of targets."""
    names = {site.name for target in targets for site, _ in target.uses}
    return lambda site: site.name in names


def place(site: Site, part: Part) -> int:
    """Say which part of a site's operand a part is."""
    return parts(site).index(part)


def stacking(site: Site) -> list[Any]:
    """List what stacks the statistics of a site."""
    return [around for around in site.around if around.kind != "steps"]


def lengths(site: Site) -> tuple[int, ...]:
    """List the numbers of layers of the scans around a site."""
    return tuple(around.size for around in site.around if around.kind == "layers")
