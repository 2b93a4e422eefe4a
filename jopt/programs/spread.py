"""Where algorithms on columns compute when params lie on a mesh.

The outputs of a matrix do not depend on each other but for counts, so a matrix is split
by outputs over the devices that hold its leaf, whatever axis the leaf is split along;
what is known of its inputs is on every device. Meshes are taken as automatic ones: an
explicit one would have every operation say what the compiler is told here once.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jopt.programs.layouts import Layout


def as_automatic(x: Any) -> jax.Array:
    """Take an array as one on an automatic mesh; nothing moves."""
    x = jax.numpy.asarray(x)
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return x
    return jax.device_put(x, NamedSharding(_automatic(sharding.mesh), sharding.spec))


@contextlib.contextmanager
def automatic() -> Iterator[None]:
    """Compute on the automatic twin of the mesh that the caller has set, if any."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        yield
        return
    with jax.set_mesh(_automatic(mesh)):
        yield


def on_every_device(x: jax.Array) -> jax.Array:
    """Give every device of an array's mesh the whole of it."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return x
    whole = PartitionSpec()  # type: ignore[no-untyped-call]
    return jax.device_put(x, NamedSharding(_automatic(sharding.mesh), whole))


def beside(x: jax.Array, leaf: Any) -> jax.Array:
    """Give every device of the mesh of a leaf the whole of an array."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return x
    whole = PartitionSpec()  # type: ignore[no-untyped-call]
    return jax.device_put(x, NamedSharding(sharding.mesh, whole))


def by_outputs(leaf: jax.Array, layout: Layout) -> NamedSharding | None:
    """Split matrices by their outputs.

    Args:
        leaf: that holds them.
        layout: where.

    Returns:
        The sharding of `[batch, columns, outputs]`: whole on every device if the
        outputs do not divide; None for a leaf that is on no mesh.
    """
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    names = jax.tree.leaves(tuple(sharding.spec))
    num_parts = math.prod(sharding.mesh.shape[name] for name in names)
    is_even = layout.sizes[3] % num_parts == 0
    spec = PartitionSpec(None, None, tuple(names) if is_even and names else None)  # type: ignore[no-untyped-call]
    return NamedSharding(sharding.mesh, spec)


def placed_as(x: jax.Array, like: Any) -> jax.Array:
    """Put an array where another one lies, on the mesh that is set if nowhere."""
    if getattr(like, "committed", False):
        return jax.device_put(x, like.sharding)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return x
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))  # type: ignore[no-untyped-call]


def _automatic(mesh: Any) -> Mesh:
    return Mesh(
        mesh.devices,
        mesh.axis_names,
        axis_types=(AxisType.Auto,) * len(mesh.axis_names),
    )


def each(function: Callable[..., Any], *arrays: Any) -> Any:
    """Map over the first axis, one after the other; nothing is copied for a single.

    Args:
        function: of one entry of each array, to a tree of arrays.
        arrays: with an axis in front, or None.

    Returns:
        The results, with that axis in front.
    """
    if jax.tree.leaves(arrays)[0].shape[0] > 1:
        return lax.map(lambda each: function(*each), arrays)
    alone = function(*jax.tree.map(lambda x: x[0], arrays))
    return jax.tree.map(lambda x: x[None], alone)


@functools.partial(jax.jit, static_argnames="layout")
def read(leaf: jax.Array, *, layout: Layout) -> jax.Array:
    """Read all matrices of a leaf.

    Args:
        leaf: weights, or their mask.
        layout: of the matrices.

    Returns:
        `[layers, batch, columns, outputs]`.
    """
    return layout.to_matrices(leaf)


# Its stub has no types.
constrain: Any = lax.with_sharding_constraint
