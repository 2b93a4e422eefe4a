"""The grid of a leaf on one step, and how latents land on it.

    params = land(latent, grid, count)

By default every latent goes to the nearest level. A `GridProjection` sees the latents
of all leaves and remembers something, such as which weights keep their level for good.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jopt.arrays.codes import compute_levels, scale_levels
from jopt.arrays.rounding import Rounding, nearest
from jopt.arrays.scales import Scale
from jopt.arrays.specs import QuantSpec
from jopt.updates.states import is_masked_node


class Grid(NamedTuple):
    """Where the weights of one leaf may lie on one step.

    Attributes:
        spec: the format, and which weights share a scale.
        scale: what one level is worth.
        bits: a width that replaces that of an integer format, traced; or None.
        rounding: the rule that was asked for.
        key: for that rule, of this leaf and this step; or None.
    """

    spec: QuantSpec
    scale: Scale
    bits: Any = None
    rounding: Rounding = nearest
    key: jax.Array | None = None

    def levels(self, w: jax.Array, *, rounding: Rounding | None = None) -> jax.Array:
        """Return the levels that weights round to, in units of the scale.

        Args:
            w: float array of the leaf's shape.
            rounding: a rule in place of the one that was asked for.

        Returns:
            float32 levels of the shape of `w`; of integer formats whole numbers, zero
            being zero.
        """
        return compute_levels(
            w,
            self.scale,
            self.spec,
            bits=self.bits,
            rounding=self.rounding if rounding is None else rounding,
            key=self.key,
        )

    def values(self, levels: jax.Array, dtype: Any) -> jax.Array:
        """Return what levels are worth.

        Args:
            levels: float32 levels.
            dtype: of the weights.

        Returns:
            Weights on the grid.
        """
        return scale_levels(levels, self.scale, dtype)

    def snap(self, w: jax.Array, *, rounding: Rounding | None = None) -> jax.Array:
        """Round weights to the grid.

        Args:
            w: float array of the leaf's shape.
            rounding: a rule in place of the one that was asked for; `down` and `up` of
                `jopt.rounding` give the two neighbours on the grid.

        Returns:
            Weights on the grid, of the shape and dtype of `w`.
        """
        return self.values(self.levels(w, rounding=rounding), w.dtype)


class GridProjection(NamedTuple):
    """A projection on a grid with memory.

    Trees are as params, with `optax.MaskedNode()` where a leaf is not selected.

    Attributes:
        init: `latent -> memory`.
        update: `(latent, grids, memory, count) -> (params, memory)`, `grids` a tree
            with a `Grid` for each leaf.
        frozen: `memory -> tree of bools`, which latents stay where their params are; or
            None for none.
        is_hard: whether params lie on the grid on every step.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]
    frozen: Callable[[Any], Any] | None = None
    is_hard: bool = True


Landing = Callable[[jax.Array, Grid, jax.Array], jax.Array] | GridProjection


def as_grid_projection(projection: Landing | None) -> GridProjection:
    """Turn what a person passes into a projection of trees.

    Args:
        projection: one with memory, a function `(latent, grid, count) -> params` of one
            leaf, or None for the nearest level.

    Returns:
        A projection of trees.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(projection, GridProjection):
        return projection
    if projection is None:
        return _by_leaf(lambda latent, grid, count: grid.snap(latent), is_hard=True)
    if not callable(projection):
        raise TypeError(
            "projection must be one of jopt.projections or a function "
            f"(latent, grid, count) -> params, got {projection!r}; None rounds to the "
            "nearest level"
        )
    return _by_leaf(projection, is_hard=False)


def _by_leaf(
    land: Callable[[jax.Array, Grid, jax.Array], jax.Array], *, is_hard: bool
) -> GridProjection:
    def update(latent: Any, grids: Any, memory: Any, count: Any) -> tuple[Any, Any]:
        landed = jax.tree.map(
            lambda w, grid: w if is_masked_node(w) else land(w, grid, count),
            latent,
            grids,
            is_leaf=is_masked_node,
        )
        return landed, memory

    return GridProjection(lambda latent: (), update, is_hard=is_hard)
