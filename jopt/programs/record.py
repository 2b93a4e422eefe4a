"""Statistics of what passes through the sites, over any number of batches.

A `Statistic` turns the operands of a site into a summary, and two summaries into one.
Nothing else is kept: not an activation outlives its layer, whatever the number of
batches, and inside a scan every layer has a summary of its own.

    recording = record(apply, params, batches, statistics.absmax())
    recording.values["block_0/mlp/kernel"]

Sharded batches need nothing more: a summary is a plain reduction, and the compiler adds
the collectives. A recording is a tree of arrays; give it back as `start` to go on:

    jopt.save("run/recording", recording)
    start = jopt.restore("run/recording")
    rest = itertools.islice(batches, int(start.count), None)
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jopt.programs import flags, interpret
from jopt.programs.counts import sites
from jopt.programs.handlers import Handler, Use
from jopt.programs.operations import Site
from jopt.programs.sites import SiteTable
from jopt.trees import paths
from jopt.trees.recording import Recording as Recording


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
            array or dict counts as one input.
        statistic: what to keep.
        select: at which sites; by default those that multiply a parameter.
        start: an earlier recording to go on from. `batches` are then the further ones.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        The recording, with the statistic of each site under its name.

    Raises:
        TypeError: `statistic` is none, or `batches` are no inputs.
        ValueError: there is no batch, no site is selected, or `start` was recorded with
            another statistic or function.

    >>> from jopt.programs import statistics
    >>> apply = lambda params, x: x @ params["w"]
    >>> batches = [jnp.ones((2, 3)), -3 * jnp.ones((2, 3))]
    >>> params = {"w": jnp.ones((3, 1))}
    >>> recording = record(apply, params, batches, statistics.absmax())
    >>> recording.values["w"], recording.count
    (Array(3., dtype=float32), Array(2, dtype=int32))
    """
    if not isinstance(statistic, Statistic):
        raise TypeError(
            "statistic must be a jopt.Statistic, such as jopt.statistics.absmax(), got "
            f"{statistic!r}; observers belong to jopt.calibrate"
        )
    if not isinstance(start, Recording | None):
        raise TypeError(
            f"start must be a jopt.Recording or None, got {type(start).__name__}; pass "
            "what jopt.record returned"
        )
    require_batches(batches)
    handler = Handler(
        lambda use: (use.run(), statistic.summarize(use)),
        select=select,
        initial=statistic.initial,
        merge=statistic.merge,
    )
    observed = interpret.rewrite(apply, handler)
    update = statistic.update or statistic.merge
    ranks: dict[str, int] = {}

    @functools.partial(jax.jit, donate_argnums=0)
    def go_on(recording: Recording, params: Any, inputs: tuple[Any, ...]) -> Recording:
        _, now = observed(params, *inputs)
        is_first = recording.count == 0
        values = {}
        for name, before in recording.values.items():
            step = update
            for _ in range(ranks[name]):
                step = jax.vmap(step)
            if _signature(now[name]) != _signature(before):
                raise ValueError(
                    "batches must give statistics of one shape, got "
                    f"{_signature(now[name])} after {_signature(before)} at {name!r}; "
                    "leave out batches of another size, or keep no range per index"
                )
            after = step(before, now[name])
            # What is neutral in `merge` need not be so in `update`.
            values[name] = jax.tree.map(
                functools.partial(jax.lax.select, is_first), now[name], after
            )
        return Recording(recording.count + 1, values)

    recording = start
    for item in track(batches, "recording", progress):
        inputs = flags.fix(inputs_of(item))
        if not ranks:
            table = sites(apply, params, *inputs)
            shapes = _shapes(table, observed, params, inputs)
            empty = _empty(table, shapes, statistic, (params, inputs))
            ranks |= _ranks(table, empty, statistic)
            # A copy, for it is donated.
            recording = empty if start is None else _checked(start, empty)
        assert recording is not None
        recording = go_on(recording, params, inputs)
    if recording is None:
        raise ValueError("batches must have at least one item, got none")
    return recording


def require_batches(batches: Any) -> None:
    """Raise if something cannot be iterated over as batches of inputs.

    Args:
        batches: what should be.

    Raises:
        TypeError: it cannot.
    """
    is_sequence = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, str | bytes | Mapping) or not is_sequence:
        raise TypeError(
            "batches must be an iterable of inputs, such as a list or a data loader, "
            f"got {_cut(batches)}; pass [batch] for a single one"
        )


def inputs_of(item: Any) -> tuple[Any, ...]:
    """Return the inputs that one item of batches stands for.

    Args:
        item: a tuple of inputs, or a single one.

    Returns:
        The tuple.

    Raises:
        TypeError: it is a list, which may be either.
    """
    if isinstance(item, list):
        raise TypeError(
            "batches must hold tuples of inputs or single inputs, got a list of "
            f"{len(item)}; pass tuple(item) for several inputs, (item,) for one"
        )
    return item if isinstance(item, tuple) else (item,)


def _cut(value: Any) -> str:
    """Write a value in a few characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


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


def _shapes(
    table: SiteTable, observed: Any, params: Any, inputs: tuple[Any, ...]
) -> dict[str, Any]:
    """Find the shapes of what one batch gives, by site."""
    shapes: dict[str, Any] = jax.eval_shape(observed, params, *inputs)[1]
    if not shapes:
        raise ValueError(
            f"select must choose at least one site, got none of {len(table)}:\n{table}"
        )
    return shapes


def _empty(
    table: SiteTable, shapes: dict[str, Any], statistic: Statistic, operands: Any
) -> Recording:
    """Return the recording of no batch, where that of one will be."""

    def fill(alone: Any, found: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.array(jnp.broadcast_to(alone, found.shape), found.dtype)

    values = {
        name: jax.tree.map(fill, statistic.initial(table[name]), found)
        for name, found in shapes.items()
    }
    empty = Recording(jnp.zeros((), jnp.int32), values)
    # On the mesh from the start, or the second batch would compile a second time.
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(operands)]
    named = [s for s in shardings if isinstance(s, NamedSharding)]
    if not named or not isinstance(named[0].mesh, Mesh):
        return empty
    whole = PartitionSpec()  # type: ignore[no-untyped-call]
    return jax.device_put(empty, NamedSharding(named[0].mesh, whole))


def _ranks(table: SiteTable, empty: Recording, statistic: Statistic) -> dict[str, int]:
    """Count the leading axes that loops and devices add to each statistic."""
    ranks = {}
    for name, found in empty.values.items():
        alone = jax.eval_shape(functools.partial(statistic.initial, table[name]))
        ranks[name] = jax.tree.leaves(found)[0].ndim - jax.tree.leaves(alone)[0].ndim
    return ranks


def _checked(start: Recording, empty: Recording) -> Recording:
    """Copy a recording to go on from, of the statistic and the sites of another."""
    given, wanted = (
        {name: _signature(value) for name, value in recording.values.items()}
        for recording in (start, empty)
    )
    if given.keys() != wanted.keys():
        raise ValueError(
            f"start must be a recording of this function, got the sites {sorted(given)}"
            f" where they are {sorted(wanted)}; leave start out"
        )
    for name, signature in given.items():
        if signature != wanted[name]:
            raise ValueError(
                f"start must be a recording of this statistic, got {signature} at "
                f"{name!r} where it has {wanted[name]}; leave start out"
            )
    return jax.tree.map(jnp.array, start)


def _signature(value: Any) -> dict[str, str]:
    return {
        path: f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in paths.leaves_with_path(value)
    }


def track(items: Iterable[Any], label: str, progress: bool) -> Iterable[Any]:
    """Show a bar while going through something, if there is a terminal.

    Args:
        items: what to go through.
        label: what is being done.
        progress: whether to show a bar at all.

    Returns:
        The items.
    """
    console = rich.console.Console(stderr=True)
    if not (progress and console.is_terminal):
        return items
    return rich.progress.track(items, label, console=console, transient=True)
