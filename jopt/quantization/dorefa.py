"""DoReFa: weights on k evenly spaced bits of their squashed and normalised values.

    r = tanh(w) / max |tanh(w)|,    q = 2 round((2^k - 1) (r + 1) / 2) / (2^k - 1) - 1

and sign(w) mean |w| for one bit (Zhou et al., DoReFa-Net, arXiv:1606.06160, equations 5
to 9). The rest of the method is `jopt.fake_quantize`: activations as an asymmetric spec
under ranges [0, 1], and gradients by `gradients=` with stochastic rounding.

For k > 1 levels are odd multiples of 1 / (2^k - 1), none of them zero: what is trained
is stored, exactly, by an integer format of k + 1 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.quantization.specs import masks_by_path
from jopt.trees import paths, rules
from jopt.updates.project import (
    ProjectState,
    project,
    require_params,
    require_transformation,
)
from jopt.updates.states import is_masked_node


def dorefa(
    inner: optax.GradientTransformation,
    bits: int,
    *,
    begin_step: int = 0,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that params are the DoReFa weights of its latents.

    params = q(latent),   g_latent = g * d(tanh(w) / max |tanh(w)|)/dw

    Rounding is passed straight through; squashing is not. As published, the first and
    the last layer stay float: leave them out by `select`. No level is zero, so
    leaves that are pruned inside raise.

    Args:
        inner: any Optax transformation.
        bits: k, in 1 to 7.
        begin_step: count of the first update that quantizes.
        select: which leaves; float leaves with two axes, stacked ones not counted, when
            None.
        stacked_axes: which axis stacks layers, each with a maximum of its own: an int
            or rules `{pattern: axis}`.

    Returns:
        A transformation with one latent copy. `jopt.quantize(params, spec)` stores what
        it makes, with spec `jopt.QuantSpec(int3, axis=(), scale_dtype=jnp.float32)` for
        two bits, and so on; for one bit with `jopt.formats.binary`; with the stacked
        axis as `axis` where layers are stacked.

    Raises:
        TypeError: `inner` is no transformation.
        ValueError: `bits` is out of range, or a leaf is pruned inside.

    References:
        Zhou et al., DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks
        with Low Bitwidth Gradients, arXiv:1606.06160.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.dorefa(optax.sgd(0.1), 2)
    >>> params = {"w": jnp.array([[2.0, 0.1], [-0.5, -1.5]])}
    >>> updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
    >>> (3 * optax.apply_updates(params, updates)["w"]).round(4).tolist()
    [[3.0, 1.0], [-1.0, -3.0]]
    """
    if not isinstance(bits, int) or not 1 <= bits <= 7:
        raise ValueError(f"bits must be an integer in 1 to 7, got {bits!r}")
    inner = require_transformation(inner, "dorefa")

    def layers_of(params: optax.Params) -> Any:
        """Map a function of one layer over the leaves, with what is stacked in them."""
        treedef: Any = jax.tree.structure(params)
        stacks = rules.stacked_axis_of(stacked_axes, params)

        def over(fn: Any, *trees: Any) -> Any:
            columns = zip(*(treedef.flatten_up_to(tree) for tree in trees), strict=True)
            return treedef.unflatten([
                fn(*leaves) if axis is None or is_masked_node(leaves[0])
                else jax.vmap(fn, axis, axis)(*leaves)
                for axis, leaves in zip(stacks, columns, strict=True)
            ])  # fmt: skip

        return over

    def bind(params: optax.Params) -> optax.GradientTransformationExtraArgs:
        chosen = rules.select_leaves(select, params, stacked_axes=stacked_axes)
        tree = jax.tree.unflatten(jax.tree.structure(params), chosen)
        over = layers_of(params)

        def layer(w: Any) -> Any:
            return w if is_masked_node(w) else quantized(w, bits)

        return project(
            inner,
            lambda latent: over(layer, latent),
            begin_step=begin_step,
            select=tree,
        )

    def init(params: optax.Params) -> ProjectState:
        state: ProjectState = bind(params).init(params)
        masked = {*masks_by_path(state.inner_state)} & {*paths.leaf_paths(state.latent)}
        if masked:
            raise ValueError(
                f"dorefa needs weights without masks, got {sorted(masked)}, which are "
                "pruned inside: its grid has no zero; leave them out by select="
            )
        return state

    def update(
        updates: optax.Updates,
        state: ProjectState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        require_params(params, "dorefa")
        if bits > 1:
            on = state.count > begin_step

            def chained(w: Any, g: jax.Array) -> jax.Array:
                if is_masked_node(w):
                    return g
                _, pull = jax.vjp(squashed, w.astype(jnp.float32))
                return jnp.where(on, pull(g.astype(jnp.float32))[0].astype(g.dtype), g)

            updates = layers_of(params)(chained, state.latent, updates)
        return bind(params).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def squashed(w: jax.Array) -> jax.Array:
    """Return tanh(w) / max |tanh(w)|, zeros for zeros.

    Args:
        w: float32 array.

    Returns:
        Numbers in [-1, 1].
    """
    t = jnp.tanh(w)
    largest = jnp.max(jnp.abs(t), initial=0.0)
    return t / jnp.where(largest == 0, 1.0, largest)


def quantized(w: jax.Array, bits: int) -> jax.Array:
    """Return the DoReFa weights of an array.

    Args:
        w: float array.
        bits: k.

    Returns:
        Of the shape and dtype of `w`.
    """
    wide = w.astype(jnp.float32)
    if bits == 1:
        mean = jnp.mean(jnp.abs(wide))
        return jnp.where(wide >= 0, mean, -mean).astype(w.dtype)
    top = 2**bits - 1
    levels = 2.0 * jnp.round((squashed(wide) + 1.0) * (top / 2)) - top
    return (levels * jnp.float32(1 / top)).astype(w.dtype)
