"""Where the matrices of a site stand in a leaf, as slices, reshapes and transposes.

    leaf  <->  [layers, batch, columns, outputs]

Each way undoes the other exactly. `weights` finds the layout of a site.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.programs.views import Atom


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the matrices of a site stand in a leaf.

    Attributes:
        shape: of the leaf.
        starts: index of the first element along each axis of the leaf.
        steps: between elements along each axis.
        groups: the atoms of layers, batch, columns and outputs, major to minor.
    """

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    groups: tuple[tuple[Atom, ...], ...]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The numbers of layers, batch entries, columns and outputs."""
        layers, batch, columns, outputs = (
            math.prod(atom.size for atom in atoms) for atoms in self.groups
        )
        return layers, batch, columns, outputs

    @property
    def is_whole(self) -> bool:
        """Whether every element of the leaf is in a matrix."""
        return math.prod(self.sizes) == math.prod(self.shape)

    @property
    def stacked_axes(self) -> frozenset[int]:
        """The axes of the leaf along which layers lie."""
        return frozenset(atom.axis for atom in self.groups[0])

    def to_matrices(self, leaf: jax.Array) -> jax.Array:
        """Read the matrices of a leaf.

        Args:
            leaf: of the layout's shape; weights or their mask.

        Returns:
            `[layers, batch, columns, outputs]`.
        """
        order = self._order()
        parts = leaf[self._region()].reshape([atom.size for _, atom in order])
        parts = lax.rev(parts, self._backwards())
        parts = jnp.transpose(parts, [place for place, _ in _ranked(order)])
        return parts.reshape(self.sizes)

    def from_matrices(self, matrices: jax.Array, leaf: jax.Array) -> jax.Array:
        """Put matrices back into a leaf.

        Args:
            matrices: as `to_matrices` returns.
            leaf: what to put them into; elements in no matrix stay as they are.

        Returns:
            The leaf, in its dtype.
        """
        order = self._order()
        ranked = _ranked(order)
        parts = matrices.reshape([atom.size for _, atom in ranked])
        back = sorted(range(len(ranked)), key=lambda i: ranked[i][0])
        parts = lax.rev(jnp.transpose(parts, back), self._backwards())
        region = self._region()
        counts = [len(range(*r.indices(n))) for r, n in self._cuts()]
        parts = parts.reshape(counts).astype(leaf.dtype)
        return parts if self.is_whole else leaf.at[region].set(parts)

    def overlaps(self, other: "Layout") -> bool:
        """Tell whether two layouts of one leaf may share elements.

        Args:
            other: of the same leaf.

        Returns:
            False only where they surely share none.
        """
        pairs = zip(self._region(), other._region(), strict=True)
        return all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in pairs)

    def _order(self) -> list[tuple[tuple[int, int], Atom]]:
        """List the atoms as they lie in the leaf, with group and rank in it."""
        every = [
            ((group, rank), atom)
            for group, atoms in enumerate(self.groups)
            for rank, atom in enumerate(atoms)
        ]
        return sorted(every, key=lambda entry: (entry[1].axis, -abs(entry[1].stride)))

    def _backwards(self) -> tuple[int, ...]:
        order = self._order()
        return tuple(i for i, (_, atom) in enumerate(order) if atom.stride < 0)

    def _cuts(self) -> list[tuple[slice, int]]:
        return list(zip(self._region(), self.shape, strict=True))

    def _region(self) -> tuple[slice, ...]:
        """The part of the leaf that the matrices are made of."""
        counts = [1] * len(self.shape)
        for _, atom in self._order():
            counts[atom.axis] *= atom.size
        return tuple(
            slice(start, start + (count - 1) * step + 1, step)
            for start, step, count in zip(self.starts, self.steps, counts, strict=True)
        )


def _ranked(order: Any) -> list[tuple[int, Atom]]:
    """Sort what lies in the leaf by group: its place there, and the atom."""
    places = sorted(range(len(order)), key=lambda i: order[i][0])
    return [(place, order[place][1]) for place in places]
