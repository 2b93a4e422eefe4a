"""The matrix that meets a parameter: what an algorithm on columns sees of a site.

    y = x w,    x [batch, rows, columns]

for every operation that multiplies: `dot_general` with any dimension numbers,
convolutions, whose columns are windows, and `ragged_dot`, whose batch are the groups.

On an explicit mesh rows and columns of dot products stay split as the axes that they
are made of, and the rows of a convolution as its images.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jopt.arrays.axes import named_sharding
from jopt.programs.handlers import Use, to_array


def input_matrix(use: Use) -> jax.Array:
    """Arrange what meets the parameter as rows of contracted columns.

    Args:
        use: of a site that multiplies.

    Returns:
        float32 `[batch, rows, columns]`: batch dimensions (groups of a convolution or a
        `ragged_dot` among them) merged, then what stays, then what is contracted, in
        the order of the parameter's contracted axes. Rows of other groups are zero.

    Raises:
        ValueError: the site looks up, or the parameter is the image of a convolution.
    """
    x = jnp.asarray(to_array(use.x)).astype(jnp.float32)
    match use.site.primitive:
        case "dot_general":
            return _dot(use, x)
        case "conv_general_dilated" if use.site.operand == 1:
            return _conv(use, x)
        case "ragged_dot_general" | "ragged_dot" if use.site.operand == 1:
            return _ragged(use, x)
    raise ValueError(
        f"a matrix of inputs exists where a parameter multiplies, got site "
        f"{use.site.name!r} ({use.site.primitive}); leave it out with select"
    )


def _dot(use: Use, x: jax.Array) -> jax.Array:
    contracted, batch = use.site.params["dimension_numbers"]
    side, other = 1 - use.site.operand, use.site.operand
    # In the order in which the parameter has its contracted axes.
    order = sorted(range(len(contracted[side])), key=lambda i: contracted[other][i])
    columns = [contracted[side][i] for i in order]
    return _arranged(x, list(batch[side]), columns)


def _conv(use: Use, x: jax.Array) -> jax.Array:
    images = use.site.params["dimension_numbers"].lhs_spec[0]
    is_grouped = use.site.params["batch_group_count"] > 1
    split = [[], [] if is_grouped else [images], []]
    return _placed(functools.partial(_windows, use), x, split)


def _windows(use: Use, x: jax.Array) -> jax.Array:
    params = use.site.params
    numbers = params["dimension_numbers"]
    kernel = to_array(use.weight).shape
    window = tuple(kernel[axis] for axis in numbers.rhs_spec[2:])
    x = jnp.transpose(x, numbers.lhs_spec)
    patches = lax.conv_general_dilated_patches(
        x,
        window,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,
    )
    # [images, features * window, *places], features major, groups the most so.
    groups, images = params["feature_group_count"], params["batch_group_count"]
    rows = jnp.moveaxis(patches, 1, -1)
    rows = rows.reshape(images, -1, groups, rows.shape[-1] // groups)
    rows = jnp.moveaxis(rows, 2, 1)
    rows = rows.reshape(images * groups, *rows.shape[2:])
    features = rows.shape[-1] // math.prod(window)
    places = sorted(range(1, len(numbers.rhs_spec)), key=lambda i: numbers.rhs_spec[i])
    split = rows.reshape(*rows.shape[:2], features, *window)
    order = [0, 1, *(1 + place for place in places)]
    return jnp.transpose(split, order).reshape(rows.shape)


def _ragged(use: Use, x: jax.Array) -> jax.Array:
    numbers = use.site.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    if batch[0] or ragged in contracted[0] or not numbers.rhs_group_dimensions:
        raise ValueError(
            "a ragged product needs ragged rows and no batch dimension for a matrix of "
            f"inputs, got {numbers} at site {use.site.name!r}; leave it out with select"
        )
    rows = _arranged(x, [], [contracted[0][0]], first=ragged)
    sizes = jnp.asarray(use.rest[0])
    ends = jnp.cumsum(sizes)[:, None]
    place = jnp.arange(rows.shape[1])[None, :]
    inside = (place >= ends - sizes[:, None]) & (place < ends)
    return jnp.where(inside[..., None], rows, 0.0)


def _arranged(
    x: Any, batch: list[int], columns: list[int], *, first: int | None = None
) -> jax.Array:
    """Merge axes: those of the batch, all others but the columns, and the columns."""
    rows = [axis for axis in range(x.ndim) if axis not in (*batch, *columns)]
    rows.sort(key=lambda axis: axis != first)
    merged = (batch, rows, columns)
    shape = [math.prod(x.shape[a] for a in axes) for axes in merged]

    def arrange(x: Any) -> jax.Array:
        return jnp.transpose(x, (*batch, *rows, *columns)).reshape(shape)

    return _placed(arrange, x, merged)


def _placed(
    arrange: Callable[[Any], jax.Array], x: Any, merged: Sequence[Sequence[int]]
) -> jax.Array:
    """Split each axis of a result over the devices that the merged axes lie on."""
    sharding = named_sharding(x)
    if sharding is None:
        return arrange(x)
    spec = tuple(_names(sharding.spec, axes) for axes in merged)
    place = jax.sharding.auto_axes(arrange, out_sharding=sharding.update(spec=spec))
    return jnp.asarray(place(x))


def _names(spec: PartitionSpec, axes: Sequence[int]) -> tuple[str, ...]:
    """List the mesh axes over which some axes are split, the outermost first."""
    found: list[str] = []
    for axis in axes:
        names = spec[axis]
        found += names if isinstance(names, tuple) else [names] if names else []
    return tuple(found)
