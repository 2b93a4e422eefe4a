"""One factor per input of a site: how they lie in its inputs, its weights, its layers.

Factors have the shape `[layers, batch, columns]` of a layout. Those that one number of
the input meets are the same: all places of a convolution's window, all experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.arrays.axes import gather_values
from jopt.programs import passes
from jopt.programs.handlers import Use
from jopt.programs.layer_by_layer import list_unreached
from jopt.programs.layouts import Layout
from jopt.programs.matrices import input_matrix
from jopt.programs.operations import Site
from jopt.programs.record import Statistic
from jopt.programs.statistics import summed
from jopt.programs.targets import Target
from jopt.programs.weights import Part, parts, repeated_batch
from jopt.quantization import factors

_NOT_REACHED = "no input but zeros reached it"


def largest_inputs() -> Statistic:
    """Keep max |x| of every input.

    Returns:
        The statistic; its value is float32 `[batch, columns]` of `input_matrix`.
    """

    def summarize(use: Use) -> jax.Array:
        return gather_values(jnp.max(jnp.abs(input_matrix(use)), axis=1, initial=0.0))

    return Statistic(summarize, summed(summarize).initial, jnp.maximum)


def without_devices(
    targets: Sequence[Target], left: Mapping[str, str]
) -> tuple[list[Target], dict[str, str]]:
    """Leave out what runs inside of a `shard_map`, where a device sees its own part."""
    kept, reasons = [], dict(left)
    for target in targets:
        around = [a.kind for site, _ in target.uses for a in site.around]
        if "devices" in around:
            reasons[target.name] = "inside of a shard_map"
        else:
            kept.append(target)
    return kept, reasons


def of_target(target: Target, values: Mapping[str, Any]) -> jax.Array:
    """Take the largest of what the sites of a target saw.

    Args:
        target: which one.
        values: by site name, leading axes for layers.

    Returns:
        `[layers, batch, columns]`.
    """
    layers, batch, columns, _ = target.layout.sizes
    found = jnp.zeros((layers, batch, columns), jnp.float32)
    for site, part in target.uses:
        own = target.own_layers(site, part)
        value = jnp.max(
            values[site.name], axis=tuple(i for i, o in enumerate(own) if not o)
        )
        value = value.reshape(layers, -1, columns)
        if value.shape[1] != batch:  # batch dimensions that share the weight
            places = repeated_batch(site, jnp.arange(batch)[:, None], part.view)
            shared = jnp.zeros((layers, batch, columns), jnp.float32)
            value = shared.at[:, places[:, 0]].max(value)
        found = jnp.maximum(found, value)
    return found


def unreached(target: Target, largest: jax.Array) -> dict[str, str]:
    """List the layers of a target that nothing but zeros came into.

    Args:
        target: which one.
        largest: `[layers, batch, columns]`, the largest of what it saw.

    Returns:
        Name of a layer to the reason.
    """
    found: dict[str, str] = {}
    for layer, reached in enumerate(np.asarray(jnp.any(largest > 0, axis=-1))):
        list_unreached(target, layer, reached, found, _NOT_REACHED)
    return found


def to_leaf(values: jax.Array, layout: Layout, shape: Sequence[int]) -> jax.Array:
    """Lay `[layers, batch, columns]` out as a leaf, 0 where it has none."""
    wide = jnp.broadcast_to(values[..., None], layout.sizes)
    return layout.from_matrices(wide, jnp.zeros(shape, jnp.float32))


def largest_weights(leaf: jax.Array, target: Target) -> jax.Array:
    """Return the largest weight of every input, `[layers, batch, columns]`."""
    return jnp.max(jnp.abs(target.layout.to_matrices(leaf)), axis=-1).astype(
        jnp.float32
    )


def scale(leaf: jax.Array, layout: Layout, s: jax.Array) -> jax.Array:
    """Multiply the matrices of a leaf by factors `[layers, batch, columns]`."""
    matrices = factors.multiply(layout.to_matrices(leaf), s[..., None])
    return layout.from_matrices(matrices, leaf)


def joined(site: Site, values: jax.Array) -> jax.Array:
    """Take the largest of what meets one number of the input.

    Args:
        site: which one.
        values: `[layers, batch, columns]`.

    Returns:
        The same shape.
    """
    if site.primitive == "conv_general_dilated":
        window, feature = _window(site)
        split = values.reshape(*values.shape[:2], *window)
        gone = tuple(2 + a for a in range(len(window)) if a != feature)
        largest = jnp.max(split, axis=gone, keepdims=True)
        return jnp.broadcast_to(largest, split.shape).reshape(values.shape)
    if site.primitive.startswith("ragged"):
        largest = jnp.max(values, axis=1, keepdims=True)
        return jnp.broadcast_to(largest, values.shape)
    return values


def _window(site: Site) -> tuple[list[int], int]:
    """The axes that columns of a convolution are made of, and which are features."""
    out, feature, *_ = site.params["dimension_numbers"].rhs_spec
    shape = site.in_shapes[1].shape
    axes = [a for a in range(len(shape)) if a != out]
    return [shape[a] for a in axes], axes.index(feature)


def of_site(target: Target, site: Site, part: Part, s: jax.Array) -> jax.Array:
    """Give each layer that a site runs in its factors.

    Args:
        target: whose site.
        site: which one.
        part: of its operand.
        s: `[layers, batch, columns]`.

    Returns:
        `[*layers around the site, batch, columns]`.
    """
    lengths = passes.lengths(site)
    is_own = target.own_layers(site, part)
    own = [n if o else 1 for n, o in zip(lengths, is_own, strict=True)]
    split = s.reshape(*own, *s.shape[1:])
    return jnp.broadcast_to(split, (*lengths, *s.shape[1:]))


def divide(site: Site, x: jax.Array, s: jax.Array) -> jax.Array:
    """Divide the input of a site by its factors.

    Args:
        site: which one.
        x: its input.
        s: `[batch, columns]`.

    Returns:
        The input, in its dtype.
    """
    by = _as_input(site, jnp.shape(x), s)
    return factors.divide(x, by)


def _as_input(site: Site, shape: Sequence[int], s: jax.Array) -> jax.Array:
    """Lay factors out as the input has its axes."""
    if site.primitive == "conv_general_dilated":
        window, feature = _window(site)
        split = s.reshape(s.shape[0], *window)
        index: list[Any] = [slice(None)] + [0] * len(window)
        index[1 + feature] = slice(None)
        axis = site.params["dimension_numbers"].lhs_spec[1]
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        return split[tuple(index)].reshape(sizes)
    side, other = 1 - site.operand, site.operand
    if site.primitive == "dot_general":
        contracted, batch = site.params["dimension_numbers"]
        part, *_ = parts(site)
        s = repeated_batch(site, s, part.view)
    else:
        numbers = site.params["ragged_dot_dimension_numbers"]
        contracted, batch = numbers.dot_dimension_numbers[0], ((), ())
        s = s[:1]
    order = sorted(range(len(contracted[side])), key=lambda i: contracted[other][i])
    axes = [*batch[side], *(contracted[side][i] for i in order)]
    split = s.reshape([shape[a] for a in axes])
    split = jnp.transpose(split, sorted(range(len(axes)), key=lambda i: axes[i]))
    sizes = [n if a in axes else 1 for a, n in enumerate(shape)]
    assert math.prod(sizes) == split.size
    return split.reshape(sizes)
