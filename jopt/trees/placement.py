"""Where the leaves of a checkpoint lie: shardings as JSON, and shards as blocks.

A sharding is written by its mesh (sizes, names and types of the axes, device numbers)
and its partition spec. It says where values lie, not what they are: in a process whose
devices cannot make up the mesh, the array comes back on the default device.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jopt.trees.manifest import Block


def encode_sharding(array: jax.Array) -> Any:
    """Write the sharding of an array as JSON.

    Args:
        array: a JAX array.

    Returns:
        None for the default device, a device number, or mesh and partition spec. Other
        kinds of shardings give None as well.

    >>> encode_sharding(jax.numpy.ones(2)) is None
    True
    """
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        return {
            "devices": [int(device.id) for device in mesh.devices.flat],
            "sizes": list(mesh.devices.shape),
            "names": list(mesh.axis_names),
            "types": [kind.name for kind in mesh.axis_types],
            "spec": [_encode_axis(axis) for axis in sharding.spec],
        }
    if len(sharding.device_set) == 1 and array.committed:
        device: Any = next(iter(sharding.device_set))
        return int(device.id)
    return None


def decode_sharding(node: Any) -> jax.sharding.Sharding | None:
    """Find the sharding that `encode_sharding` wrote, on the devices of this process.

    Args:
        node: what `encode_sharding` returned.

    Returns:
        A sharding, or None for the default device: also where devices are missing.

    >>> decode_sharding({"devices": [999], "sizes": [1], "names": ["data"]}) is None
    True
    """
    if node is None:
        return None
    devices = {device.id: device for device in jax.devices()}
    numbers = [node] if isinstance(node, int) else node["devices"]
    if not devices.keys() >= set(numbers):
        return None
    if isinstance(node, int):
        return jax.sharding.SingleDeviceSharding(devices[node])
    grid = np.array([devices[number] for number in numbers]).reshape(node["sizes"])
    kinds = tuple(AxisType[name] for name in node["types"])
    spec = [tuple(axis) if isinstance(axis, list) else axis for axis in node["spec"]]
    mesh = Mesh(grid, tuple(node["names"]), axis_types=kinds)
    return NamedSharding(mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]


def sharding_like(like: Any) -> jax.sharding.Sharding | None:
    """Find where a restored leaf goes, from the leaf of the template.

    Args:
        like: a JAX array or `jax.ShapeDtypeStruct`.

    Returns:
        Its sharding; None for the default device, and for an array that JAX may move.
    """
    if isinstance(like, jax.Array) and not like.committed:
        return None
    return getattr(like, "sharding", None)


def is_partitioned(sharding: jax.sharding.Sharding | None) -> bool:
    """Tell whether a sharding gives different elements to different devices."""
    return sharding is not None and not sharding.is_fully_replicated


def blocks_of(array: Any) -> Iterator[tuple[Block, np.ndarray[Any, Any]]]:
    """List the distinct shards of an array, one at a time on the host.

    Args:
        array: a NumPy array, which is one block, or a JAX array.

    Yields:
        The place of each block and its elements.

    >>> [block for block, _ in blocks_of(np.ones((2, 3)))]
    [((0, 2), (0, 3))]
    """
    if not isinstance(array, jax.Array) or not is_partitioned(array.sharding):
        yield tuple((0, size) for size in array.shape), np.asarray(array)
        return
    for block, shard in _shards(array).items():
        yield block, np.asarray(shard)


def read_block(array: Any, block: Block) -> np.ndarray[Any, Any]:
    """Read one block of an array, whatever the shards it lies in now.

    Args:
        array: a NumPy array or a JAX array of any sharding.
        block: the place to read.

    Returns:
        Its elements; where it is one shard, a view of that.

    >>> read_block(np.arange(6).reshape(2, 3), ((0, 2), (1, 2)))
    array([[1],
           [4]])
    """
    if not isinstance(array, jax.Array) or not is_partitioned(array.sharding):
        return np.asarray(array)[tuple(slice(*part) for part in block)]
    shards = _shards(array)
    if block in shards:
        return np.asarray(shards[block])
    result = np.empty([stop - start for start, stop in block], array.dtype)
    for place, shard in shards.items():
        common = [
            (max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, place, strict=True)
        ]
        if all(start < stop for start, stop in common):
            target = _relative(common, block)
            result[target] = np.asarray(shard)[_relative(common, place)]
    return result


def _relative(part: list[tuple[int, int]], whole: Block) -> tuple[slice, ...]:
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(part, whole, strict=True)
    )


def _shards(array: jax.Array) -> dict[Block, jax.Array]:
    """Map the place of each distinct shard to one device's copy of it."""
    found: dict[Block, jax.Array] = {}
    for shard in array.addressable_shards:
        block = tuple(
            part.indices(size)[:2]
            for part, size in zip(shard.index, array.shape, strict=True)
        )
        found.setdefault(block, shard.data)
    return found


def _encode_axis(axis: Any) -> Any:
    return list(axis) if isinstance(axis, tuple) else axis
