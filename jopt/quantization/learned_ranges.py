"""Where trainable ranges start, and what they make of weights.

LSQ starts a scale at 2 mean |x| / sqrt(levels) (Esser et al., arXiv:1902.08153), which
at eight bits reaches far beyond the largest number; so it starts at the range of the
numbers where that is smaller. LSQ+ starts an asymmetric range at the one of least
squared error (Bhalgat et al., arXiv:2004.09576): from the least and the largest number,
which a training of some thousand steps hardly leaves, four bits lose half a point.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays.quantized import fake_quantize
from jopt.arrays.ranges import Range, learned_fake_quantize, scale_of
from jopt.arrays.scales import compute_range, highest_level, sum_groups
from jopt.arrays.specs import QuantSpec, scale_shape
from jopt.programs.handlers import Use, to_array
from jopt.programs.operations import Site
from jopt.programs.record import Statistic
from jopt.quantization.calibration import calibrate
from jopt.quantization.observers import Observer, minmax, mse
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
        specs: tree of the specs of weights with trainable ranges; None for none. Those
            that a calibration has learned go on from there.
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
    weights = calibration.weights
    if specs is not None:
        leaves, treedef = paths.flatten_with_path(params)
        found = zip(leaves, treedef.flatten_up_to(specs), strict=True)
        weights = {
            path: weights[path] if path in weights else _weight_range(leaf, spec)
            for (path, leaf), spec in found
            if isinstance(spec, QuantSpec)
        }
    return dataclasses.replace(calibration, weights=weights, weight_specs=weight_specs)


def first_step() -> Observer:
    """Keep what LSQ and LSQ+ start from.

    Returns:
        The observer. Its symmetric range is
        `levels * min(max |x| / levels, 2 mean |x| / sqrt(levels))`, per index of the
        axes that keep one. An asymmetric one is the shrunk range of least squared
        error, or that of all numbers where it is one per index.
    """
    range_of, fitted = minmax(), mse()

    def asymmetric(spec: QuantSpec) -> Observer:
        return fitted if spec.axis in (None, ()) else range_of

    def statistic(spec: QuantSpec) -> Statistic:
        if not spec.symmetric:
            return asymmetric(spec).statistic(spec)
        base = range_of.statistic(spec)

        def summarize(use: Use) -> dict[str, jax.Array]:
            x = jnp.abs(jnp.asarray(to_array(use.x)).astype(jnp.float32))
            ends = base.summarize(use)
            shape = ends["high"].shape
            total = sum_groups(x, shape or (1,) * x.ndim).reshape(shape)
            return {**ends, "total": total, "count": jnp.float32(x.size / total.size)}

        def initial(site: Site) -> dict[str, jax.Array]:
            ends = base.initial(site)
            total = jnp.zeros_like(ends["high"])
            return {**ends, "total": total, "count": jnp.float32(0)}

        def merge(a: Any, b: Any) -> dict[str, Any]:
            sums = {name: a[name] + b[name] for name in ("total", "count")}
            return {**base.merge(a, b), **sums}

        return Statistic(summarize, initial, merge)

    def ends(value: Any, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray] | None:
        if not spec.symmetric:
            return asymmetric(spec).range(value, spec)
        found = range_of.range(value, spec)
        if found is None:
            return None
        low, high = found
        mean = value["total"] / value["count"]
        high = np.asarray(_start(np.maximum(-low, high), mean, spec))
        return -high, high

    return Observer(statistic, ends)


def round_weight(
    w: jax.Array, spec: QuantSpec, ends: Range, *, is_learning: bool, path: str
) -> jax.Array:
    """Round a leaf to a range that was learned, or is.

    Args:
        w: float leaf.
        spec: of it, with explicit axes.
        ends: of the range, of the shape of its scales.
        is_learning: whether the ends get LSQ's gradient.
        path: of the leaf, for errors.

    Returns:
        The rounded leaf.

    Raises:
        ValueError: the range is of a leaf or of axes of another shape.
    """
    wanted = scale_shape(w.shape, spec, path=path)
    if ends.high.shape != wanted:
        raise ValueError(
            f"calibration must have learned the ranges of {path!r} for {spec}, got "
            f"shape {ends.high.shape} where its scales have {wanted}; use the spec "
            "that it was trained with"
        )
    if not is_learning:
        return fake_quantize(w, spec, scale=scale_of(ends, spec, w.ndim), path=path)
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
