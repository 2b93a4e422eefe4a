"""Static ranges: what the inputs of every site were over some batches.

    calibration = calibrate(apply, params, batches, observer=observers.percentile(99.9))

An observer folds what it must know of the inputs over the batches, and then says which
range to round to. Layers inside a scan have a range each.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import formats
from jopt.arrays.ranges import Range
from jopt.arrays.specs import QuantSpec
from jopt.programs.counts import sites
from jopt.programs.handlers import Use
from jopt.programs.operations import Site
from jopt.programs.record import (
    Statistic,
    inputs_of,
    over_devices,
    record,
    require_batches,
)
from jopt.programs.sites import SiteTable
from jopt.quantization.observers import Observer, absmax
from jopt.quantization.operands import (
    Activations,
    require_static,
    site_specs,
    static_spec,
)
from jopt.quantization.specs import SpecOrRules, listed_specs, resolve_specs
from jopt.trees.calibration import Calibration, Pair

_INT8 = QuantSpec(formats.int8)


def calibrate(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    observer: Observer | None = None,
    spec: SpecOrRules | None = _INT8,
    activations: Activations = _INT8,
    progress: bool = True,
) -> Calibration:
    """Measure the ranges of what meets the weights of a function.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters.
        batches: of inputs; each item is the tuple of inputs after `params`, and a bare
            array or dict counts as one input.
        observer: one of `jopt.observers`; `absmax()` when None.
        spec: of the weights, as `jopt.quantize` takes it; carried along for it.
        activations: a `jopt.QuantSpec` or rules over site names, which may name
            products of two activations too. With `axis=None` or `()` a site has one
            range; integers are axes of its input with a range per index.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        The calibration; `print` it. It goes to `jopt.quantize`, to `jopt.execute` and
        to `jopt.fake_quantize`, and lists the sites that never ran or saw only zeros,
        which have no range and stay float.

    Raises:
        TypeError: `observer` is none, or `batches` are no inputs.
        ValueError: there is no batch or no site, a rule matches no site, or a spec has
            groups.

    References:
        Wu et al., Integer Quantization for Deep Learning Inference, arXiv:2004.09602.

    >>> apply = lambda params, x: x @ params["w"]
    >>> batches = [jnp.ones((2, 3)), -3 * jnp.ones((2, 3))]
    >>> calibrate(apply, {"w": jnp.ones((3, 1))}, batches).activations["w"][0].high
    Array(3., dtype=float32)
    """
    if not isinstance(observer, Observer | None):
        raise TypeError(
            "observer must be one that jopt.observers makes, got "
            f"{observer!r}; call it, such as jopt.observers.absmax()"
        )
    require_static(activations)
    require_batches(batches)
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches must have at least one item, got none")
    table = sites(apply, params, *inputs_of(first))
    pairs = site_specs(activations, table)
    specs: tuple[tuple[str, QuantSpec], ...] = ()
    if spec is not None:
        # Its default is no one's wish: what is measured may have no leaf of its own.
        found = resolve_specs(spec, params, sites=table, required=not pairs)
        specs = listed_specs(params, found)
    if not pairs:
        return Calibration({}, {}, (), specs)
    recording = record(
        apply,
        params,
        itertools.chain([first], rest),
        _of_operands(absmax() if observer is None else observer, pairs),
        select=lambda site: site.name in pairs,
        progress=progress,
    )
    return finish(
        observer or absmax(), pairs, jax.device_get(recording.values), table, specs
    )


def finish(
    observer: Observer,
    pairs: dict[str, Pair],
    values: dict[str, Any],
    table: SiteTable,
    weight_specs: tuple[tuple[str, QuantSpec], ...],
) -> Calibration:
    """Turn recorded statistics into ranges."""
    statistic = _of_operands(observer, pairs)
    initial = statistic.initial
    ranges: dict[str, Pair] = {}
    for name, value in values.items():
        value = over_devices(value, table[name], statistic.merge)
        alone = jax.eval_shape(lambda name=name: initial(table[name]))
        pair = [
            None if spec is None else _range(observer, v, a, spec)
            for v, a, spec in zip(value, alone, pairs[name], strict=True)
        ]
        if all(
            (p is None) == (s is None) for p, s in zip(pair, pairs[name], strict=True)
        ):
            ranges[name] = (pair[0], pair[1])
    return Calibration(
        ranges,
        {},
        tuple((name, pairs[name]) for name in ranges),
        weight_specs,
        tuple(name for name in pairs if name not in ranges),
    )


def _of_operands(observer: Observer, pairs: dict[str, Pair]) -> Statistic:
    """Observe each operand that is rounded, as what meets the other one."""
    statistics = {
        spec: observer.statistic(static_spec(spec))
        for pair in pairs.values()
        for spec in pair
        if spec is not None
    }
    merging = next(iter(statistics.values()))  # the same for all specs

    def summarize(use: Use) -> tuple[Any, ...]:
        return tuple(
            None if spec is None else statistics[spec].summarize(_facing(use, i))
            for i, spec in enumerate(pairs[use.site.name])
        )

    def initial(site: Site) -> tuple[Any, ...]:
        return tuple(
            None if spec is None else statistics[spec].initial(_site_facing(site, i))
            for i, spec in enumerate(pairs[site.name])
        )

    def each(combine: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda a, b: tuple(
            None if x is None else combine(x, y) for x, y in zip(a, b, strict=True)
        )

    update = merging.update
    return Statistic(
        summarize,
        initial,
        each(merging.merge),
        None if update is None else each(update),
    )


def _facing(use: Use, i: int) -> Use:
    """See a site such that operand i is what meets the other one."""
    return dataclasses.replace(use, site=_site_facing(use.site, i))


def _site_facing(site: Site, i: int) -> Site:
    return site if site.operand == 1 - i else dataclasses.replace(site, operand=1 - i)


def _range(observer: Observer, value: Any, alone: Any, spec: QuantSpec) -> Range | None:
    """Find the range of every layer; None if one never ran, or saw only zeros."""
    leaf, one = jax.tree.leaves(value)[0], jax.tree.leaves(alone)[0]
    lead = leaf.shape[: leaf.ndim - one.ndim]
    found = []
    for index in np.ndindex(*lead):
        layer = jax.tree.map(lambda x, index=index: x[index], value)
        found.append(observer.range(layer, static_spec(spec)))
    if any(ends is None or not np.any(ends) for ends in found):
        return None
    low, high = (
        jnp.asarray(np.stack(ends).reshape((*lead, *np.shape(ends[0]))), jnp.float32)
        for ends in zip(*found, strict=True)
    )
    return Range(jnp.maximum(-low, high)) if spec.symmetric else Range(high, low)
