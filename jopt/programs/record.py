"""Statistics of what passes through the sites, over any number of batches.

A `Statistic` turns the operands of a site into a summary, and two summaries into one.
Nothing else is kept: not an activation outlives its layer, whatever the number of
batches, and inside a scan every layer has a summary of its own.

    recording = record(apply, params, batches, statistics.absmax())
    recording.values["block_0/mlp/kernel"]

Sharded batches need nothing more: a summary is a plain reduction, and the compiler adds
the collectives. A recording is a tree of arrays; give it back as `start` to go on:

    jopt.save("run/recording", {"count": recording.count, "values": recording.values})
    start = Recording(**jopt.restore("run/recording"))
    rest = itertools.islice(batches, int(start.count), None)
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.progress

from jopt.programs import interpret
from jopt.programs.counts import sites
from jopt.programs.handlers import Handler, Use
from jopt.programs.operations import Site
from jopt.programs.sites import SiteTable


@dataclasses.dataclass(frozen=True)
class Statistic:
    """What to keep of a site.

    Attributes:
        summarize: what is kept of one run: arrays of fixed shapes.
        initial: what is kept of no run; neutral in `merge`.
        merge: what is kept of two runs.
        update: what is kept after another batch; by default `merge`. It may weigh
            earlier batches less, as a moving average does.
    """

    summarize: Callable[[Use], Any]
    initial: Callable[[Site], Any]
    merge: Callable[[Any, Any], Any]
    update: Callable[[Any, Any], Any] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recording:
    """The statistics so far.

    Attributes:
        count: the number of batches.
        values: name of a site to its statistic, with a leading axis per scan over
            layers around it, and one for the devices of a `shard_map` around it.
    """

    count: jax.Array
    values: dict[str, Any]


def is_product(site: Site) -> bool:
    """Select the sites that multiply a parameter: all but lookups."""
    return site.kind in ("weight", "derived")


def record(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    statistic: Statistic,
    *,
    select: Callable[[Site], bool] = is_product,
    start: Recording | None = None,
    progress: bool = True,
) -> Recording:
    """Fold a statistic over batches, at every selected site.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, compressed or not.
        batches: of inputs; each item is the tuple of inputs after `params`, and a bare
            array counts as one input.
        statistic: what to keep.
        select: at which sites; by default those that multiply a parameter.
        start: an earlier recording to go on from. `batches` are then the further ones.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        The recording, with the statistic of each site under its name.

    Raises:
        ValueError: there is no batch, or no site is selected.

    >>> from jopt.programs import statistics
    >>> apply = lambda params, x: x @ params["w"]
    >>> batches = [jnp.ones((2, 3)), -3 * jnp.ones((2, 3))]
    >>> params = {"w": jnp.ones((3, 1))}
    >>> recording = record(apply, params, batches, statistics.absmax())
    >>> recording.values["w"], recording.count
    (Array(3., dtype=float32), Array(2, dtype=int32))
    """
    handler = Handler(
        lambda use: (use.run(), statistic.summarize(use)),
        select=select,
        initial=statistic.initial,
        merge=statistic.merge,
    )
    observed = interpret.rewrite(apply, handler)
    update = statistic.update or statistic.merge
    ranks: dict[str, int] = {}

    @jax.jit
    def first(params: Any, inputs: tuple[Any, ...]) -> Recording:
        return Recording(jnp.int32(1), observed(params, *inputs)[1])

    @jax.jit
    def go_on(recording: Recording, params: Any, inputs: tuple[Any, ...]) -> Recording:
        _, now = observed(params, *inputs)
        values = {}
        for name, before in recording.values.items():
            step = update
            for _ in range(ranks[name]):
                step = jax.vmap(step)
            values[name] = step(before, now[name])
        return Recording(recording.count + 1, values)

    recording = start
    for item in _track(batches, progress):
        inputs = item if isinstance(item, tuple) else (item,)
        if not ranks:
            table = sites(apply, params, *inputs)
            ranks = _ranks(table, handler, observed, params, inputs)
        if recording is None:
            recording = first(params, inputs)
        else:
            recording = go_on(recording, params, inputs)
    if recording is None:
        raise ValueError("batches must have at least one item, got none")
    return recording


def over_devices(value: Any, site: Site, merge: Callable[[Any, Any], Any]) -> Any:
    """Merge what the devices of `shard_map`s recorded: one statistic for all of them.

    Args:
        value: of the site, as recorded.
        site: which one.
        merge: of the statistic.

    Returns:
        The statistic without axes for devices.
    """
    axes = [a.kind for a in site.around if a.kind != "steps"]
    for axis in reversed([i for i, kind in enumerate(axes) if kind == "devices"]):
        parts = [
            jax.tree.map(lambda leaf, i=i: leaf.take(i, axis), value)  # noqa: B023
            for i in range(jax.tree.leaves(value)[0].shape[axis])
        ]
        each = merge
        for _ in axes[:axis] + [k for k in axes[axis + 1 :] if k == "layers"]:
            each = jax.vmap(each)
        value = functools.reduce(each, parts)
    return value


def _ranks(
    table: SiteTable,
    handler: Handler,
    observed: Any,
    params: Any,
    inputs: tuple[Any, ...],
) -> dict[str, int]:
    """Count the leading axes that loops and devices add to each statistic."""
    initial = handler.initial
    assert initial is not None
    shapes = jax.eval_shape(observed, params, *inputs)[1]
    if not shapes:
        raise ValueError(
            f"select must choose at least one site, got none of {len(table)}:\n{table}"
        )
    ranks = {}
    for name, found in shapes.items():
        alone = jax.eval_shape(functools.partial(initial, table[name]))
        ranks[name] = jax.tree.leaves(found)[0].ndim - jax.tree.leaves(alone)[0].ndim
    return ranks


def _track(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    console = rich.console.Console(stderr=True)
    if not (progress and console.is_terminal):
        return batches
    return rich.progress.track(batches, "recording", console=console, transient=True)
