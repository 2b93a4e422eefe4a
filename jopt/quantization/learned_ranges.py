"""Where trainable ranges start, and what they make of weights.

LSQ starts a scale at 2 mean |x| / sqrt(levels) (Esser et al., arXiv:1902.08153), which
at eight bits reaches far beyond the largest number; so it starts at the range of the
numbers where that is smaller.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays.ranges import Range, learned_fake_quantize
from jopt.arrays.scales import compute_range, highest_level, sum_groups
from jopt.arrays.specs import QuantSpec
from jopt.programs.handlers import Use, to_array
from jopt.programs.record import Statistic
from jopt.quantization.calibration import calibrate
from jopt.quantization.observers import Observer, minmax
from jopt.quantization.operands import Activations
from jopt.trees import paths
from jopt.trees.calibration import Calibration


def start(
    apply: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    specs: Any,
    *,
    weight_specs: tuple[tuple[str, QuantSpec], ...],
    activations: Activations,
    calibration: Calibration | None,
) -> Calibration:
    """Find the ranges that training starts from.

    Args:
        apply: the function.
        params: its parameters.
        inputs: one batch.
        specs: tree of the specs of weights with trainable ranges; None for none.
        weight_specs: what the calibration carries along.
        activations: which inputs of sites are rounded.
        calibration: where to start, if there is one; else the batch is measured.

    Returns:
        The ranges.
    """
    if calibration is None:
        observer = minmax() if specs is None else first_step()
        calibration = calibrate(
            apply,
            params,
            [inputs],
            observer=observer,
            spec=None,
            activations=activations,
            progress=False,
        )
    weights = {}
    if specs is not None:
        leaves, treedef = paths.flatten_with_path(params)
        found = zip(leaves, treedef.flatten_up_to(specs), strict=True)
        weights = {
            path: _weight_range(leaf, spec)
            for (path, leaf), spec in found
            if isinstance(spec, QuantSpec)
        }
    return dataclasses.replace(calibration, weights=weights, weight_specs=weight_specs)


def first_step() -> Observer:
    """Keep what LSQ starts from: mean magnitude, and the ends.

    Returns:
        The observer; its symmetric range is
        `levels * min(max |x| / levels, 2 mean |x| / sqrt(levels))`.
    """

    def summarize(use: Use) -> dict[str, jax.Array]:
        x = jnp.asarray(to_array(use.x)).astype(jnp.float32)
        return {
            "low": jnp.min(x, initial=0.0),
            "high": jnp.max(x, initial=0.0),
            "total": jnp.sum(jnp.abs(x)),
            "count": jnp.float32(x.size),
        }

    def merge(a: Any, b: Any) -> dict[str, Any]:
        return {
            "low": jnp.minimum(a["low"], b["low"]),
            "high": jnp.maximum(a["high"], b["high"]),
            "total": a["total"] + b["total"],
            "count": a["count"] + b["count"],
        }

    def ends(value: Any, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray] | None:
        if not value["count"]:
            return None
        if not spec.symmetric:
            return np.asarray(value["low"]), np.asarray(value["high"])
        largest = np.maximum(-value["low"], value["high"])
        high = _start(largest, value["total"] / value["count"], spec)
        return -np.asarray(high), np.asarray(high)

    zeros = dict.fromkeys(("low", "high", "total", "count"), np.float32(0))
    statistic = Statistic(
        summarize, lambda site: jax.tree.map(jnp.asarray, zeros), merge
    )
    return Observer(lambda spec: statistic, ends)


def round_weight(w: jax.Array, spec: QuantSpec, ends: Range) -> jax.Array:
    """Round a leaf to a range whose ends get LSQ's gradient.

    Args:
        w: float leaf.
        spec: of it, with explicit axes.
        ends: of the range, of the shape of its scales.

    Returns:
        The rounded leaf.
    """
    return learned_fake_quantize(w, spec, ends, "learned", w.size // ends.high.size)


def _weight_range(w: jax.Array, spec: QuantSpec) -> Range:
    low, high = compute_range(w, spec)
    if not spec.symmetric:
        return Range(high, low)
    largest = jnp.maximum(-low, high)
    if spec.format.scale_rule == "mean":
        return Range(largest)
    total = sum_groups(jnp.abs(w.astype(jnp.float32)), low.shape)
    return Range(_start(largest, total * low.size / w.size, spec))


def _start(largest: Any, mean: Any, spec: QuantSpec) -> Any:
    levels = highest_level(spec)
    return jnp.minimum(largest, 2 * mean * jnp.sqrt(levels))
