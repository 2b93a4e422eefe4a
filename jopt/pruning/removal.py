"""A pass that multiplies by what masks remove, where no Gram matrix was kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.programs import passes
from jopt.programs.handlers import Handler, Use, to_array
from jopt.programs.matrices import input_matrix
from jopt.programs.operations import Site
from jopt.programs.probes import everywhere
from jopt.programs.targets import Target
from jopt.programs.weights import parts, repeated_batch, weight_matrix


def errors_of_all(apply: Callable[..., Any], targets: Sequence[Target]) -> passes.Pass:
    """Return the pass that measures what masks remove.

    Args:
        apply: the function.
        targets: whose sites.

    Returns:
        The pass; its values are what `removing` returns. It gives site name to
        `{"errors"}` with `[removed, whole]` squared norms of the results of each part.
    """

    def summarize(use: Use) -> Any:
        x = input_matrix(use)
        operand = jnp.asarray(to_array(use.weight))
        errors = []
        for part, kept in zip(parts(use.site), use.value, strict=True):
            if kept is None:  # a part that is no target
                errors.append(jnp.zeros(2, jnp.float32))
                continue
            w = weight_matrix(use.site, part.of(operand)).astype(jnp.float32)
            mask = repeated_batch(use.site, kept, part.view)
            errors.append(everywhere(_squares, x, w, mask))
        return {"errors": tuple(errors)}

    def initial(site: Site) -> Any:
        return {"errors": tuple(jnp.zeros(2, jnp.float32) for _ in parts(site))}

    handler = Handler(
        lambda use: (use.run(), summarize(use)),
        passes.at(targets),
        initial,
        lambda a, b: jax.tree.map(jnp.add, a, b),
    )
    return passes.observed(apply, handler)


def removing(
    targets: Sequence[Target], masks: Mapping[int, jax.Array]
) -> dict[str, Any]:
    """Say which weights every site is to be measured without.

    Args:
        targets: all that the pass knows.
        masks: of targets by their position, `[layers, batch, columns, outputs]`.

    Returns:
        Site name to a mask per part, with an axis per scan over layers around; None
        for a part that is no target.
    """
    values: dict[str, list[Any]] = {}
    for i, target in enumerate(targets):
        for site, part in target.uses:
            lengths = passes.lengths(site)
            own = target.own_layers(site, part)
            own = tuple(
                is_own
                for is_own, around in zip(own, passes.stacking(site), strict=True)
                if around.kind == "layers"
            )
            each = masks[i].shape[1:]
            split = [n if is_own else 1 for n, is_own in zip(lengths, own, strict=True)]
            mask = masks[i].reshape(*split, *each)
            every = values.setdefault(site.name, [None] * len(parts(site)))
            every[passes.place(site, part)] = jnp.broadcast_to(mask, (*lengths, *each))
    return {name: tuple(every) for name, every in values.items()}


def _squares(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    """Return ||x D||^2 and ||x w||^2, D what the mask removes of w."""
    removed = jnp.where(mask, 0.0, w)
    return jnp.stack(
        [
            jnp.sum(
                jnp.square(jnp.einsum("bmk,bkn->bmn", x, each, precision="highest"))
            )
            for each in (removed, w)
        ]
    )
