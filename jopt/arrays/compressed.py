"""The base of arrays that are stored in fewer bytes than they stand for.

A compressed array may be passed wherever a function expects a float array: an
interpreter of the function recognises it by this class, hands it to whoever knows how
to multiply with it, and otherwise calls `to_array`. So it is always right, and at worst
not fast.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec


class CompressedArray(abc.ABC):
    """A pytree of arrays that stands for one array.

    Invariants of a subclass:
        * It is a registered pytree whose children are arrays.
        * `shape` follows from the children, so that `lax.scan` may slice a leading
          axis off all of them, and `vmap` may add one.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""

    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """The bytes of all children."""
        return sum(c.size * c.dtype.itemsize for c in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all children over the number of elements."""
        return 8 * self.nbytes / max(self.size, 1)

    @abc.abstractmethod
    def to_array(self) -> jax.Array:
        """Compute the array that it stands for."""

    def after(
        self, primitive: str, params: Mapping[str, Any], operands: Sequence[Any]
    ) -> "CompressedArray | tuple[CompressedArray, ...] | None":
        """Take a view without decompressing.

        Args:
            primitive: the name of an operation that only moves, slices or casts.
            params: its parameters.
            operands: the other operands, such as the start of a slice; compressed ones
                among them where several are joined.

        Returns:
            The view, compressed, such that its `to_array` has the very numbers of the
            operation on `to_array()`, or a tuple of all results of the operation; None
            if that is not possible.
        """
        return None

    def partition_specs(
        self, spec: PartitionSpec, sizes: Mapping[str, int]
    ) -> "CompressedArray | None":
        """Say how the children lie on the devices of a `shard_map`.

        Args:
            spec: how the array that it stands for is split.
            sizes: of the mesh axes.

        Returns:
            This array with a partition spec for each child, such that the children on
            a device stand for its shard; None if that is not possible.
        """
        return None
