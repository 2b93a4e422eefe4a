"""Scales of the matrices of a layer, and of the leaf that they are put together in."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.scales import Scale, spread_groups
from jopt.arrays.specs import QuantSpec
from jopt.programs.layouts import Layout


def layer_scale(
    static: Scale,
    shape: tuple[int, ...],
    layout: Layout,
    spec: QuantSpec,
    layer: Any,
) -> Scale:
    """Take the scales of one layer's matrices out of those of a leaf.

    Args:
        static: scales of the leaf.
        shape: of the leaf.
        layout: of its matrices.
        spec: of the leaf.
        layer: which layer.

    Returns:
        Fields `[batch, groups, outputs]`; outer scales `[batch, 1, outputs]`.
    """
    num_layers, _, columns, _ = layout.sizes
    width = spec.group_size or columns

    def of(field: jax.Array, every: int) -> jax.Array:
        spread = jnp.broadcast_to(spread_groups(field, shape), shape)
        matrices = layout.to_matrices(spread)
        one = matrices[0] if num_layers == 1 else matrices[layer]
        return one[:, ::every]

    scale, zero_point, outer = static
    return Scale(
        of(scale, width),
        None if zero_point is None else of(zero_point, width),
        None if outer is None else of(outer, columns),
    )


def leaf_scale(
    static: Scale,
    shape: tuple[int, ...],
    layout: Layout,
    spec: QuantSpec,
    layers: dict[int, Scale],
) -> Scale:
    """Put the scales of layers in the place of those of rounding to nearest.

    Args:
        static: scales of the leaf.
        shape: of the leaf.
        layout: of its matrices.
        spec: of the leaf.
        layers: layer to fields `[batch, groups, outputs]`.

    Returns:
        The scales of the leaf.
    """
    columns = layout.sizes[2]

    def of(before: jax.Array, own: dict[int, jax.Array]) -> jax.Array:
        spread = jnp.broadcast_to(spread_groups(before, shape), shape)
        matrices = layout.to_matrices(spread)
        for layer, values in own.items():
            wide = jnp.repeat(values, columns // values.shape[1], axis=1)
            matrices = matrices.at[layer].set(wide.astype(matrices.dtype))
        whole = layout.from_matrices(matrices, spread)
        steps = [n // kept for n, kept in zip(shape, before.shape, strict=True)]
        return whole[tuple(slice(None, None, step) for step in steps)]

    fields = [
        None
        if before is None
        else of(before, {layer: scale[i] for layer, scale in layers.items()})  # type: ignore[misc]
        for i, before in enumerate(static)
    ]
    return Scale(*fields)  # type: ignore[arg-type]


def leaf_input_scale(
    shape: tuple[int, ...], layout: Layout, layers: dict[int, jax.Array]
) -> jax.Array:
    """Put the input scales of layers together.

    Args:
        shape: of the leaf.
        layout: of its matrices.
        layers: layer to `[batch, columns]`.

    Returns:
        float32 of the leaf's rank, of size 1 along the outputs, where they are axes of
        their own.
    """
    ones = jnp.ones(shape, jnp.float32)
    matrices = layout.to_matrices(ones)
    for layer, values in layers.items():
        matrices = matrices.at[layer].set(values[..., None])
    whole = layout.from_matrices(matrices, ones)
    inner = {atom.axis for group in layout.groups[:3] for atom in group}
    return whole[
        tuple(
            slice(None) if axis in inner or not layout.is_whole else slice(0, 1)
            for axis in range(len(shape))
        )
    ]
