"""What to keep of activations over batches, and which range follows from it.

An `Observer` is a statistic, recorded where activations meet parameters, and a function
from its value to the range [low, high] that a static scale is made of:

    absmax               [-m, m], m = max |x|
    minmax               [min x, max x]
    moving_average       averages of min x and max x over batches       (Jacob et al.)
    percentile           p % of all elements lie inside                 (Wu et al.)
    mse                  argmin_c E (x - q_c(x))^2  (Choukroun et al., Banner et al.)
    importance_weighted  argmin_c E sum_j ||W_j||^2 (x_j - q_c(x_j))^2
    entropy              argmin_c KL(P || Q_c)                          (Migacz)

where q_c rounds to the range c [min x, max x], 0 < c <= 1; symmetric specs get [-t, t].
Ranges contain zero. Both ends are NaN if an element was not finite.

The last four keep a histogram that needs no range beforehand: a bin is a sign, an
exponent and 6 bits of mantissa, cut off the float's pattern, so it is at most 1/64 of
its numbers wide; zero has its own, and the end bins take what is beyond 2^-60 and 2^40.
Counts are exact, in any order, up to 2^24 per bin. The density inside a bin is taken as
uniform, and scales as if they were not rounded.

References:
    Jacob et al., Integer-Arithmetic-Only Inference, arXiv:1712.05877.
    Wu et al., Integer Quantization for Deep Learning Inference, arXiv:2004.09602.
    Choukroun et al., Low-bit Quantization for Efficient Inference, arXiv:1902.06822.
    Banner et al., Post Training 4-bit Quantization, arXiv:1810.05723.
    Migacz, 8-bit Inference with TensorRT, GTC 2017.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays import formats
from jopt.arrays.axes import named_sharding
from jopt.arrays.scales import reduce_groups
from jopt.arrays.specs import QuantSpec, scale_shape
from jopt.programs import statistics
from jopt.programs.handlers import Use, to_array
from jopt.programs.operations import Site
from jopt.programs.record import Statistic

_CUT = 23 - 6  # bits of mantissa that do not choose the bin
_FIRST = (127 - 60) << 6  # the pattern of 2^-60, cut
_SIDE = (60 + 40) << 6  # bins per sign
_INNER = (np.arange(_FIRST + 1, _FIRST + _SIDE) << _CUT).astype(np.uint32)
_POSITIVE = np.concatenate([[0.0], _INNER.view(np.float32), [np.inf]])
_EDGES = np.concatenate([-_POSITIVE[::-1], _POSITIVE])  # zero's bin is [-0, 0]


@dataclasses.dataclass(frozen=True)
class Observer:
    """What to keep of activations, and which range follows.

    Attributes:
        statistic: what to record for a spec. Where its `axis` is not None or (), the
            first three keep a range per index; ValueError else, and for groups.
        range: `(value, spec) -> (low, high)` of one site and layer: float32 arrays of
            shape () or of the scales; None if it never ran.
    """

    statistic: Callable[[QuantSpec], Statistic]
    range: Callable[[Any, QuantSpec], tuple[np.ndarray, np.ndarray] | None]


def absmax() -> Observer:
    """Take [-m, m] with m = max |x|.

    Returns:
        The observer.

    >>> absmax().range({"low": -1.0, "high": 3.0}, None)
    (array(-3., dtype=float32), array(3., dtype=float32))
    """
    return _range_observer(statistics.minmax(), mirror=True)


def minmax() -> Observer:
    """Take the range from the least to the largest element.

    Returns:
        The observer.

    >>> minmax().range({"low": 1.0, "high": 3.0}, None)
    (array(0., dtype=float32), array(3., dtype=float32))
    """
    return _range_observer(statistics.minmax())


def moving_average(decay: float = 0.9) -> Observer:
    """Take moving averages of both ends of each batch's range.

    Args:
        decay: in [0, 1): the weight of the past.

    Returns:
        The observer.

    Raises:
        ValueError: `decay` is not in [0, 1).

    >>> moving_average().range({"low": -1.0, "high": 3.0}, None)
    (array(-1., dtype=float32), array(3., dtype=float32))
    """
    return _range_observer(statistics.moving_average(decay))


def percentile(p: float = 99.9) -> Observer:
    """Take the range that p % of all elements lie in.

    Args:
        p: in (0, 100]: of |x| for symmetric specs; else each end loses (100 - p) / 2 %.

    Returns:
        The observer, within one bin of `np.percentile`.

    Raises:
        ValueError: `p` is not in (0, 100].

    >>> value = _count_in_bins(jnp.linspace(-1, 3, 1001))
    >>> percentile(100).range(value, QuantSpec(formats.int8))
    (array(-3., dtype=float32), array(3., dtype=float32))
    """
    if not isinstance(p, int | float | np.number) or not 0 < p <= 100:
        raise ValueError(f"p must be in (0, 100], got {p!r}: 99.9 and 99.99 are usual")

    def choose(edges: np.ndarray, counts: np.ndarray, spec: QuantSpec) -> Any:
        if spec.symmetric:
            folded = counts[_SIDE:] + np.append(0.0, counts[:_SIDE][::-1])
            top = _quantile(edges[_SIDE:], folded, p / 100)
            return -top, top
        inside = (100 + p) / 200
        low = -_quantile(-edges[::-1], counts[::-1], inside)
        return min(low, 0.0), max(_quantile(edges, counts, inside), 0.0)

    return _histogram_observer(choose)


def mse(num_candidates: int = 100) -> Observer:
    """Take the shrunk range with the least mean squared error.

    Args:
        num_candidates: how many c = 1/num_candidates, ..., 1 to try.

    Returns:
        The observer.

    Raises:
        ValueError: there is no candidate.

    >>> value = _count_in_bins(jnp.append(jnp.linspace(-1, 1, 1000), 4.0))
    >>> mse().range(value, QuantSpec(formats.int4))
    (array(-1.64, dtype=float32), array(1.64, dtype=float32))
    """
    return _histogram_observer(_least_error(num_candidates))


def importance_weighted(num_candidates: int = 100) -> Observer:
    """Take the shrunk range with the least squared error of the product, E ||dx W||^2.

    An element counts by the sum of squares of the weights it meets, or one where two
    activations meet. The transposed product adds them up: a second product per batch.

    Args:
        num_candidates: how many c = 1/num_candidates, ..., 1 to try.

    Returns:
        The observer.

    Raises:
        ValueError: there is no candidate.

    >>> x = jnp.append(jnp.linspace(-1, 1, 1000), 4.0)
    >>> value = _count_in_bins(x, jnp.where(x > 1, 1e6, 1.0))
    >>> importance_weighted().range(value, QuantSpec(formats.int4))
    (array(-4., dtype=float32), array(4., dtype=float32))
    """
    return _histogram_observer(_least_error(num_candidates), _importance)


def entropy(num_bins: int = 2048) -> Observer:
    """Take the shrunk range whose levels keep most of the distribution's shape.

    P is the distribution in equal bins, those at the ends taking what is clipped; Q_c
    is the mean of P, without that, over the occupied bins of each level. Zeros, which
    are exact, are left out.

    Args:
        num_bins: up to the largest magnitude, at least 256; about 128 ranges are tried.

    Returns:
        The observer.

    Raises:
        ValueError: `num_bins` is below 256.

    >>> value = _count_in_bins(jnp.append(jnp.linspace(-1, 1, 1000), 4.0))
    >>> entropy().range(value, QuantSpec(formats.int4))
    (array(-1., dtype=float32), array(1., dtype=float32))
    """
    if num_bins < 256:
        raise ValueError(f"num_bins must be at least 256, got {num_bins}: try 2048")

    def choose(edges: np.ndarray, counts: np.ndarray, spec: QuantSpec) -> Any:
        low, high = edges[0], edges[-1]
        grid = _grid(low, high, spec)
        counts[_SIDE] = 0.0
        below = np.append(0.0, np.cumsum(counts))
        most = round(num_bins * (high - low) / max(-low, high))
        losses = {}
        for bins in range(most, grid.size - 1, -(most // 128)):
            c = bins / most
            ends = np.linspace(c * low, c * high, bins + 1)
            reached = np.where(ends > low, np.interp(ends, edges, below), 0.0)
            cells = np.searchsorted(c * _middles(grid), _middles(ends))
            losses[c] = _divergence(reached, below[-1], cells)
        c = min(losses, key=lambda c: losses[c])
        return c * low, c * high

    return _histogram_observer(choose)


def _range_observer(base: Statistic, *, mirror: bool = False) -> Observer:
    """Keep least and largest elements as `base` does, per index of the spec's axes."""

    def statistic(spec: QuantSpec) -> Statistic:
        _check_groups(spec)

        def initial(site: Site) -> Any:
            ends = base.initial(site)
            return jax.tree.map(lambda end: jnp.full(_kept(spec, site), end), ends)

        def summarize(use: Use) -> Any:
            return _least_and_largest(to_array(use.x), _kept(spec, use.site))

        return dataclasses.replace(base, summarize=summarize, initial=initial)

    return Observer(statistic, lambda value, spec: _ends(value, mirror=mirror))


def _histogram_observer(choose: Callable[..., Any], importance: Any = None) -> Observer:
    """Keep a histogram; `choose(edges, counts, spec) -> (low, high)` from its range."""
    ends = statistics.minmax()

    def statistic(spec: QuantSpec) -> Statistic:
        _check_groups(spec)
        if spec.axis not in (None, ()):
            raise ValueError(
                f"axis must be None or () for an observer with a histogram, got {spec}:"
                " use absmax, minmax or moving_average for a range per index"
            )
        return Statistic(
            lambda use: _count_in_bins(to_array(use.x), importance and importance(use)),
            lambda site: {**ends.initial(site), "counts": np.zeros(2 * _SIDE + 1, "f")},
            lambda a, b: {**ends.merge(a, b), "counts": a["counts"] + b["counts"]},
        )

    def find(value: Any, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray] | None:
        found = _ends(value, mirror=spec.symmetric)
        if found is None:
            return None
        low, high = map(float, found)
        counts = np.array(value["counts"], np.float64)
        if not np.isfinite(counts.sum() + low):
            low = high = np.nan
        elif low < high:
            low, high = choose(np.clip(_EDGES, low, high), counts, spec)
        return np.asarray(low, np.float32), np.asarray(high, np.float32)

    return Observer(statistic, find)


def _check_groups(spec: QuantSpec) -> None:
    if spec.group_size is not None:
        raise ValueError(
            f"group_size must be None for static ranges, got {spec}: use dynamic ones"
        )


def _kept(spec: QuantSpec, site: Site) -> tuple[int, ...]:
    shape = site.in_shapes[1 - site.operand].shape
    return () if spec.axis in (None, ()) else scale_shape(shape, spec, path=site.name)


def _least_and_largest(x: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Reduce to a shape, `()` for all; NaN where an element is not finite."""
    x, full = x.astype(jnp.float32), shape or (1,) * x.ndim
    low = reduce_groups(x, full, functools.partial(jnp.min, initial=jnp.inf))
    high = reduce_groups(x, full, functools.partial(jnp.max, initial=-jnp.inf))
    bad = jnp.where((low == -jnp.inf) | (high == jnp.inf), jnp.nan, 0.0)
    return {"low": (low + bad).reshape(shape), "high": (high + bad).reshape(shape)}


def _count_in_bins(x: jax.Array, importance: jax.Array | None = None) -> dict[str, Any]:
    """Return the ends, and what the elements of each bin count together."""
    pattern = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    magnitude = pattern & 0x7FFFFFFF
    place = jnp.clip((magnitude >> _CUT) - _FIRST, 0, _SIDE - 1) + 1
    place = jnp.where(magnitude == 0, 0, jnp.where(pattern < 0, -place, place)) + _SIDE
    one = jnp.int32(1) if importance is None else importance
    ends, counts = _least_and_largest(x, ()), jnp.zeros(2 * _SIDE + 1, one.dtype)
    counts = counts.at[place].add(one, out_sharding=named_sharding(ends["low"]))
    return {**ends, "counts": counts.astype(jnp.float32)}


def _importance(use: Use) -> jax.Array | None:
    """Return sum_k W_jk^2 of each element x_j, up to a factor; None without weights."""
    w = jnp.asarray(to_array(use.weight))
    if use.site.kind == "activation" or not jnp.issubdtype(w.dtype, jnp.floating):
        return None
    wide = w.astype(jnp.float32)
    squares = jnp.square(wide / jnp.max(jnp.abs(wide), initial=1e-30)).astype(w.dtype)
    out, transpose = jax.vjp(lambda x: use.run(x=x, weight=squares), to_array(use.x))
    return transpose(jnp.ones_like(out))[0].astype(jnp.float32)


def _ends(value: Any, *, mirror: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the range of what was seen and zero; None if nothing was."""
    low, high = (np.asarray(value[end], np.float32) for end in ("low", "high"))
    if np.all(low > high):
        return None
    bad = np.where(np.isfinite(low) & np.isfinite(high), 0, np.float32(np.nan))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if mirror:
        low, high = np.minimum(low, -high), np.maximum(-low, high)
    return np.asarray(low + bad), np.asarray(high + bad)


def _quantile(edges: np.ndarray, counts: np.ndarray, q: float) -> float:
    """Interpolate between elements as `np.percentile`; the last edge is the largest."""
    below = np.append(0.0, np.cumsum(counts))
    last = below[-1] - 1
    k = np.floor(q * last) + np.arange(2)
    lower, upper = np.where(k < last, np.interp(k + 0.5, below, edges), edges[-1])
    return float(lower + (q * last - k[0]) * (upper - lower))


def _grid(low: float, high: float, spec: QuantSpec) -> np.ndarray:
    """Return the levels in ascending order, times the scale of the range."""
    format: formats.Format = spec.format
    if format.kind == "integer":
        top = 2 * format.max_value if spec.symmetric else 2**format.bits - 1
        step = (high - low) / top
        return (np.arange(top + 1) - np.clip(np.round(-low / step), 0, top)) * step
    codes = np.arange(2**format.bits, dtype=np.uint8)
    levels = np.array(format.values or codes.view(format.code_dtype), np.float64)
    return np.unique(levels[np.isfinite(levels)]) * (high / format.max_value)


def _middles(ascending: np.ndarray) -> np.ndarray:
    return (ascending[1:] + ascending[:-1]) / 2


def _least_error(num_candidates: int) -> Callable[..., Any]:
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    c = np.arange(num_candidates, 0, -1)[:, None] / num_candidates

    def choose(edges: np.ndarray, counts: np.ndarray, spec: QuantSpec) -> Any:
        ends, seen = edges[[0, -1]], counts > 0
        lower, upper = edges[:-1][seen] / c, edges[1:][seen] / c
        errors = (
            _mean_errors(lower, upper, _grid(ends[0], ends[1], spec)) @ counts[seen]
        )
        return c[np.argmin(errors * c[:, 0] ** 2), 0] * ends

    return choose


def _mean_errors(lower: Any, upper: Any, grid: np.ndarray) -> np.ndarray:
    """Return the mean squared distance to the grid over [lower, upper]."""
    # The integral is (b^3 - a^3 + 2 sum of h^3) / 3 with a and b the distances of the
    # ends to their levels, and h half of each gap between those two levels.
    cubes, zero = (np.diff(grid) / 2) ** 3, np.searchsorted(grid, 0.0)
    negative = -np.cumsum(cubes[:zero][::-1])[::-1]  # from zero, so that small are kept
    sums = np.concatenate([negative, [0.0], np.cumsum(cubes[zero:])])
    i, j = (np.searchsorted(_middles(grid), end) for end in (lower, upper))
    a, b = lower - grid[i], upper - grid[j]
    across = b**3 - a**3 + 2 * (sums[j] - sums[i])
    width = np.where(i == j, 1.0, upper - lower)
    return np.where(i == j, a * a + a * b + b * b, across / width) / 3


def _divergence(reached: np.ndarray, total: float, cells: np.ndarray) -> float:
    """Return KL(P || Q) from the numbers of elements below the edges of the bins."""
    mass = np.diff(reached)
    p = np.diff(np.concatenate([[0.0], reached[1:-1], [total]]))
    occupied = p > 0
    number = np.maximum(np.bincount(cells, occupied), 1)
    q = (np.bincount(cells, mass) / number)[cells][occupied]
    if not q.all():
        return np.inf
    p = p[occupied]
    return float(np.sum(p * np.log(p / q * (mass.sum() / total))) / total)
