"""Bias correction: what quantization shifts on average, a bias takes back.

    b' = b + E[x W] - E[x' Q]

per output, over the calibration batches, with x the inputs of the floats and x' those
that the quantized layers before give, whose biases are corrected already.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
arXiv:1906.04721, the empirical form.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays.axes import gather_values
from jopt.arrays.compressed import CompressedArray
from jopt.programs import channels, matching, passes
from jopt.programs.batches import begin
from jopt.programs.channel_rules import Stop
from jopt.programs.channels import Follow, NeedsLeaf
from jopt.programs.handlers import Handler, Use
from jopt.programs.matching import Link, NoMatchError
from jopt.programs.operations import Site
from jopt.programs.record import track
from jopt.programs.sites import Analysis
from jopt.programs.sources import Sources
from jopt.programs.statistics import summed
from jopt.programs.targets import blame
from jopt.programs.weights import LayoutError, layout, shared_batch, weight_matrix
from jopt.trees import paths
from jopt.trees.layer_report import LayerReport, scientific


@dataclasses.dataclass(frozen=True)
class CorrectedRow:
    """One layer with a corrected bias.

    Attributes:
        name: of the site, and `[layer]` where its leaf stacks layers.
        bias: path of the leaf that was changed.
        shift: root mean square over outputs of the mean shift that was taken back.
        error: None: what the layer loses is not measured.
    """

    name: str
    bias: str
    shift: float
    error: float | None = None

    def cells(self) -> Mapping[str, str]:
        """What the table shows, by the names of columns."""
        return {"bias": self.bias, "shift": scientific(self.shift)}


@dataclasses.dataclass(frozen=True, repr=False)
class BiasReport(LayerReport[CorrectedRow]):
    """The biases that were corrected, and the layers that were left alone."""


class _Layer(NamedTuple):
    """A product, and the bias that is added to it.

    Attributes:
        site: of the product.
        link: of the bias, to the outputs [layers, ...] of the product.
        shape: of the channels, the leaf's with 1 where it is contracted.
        outputs: the channel of each of `[layers, batch, outputs]`.
    """

    site: Site
    link: Link
    shape: tuple[int, ...]
    outputs: np.ndarray


def correct_bias(
    apply: Callable[..., Any],
    params: Any,
    packed: Any,
    batches: Iterable[Any],
    *,
    progress: bool = True,
) -> tuple[Any, BiasReport]:
    """Take back by biases what quantization shifts the outputs of layers by.

    b' = b + E[x W] - E[x' Q]

    Layers are corrected one after another, each on what those before it give by then.
    The bias is the leaf that the program adds to what the layer computes, whatever it
    is called. It costs a pass of the floats over the batches, and one of the packed
    params per layer.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, floats.
        packed: the same quantized: by `jopt.quantize`, `jopt.rtn`, `jopt.gptq`,
            `jopt.awq`, or floats on a grid.
        batches: of inputs, as for `jopt.gptq`.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(packed, report)`: with other biases, and a row per layer. Layers that differ
        in nothing are not listed; those without a bias of their own are left alone, and
        listed with the reason.

    Raises:
        TypeError: `batches` are no inputs.
        ValueError: `params` are compressed, there is no batch, the trees or shapes
            differ, no layer has a bias, or what a layer gives is not finite.

    References:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
        Correction, arXiv:1906.04721.

    >>> import jopt
    >>> apply = lambda p, x: x @ p["w"] + p["b"][None]
    >>> params = {"w": jnp.array([[7.0], [2.4]]), "b": jnp.zeros(1)}
    >>> packed = jopt.quantize(params, jopt.QuantSpec(jopt.formats.int4))
    >>> fixed, report = correct_bias(apply, params, packed, [jnp.ones((1, 2))])
    >>> round(float(fixed["b"][0]), 4)  # 2.4 is stored as 2
    0.4
    """
    _require_floats(params)
    batches, analysis = begin("correct_bias", apply, params, batches)
    if paths.leaf_paths(params) != paths.leaf_paths(packed):
        raise ValueError(
            "packed must have the leaves of params, got "
            f"{paths.leaf_paths(packed)[:5]} for {paths.leaf_paths(params)[:5]}; pass "
            "what quantizing params returned"
        )
    _require_same_shapes(params, packed)
    layers, left = _find_layers(analysis, params, packed)
    if not layers:
        listed = "; ".join(f"{path}: {why}" for path, why in left.items())
        raise ValueError(
            "correct_bias must have a quantized layer with a bias, got none "
            f"({listed or 'no leaf differs'}); add biases to the model"
        )
    names = {layer.site.name for layer in layers}
    statistic = summed(_summarize)
    handler = Handler(
        lambda use: (use.run(), _summarize(use)),
        lambda site: site.name in names,
        statistic.initial,
        statistic.merge,
    )
    observe = passes.observed(apply, handler)
    wanted = passes.total(observe, params, batches, {})
    named = paths.leaves_with_path(packed)
    path_of = [path for path, _ in named]
    leaves = [leaf for _, leaf in named]
    treedef: Any = paths.flatten_with_path(packed)[1]
    rows = []
    sources = Sources(analysis.traced.body)
    steps = sorted(
        (sources.order(layer.site, _steps(layer, k)), i, k)
        for i, layer in enumerate(layers)
        for k in range(_num_layers(layer))
    )
    for _, i, k in track(steps, "correcting biases", progress):
        layer = layers[i]
        name = layer.site.name + (f"[{k}]" if _num_layers(layer) > 1 else "")
        now = passes.total(observe, treedef.unflatten(leaves), batches, {})
        if not (_is_reached(layer, wanted, k) and _is_reached(layer, now, k)):
            left[name] = "no input reached it"
            continue
        if not _is_finite(layer, wanted):
            raise ValueError(
                "params and batches must give finite means, got NaN or infinity at "
                f"{name!r}; {blame(params)}"
            )
        if not _is_finite(layer, now):
            raise ValueError(
                "packed must give finite means where params do, got NaN or infinity at "
                f"{name!r}; pass what quantizing params returned"
            )
        shift = _means(layer, wanted) - _means(layer, now)
        if _num_layers(layer) > 1:
            axis = _stacked_axis(layer)
            is_this = jnp.arange(layer.shape[axis]) == k
            sizes = [-1 if a == axis else 1 for a in range(len(layer.shape))]
            shift = jnp.where(is_this.reshape(sizes), shift, 0.0)
        at = layer.link.leaf
        change = shift.ravel()[jnp.maximum(layer.link.channel, 0)]
        change = jnp.where(layer.link.channel < 0, 0.0, change)
        bias = leaves[at]
        leaves[at] = (bias.astype(jnp.float32) + change).astype(bias.dtype)
        size = shift.size // _num_layers(layer)
        norm = float(jnp.sqrt(jnp.sum(shift**2) / size))
        rows.append(CorrectedRow(name, path_of[at], norm))
    return treedef.unflatten(leaves), BiasReport(tuple(rows), left)


def _require_floats(params: Any) -> None:
    for path, leaf in paths.leaves_with_path(params):
        if isinstance(leaf, CompressedArray):
            raise ValueError(
                f"params must hold the floats, got {type(leaf).__name__} at {path!r}; "
                "pass params first, and what quantizing them returned after it"
            )


def _require_same_shapes(params: Any, packed: Any) -> None:
    floats = dict(paths.leaves_with_path(params))
    for path, leaf in paths.leaves_with_path(packed):
        is_compressed = isinstance(leaf, CompressedArray)
        got = leaf.shape if is_compressed else np.shape(leaf)
        if got != np.shape(floats[path]):
            raise ValueError(
                f"packed must have the shapes of params, got {got} for "
                f"{np.shape(floats[path])} at {path!r}; pass what quantizing params "
                "returned"
            )


def _is_finite(layer: _Layer, found: Mapping[str, Any]) -> bool:
    return bool(jnp.isfinite(_means(layer, found)).all())


def _find_layers(
    analysis: Analysis, params: Any, packed: Any
) -> tuple[list[_Layer], dict[str, str]]:
    """Find the quantized layers, and the biases that are added to them."""
    table = analysis.table
    floats = paths.leaves_with_path(params)
    shapes = [np.shape(leaf) for _, leaf in floats]
    stored = dict(paths.leaves_with_path(packed))
    changed = [
        isinstance(stored[path], CompressedArray)
        or not bool(jnp.array_equal(leaf, stored[path]))
        for path, leaf in floats
    ]
    layers: list[_Layer] = []
    left: dict[str, str] = {}
    for site in table:
        if not any(changed[leaf] for leaf in site.leaves) or site.kind == "gather":
            continue
        try:
            layers.append(_find_bias(analysis, shapes, site))
        except (Stop, NoMatchError, LayoutError) as reason:
            left[site.name] = str(reason)
    biases = [layer.link.leaf for layer in layers]
    for layer in list(layers):
        path = floats[layer.link.leaf][0]
        others = set(table.other_uses.get(path, ())) - {"add", "add_any"}
        if biases.count(layer.link.leaf) > 1 or others:
            left[layer.site.name] = f"{path!r} is added elsewhere too"
            layers.remove(layer)
        elif isinstance(stored[path], CompressedArray):
            left[layer.site.name] = f"{path!r} is quantized"
            layers.remove(layer)
    return layers, left


def _find_bias(analysis: Analysis, shapes: Any, site: Site) -> _Layer:
    is_known = site.primitive in ("dot_general", "conv_general_dilated")
    if site.view is None or not site.reachable or not is_known:
        raise Stop(site.why_not or "it is computed from leaves")
    if any(around.kind == "devices" for around in site.around):
        raise Stop("inside of a shard_map")
    leaf = site.view.leaf
    if sum(leaf in other.leaves for other in analysis.table) > 1:
        raise Stop("its weight is used elsewhere too")
    factors, shape = channels.output_factors(shapes[leaf], site)
    stacked = [a for a, role in site.roles.items() if role == "stacked"]
    if "mixed" in site.roles.values() or len(stacked) != len(
        [a for a in site.around if a.kind == "layers"]
    ):
        raise Stop("its layers are not those of one loop")
    if len(stacked) > 1:
        raise Stop("its layers lie along several axes")
    walk = Follow(analysis, shapes, {leaf: factors}, shape, only=site)
    try:
        walk.run()
    except NeedsLeaf as need:
        link = matching.link_whole(need.view, shape, need.leaf, shapes[need.leaf])
        covered = np.unique(link.channel[link.channel >= 0]).size
        if covered != int(np.prod(shape)):
            raise Stop("several outputs share a bias") from None
        outputs = _outputs(site, shapes[leaf], shape)
        if outputs.size != int(np.prod(shape)):
            raise Stop("a part of its weight is used alone") from None
        return _Layer(site, link, shape, outputs)
    raise Stop("nothing is added to it")


def _num_layers(layer: _Layer) -> int:
    axis = _stacked_axis(layer)
    return 1 if axis is None else layer.shape[axis]


def _stacked_axis(layer: _Layer) -> Any:
    roles = layer.site.roles.items()
    return next((a for a, role in roles if role == "stacked"), None)


def _steps(layer: _Layer, k: int) -> dict[Any, int]:
    return {a.key: k for a in layer.site.around if a.kind == "layers"}


def _summarize(use: Use) -> Any:
    """Add up the results of a site by matrix, `[batch, outputs]`, and count rows."""
    site, y = use.site, use.run().astype(jnp.float32)
    assert site.view is not None
    batch, kept = _result_axes(site)
    gone = tuple(a for a in range(y.ndim) if a not in (*batch, *kept))
    sums = jnp.sum(y, axis=gone)
    width = weight_matrix(site, jnp.zeros(site.in_shapes[site.operand].shape)).shape
    sums = gather_values(sums).reshape(width[0], width[2])
    rows = jnp.full(width[0], np.prod([y.shape[a] for a in gone]), jnp.float32)
    return {
        "sum": shared_batch(site, sums),
        "rows": shared_batch(site, rows[:, None]),
    }


def _result_axes(site: Site) -> tuple[range, range]:
    """The axes of a result that are axes of the weight: batch, and outputs."""
    if site.primitive == "conv_general_dilated":
        axis = site.params["dimension_numbers"].out_spec[1]
        return range(0), range(axis, axis + 1)
    contracted, batch = site.params["dimension_numbers"]
    lead, ndim = len(batch[0]), len(site.out_shape.shape)
    rank = len(site.in_shapes[site.operand].shape)
    count = rank - len(contracted[site.operand]) - lead
    first = lead if site.operand == 0 else ndim - count
    return range(lead), range(first, first + count)


def _means(layer: _Layer, found: Mapping[str, Any]) -> jax.Array:
    """Return the mean of every output, of the shape of the channels."""
    sums = found[layer.site.name]
    means = sums["sum"] / jnp.maximum(sums["rows"], 1.0)
    flat = jnp.zeros(int(np.prod(layer.shape)), jnp.float32)
    return flat.at[layer.outputs].set(means.ravel()).reshape(layer.shape)


def _is_reached(layer: _Layer, found: Mapping[str, Any], k: int) -> bool:
    """Tell whether a layer of a site has run, on a row at least."""
    rows = found[layer.site.name]["rows"]
    return bool((rows[k] if _num_layers(layer) > 1 else rows).all())


def _outputs(site: Site, leaf: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Say which channel each of `[layers, batch, outputs]` is, in a row."""
    every = np.broadcast_to(np.arange(np.prod(shape)).reshape(shape), leaf)
    matrices = layout(site, leaf).to_matrices(jnp.asarray(every, jnp.int32))
    return np.asarray(matrices[:, :, 0, :]).ravel()
