"""One axis cut into pieces and put together again, on the devices where it lies.

On an automatic mesh, and without one, these are plain reshapes. On an explicit mesh JAX
asks for the sharding of a reshape to be named: an axis stays split over the devices as
long as whole groups lie on each, and is brought together otherwise.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType


def is_sharded(array: jax.Array) -> bool:
    """Say whether a mesh may split the array behind our back (not `shard_map`)."""
    mesh = jax.typeof(array).sharding.mesh
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != AxisType.Manual and size > 1 for kind, size in sizes)


def is_explicit(array: jax.Array) -> bool:
    """Say whether the type of the array names a sharding that has to be kept."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def varying_axes(array: jax.Array) -> tuple[str, ...]:
    """Return the axes of `shard_map` over which an array differs between devices."""
    return tuple(sorted(jax.typeof(array).manual_axis_type.varying))


def named_sharding(array: jax.Array) -> jax.sharding.NamedSharding | None:
    """Return the sharding that an explicit mesh gives an array; elsewhere None."""
    return jax.typeof(array).sharding if is_explicit(array) else None


def num_parts(array: jax.Array, axis: int) -> int:
    """Return into how many parts an explicit mesh splits an axis; elsewhere 1.

    >>> num_parts(jnp.ones((2, 8)), -1)
    1
    """
    if not is_explicit(array):
        return 1
    sharding = jax.typeof(array).sharding
    names = _names(sharding.spec[axis])
    return math.prod(sharding.mesh.shape[name] for name in names)


def has_whole_bytes(array: jax.Array) -> bool:
    """Say whether 8 divides what each device holds of the last axis.

    Of a traced array on an automatic mesh this is not known, and the answer is that for
    the whole axis.

    >>> has_whole_bytes(jnp.ones((2, 8))), has_whole_bytes(jnp.ones((8, 2)))
    (True, False)
    """
    if array.ndim == 0:
        return False
    held = array.shape[-1] // num_parts(array, -1)
    if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
        held = array.sharding.shard_shape(array.shape)[-1]
    return held % 8 == 0


def split_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Turn `[..., groups * size, ...]` into `[..., groups, size, ...]`.

    Args:
        array: an array.
        axis: counted from the front.
        size: of a group; divides that of the axis.

    Returns:
        The array with one axis more.

    >>> split_axis(jnp.arange(6), 0, 3)
    Array([[0, 1, 2],
           [3, 4, 5]], dtype=int32)
    """
    groups = array.shape[axis] // size
    shape = (*array.shape[:axis], groups, size, *array.shape[axis + 1 :])
    if not is_explicit(array):
        return array.reshape(shape)
    sharding = jax.typeof(array).sharding
    spec = sharding.spec
    held = spec[axis] if groups % num_parts(array, axis) == 0 else None
    split = (*spec[:axis], held, None, *spec[axis + 1 :])
    return lax.reshape(array, shape, out_sharding=sharding.update(spec=split))


def merge_axis(array: jax.Array, axis: int) -> jax.Array:
    """Turn `[..., groups, size, ...]` into `[..., groups * size, ...]`.

    Args:
        array: an array whose axis after the given one lies whole on every device.
        axis: that of the groups, counted from the front.

    Returns:
        The array with one axis less, split as its groups were.

    >>> merge_axis(jnp.ones((2, 3, 4)), 1).shape
    (2, 12)
    """
    merged = array.shape[axis] * array.shape[axis + 1]
    shape = (*array.shape[:axis], merged, *array.shape[axis + 2 :])
    if not is_explicit(array):
        return array.reshape(shape)
    sharding = jax.typeof(array).sharding
    spec = (*sharding.spec[: axis + 1], *sharding.spec[axis + 2 :])
    return lax.reshape(array, shape, out_sharding=sharding.update(spec=spec))


def repeat(array: jax.Array, size: int, axis: int) -> jax.Array:
    """Repeat every element along an axis, as `numpy.repeat` does.

    Args:
        array: an array.
        size: how often.
        axis: counted from the front.

    Returns:
        The array, `size` times as long along the axis.

    >>> repeat(jnp.array([1, 2]), 2, 0)
    Array([1, 1, 2, 2], dtype=int32)
    """
    lanes = jnp.expand_dims(array, axis + 1)
    shape = (*array.shape[: axis + 1], size, *array.shape[axis + 1 :])
    return merge_axis(jnp.broadcast_to(lanes, shape), axis)


def spread_like(values: jax.Array, array: jax.Array) -> jax.Array:
    """Split values, one per index of the first axis of `array`, as that axis is."""
    sharding = named_sharding(array)
    if sharding is None:
        return values
    return _reshard(values, sharding.update(spec=(sharding.spec[0],)))


def lay_like(values: jax.Array, array: jax.Array) -> jax.Array:
    """Split values that broadcast with `array` over the devices as it is split."""
    sharding = named_sharding(array)
    if sharding is None or values.ndim != array.ndim:
        return values
    pairs = zip(values.shape, sharding.spec, strict=True)
    spec = tuple(None if size == 1 else names for size, names in pairs)
    return _reshard(values, sharding.update(spec=spec))


def lay_out(array: jax.Array, sharding: Any) -> jax.Array:
    """Give an array the sharding that was asked for; as it is where that is None."""
    return array if sharding is None else _reshard(array, sharding)


def insert_axis(sharding: Any, place: int, array: jax.Array, axis: int) -> Any:
    """Return a sharding for one axis more, split as that of an array where it can be.

    Args:
        sharding: a `NamedSharding`, or None.
        place: of the new axis.
        array: which it comes from.
        axis: of the array.

    Returns:
        The sharding; None where none was given.
    """
    if sharding is None:
        return None
    spec = tuple(sharding.spec)
    names = jax.typeof(array).sharding.spec[axis]
    names = names if _is_free(names, spec) else None
    split = (*spec[:place], names, *spec[place:])
    return sharding.update(spec=split)


def align(pair: Sequence[jax.Array], places: Sequence[int]) -> list[jax.Array]:
    """Split one axis of two arrays over the same devices of an explicit mesh.

    Args:
        pair: two arrays.
        places: which axis of each; of one size.

    Returns:
        The arrays, split there as the one that was, if the other may be too, and
        otherwise not at all.

    >>> [x.shape for x in align([jnp.ones((2, 3)), jnp.ones((3, 4))], [1, 0])]
    [(2, 3), (3, 4)]
    """
    if not any(map(is_explicit, pair)):
        return list(pair)
    specs = [tuple(jax.typeof(x).sharding.spec) for x in pair]
    lhs, rhs = (spec[place] for spec, place in zip(specs, places, strict=True))
    others = [
        names
        for spec, place in zip(specs, places, strict=True)
        for names in (*spec[:place], *spec[place + 1 :])
    ]
    common = lhs or rhs
    if (lhs and rhs and lhs != rhs) or not _is_free(common, others):
        common = None
    aligned = []
    for x, spec, place in zip(pair, specs, places, strict=True):
        spec = (*spec[:place], common, *spec[place + 1 :])
        aligned.append(_reshard(x, jax.typeof(x).sharding.update(spec=spec)))
    return aligned


def _is_free(part: Any, others: Sequence[Any]) -> bool:
    """Tell whether no other axis is split by the same mesh axes."""
    return not set(_names(part)) & {name for other in others for name in _names(other)}


def _names(part: Any) -> tuple[Any, ...]:
    """List the mesh axes that split one axis."""
    return part if isinstance(part, tuple) else (part,) if part else ()


def gather_values(values: jax.Array) -> jax.Array:
    """Bring values, one per layer, to every device of an explicit mesh."""
    sharding = named_sharding(values)
    return values if sharding is None else _reshard(values, sharding.update(spec=()))


def _reshard(array: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.sharding.reshard(array, sharding)  # type: ignore[no-untyped-call]
