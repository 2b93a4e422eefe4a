"""How far the inputs of a layer have moved, when layers before it were changed.

With X the inputs that changed params give and X' those of the floats, of the same
batch, what corrects a layer for the difference needs

    X^T X   and   X^T (X' - X)

of both models at once. They run side by side in one program, under `vmap` over two
copies of the leaves that change; at each site a copy gathers the inputs of both along
that axis, so scans, branches and remat need nothing of their own, and no activation
outlives its layer.

Rows of X and X' must be those of the same tokens. They need not be where a
`ragged_dot` has them sorted by expert; nor can a copy gather inside of a `shard_map`:
`require_pairs` raises for both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jopt.programs.handlers import Use
from jopt.programs.matrices import input_matrix
from jopt.programs.passes import Pass, some_moments
from jopt.programs.sites import SiteTable
from jopt.programs.statistics import gram_below, product
from jopt.programs.targets import Target

_COPIES = "copies"


def drift_of_some(apply: Callable[..., Any], targets: Sequence[Target]) -> Pass:
    """Return the pass that keeps, where it is told to, Gram matrices and drifts.

    Args:
        apply: the function.
        targets: whose sites may be asked for, and whose leaves change.

    Returns:
        The pass, as `passes.moments_of_some`, but its params are a pair, as they are
        now and of floats; moments are `[batch, 2, columns, columns]`, X^T X and
        X^T (X' - X).
    """
    once = some_moments(apply, targets, _moments)
    changing = {target.leaf for target in targets}

    @jax.jit
    def run(params: Any, inputs: Any, values: Any) -> Any:
        now, floats = params
        treedef: Any
        leaves, treedef = jax.tree.flatten(now)
        both = [
            jnp.stack([leaf, other]) if i in changing else leaf
            for i, (leaf, other) in enumerate(
                zip(leaves, jax.tree.leaves(floats), strict=True)
            )
        ]
        axes = [0 if i in changing else None for i in range(len(leaves))]

        def one(leaves: Any) -> Any:
            return once(treedef.unflatten(leaves), inputs, values)

        found = jax.vmap(one, in_axes=(axes,), axis_name=_COPIES)(both)
        return jax.tree.map(lambda x: x[0], found)

    return run


def require_pairs(table: SiteTable) -> None:
    """Raise unless both models have the same tokens in the same rows.

    Args:
        table: of the sites of the function.

    Raises:
        ValueError: a site is a `ragged_dot`, or inside of a `shard_map`.
    """
    for site in table:
        is_sorted = site.primitive in ("ragged_dot", "ragged_dot_general")
        if is_sorted or any(around.kind == "devices" for around in site.around):
            what = "a ragged_dot" if is_sorted else "inside of a shard_map"
            raise ValueError(
                "correction must be 0 where the inputs of both models are not side by "
                f"side, got {site.name!r}, which is {what}; leave it out"
            )


def _moments(use: Use, onto: jax.Array | None = None) -> jax.Array:
    # Along an axis that is there: what JAX gathers along a new one has, on an explicit
    # mesh, the sharding of the axes before it was added.
    x, floats = lax.all_gather(input_matrix(use)[None], _COPIES, tiled=True)
    moments = jnp.stack([gram_below(x), product(x, floats - x)], axis=1)
    return moments if onto is None else onto + moments
