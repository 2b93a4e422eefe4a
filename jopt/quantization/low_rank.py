"""Weights of few bits plus low rank: what of a leaf they are, and how they multiply.

    x (Q + A B) = x Q + (x A) B

The product with the codes Q is that of any quantized weight; the two thin ones take the
input as it is, unrounded.
"""

import string
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jopt.arrays.quantized import QuantizedArray
from jopt.arrays.quantized_plus_low_rank import QuantizedPlusLowRank
from jopt.programs.handlers import Use, to_array
from jopt.programs.layouts import Layout
from jopt.programs.operations import Site
from jopt.programs.spread import automatic, beside


def is_aligned(layout: Layout) -> bool:
    """Tell whether the inputs and the outputs of matrices are whole axes of the leaf.

    Args:
        layout: of the matrices.

    Returns:
        Whether each axis is layers, batch, inputs or outputs, and nothing else.
    """
    atoms = [atom for group in layout.groups for atom in group]
    long = {axis: size for axis, size in enumerate(layout.shape) if size != 1}
    return (
        len(atoms) == len(long)
        and all(long.get(a.axis) == a.size and a.stride == 1 for a in atoms)
        and all(layout.groups[2:])
    )


def add_factors(
    packed: QuantizedArray,
    factors: Mapping[int, tuple[jax.Array, jax.Array]],
    layout: Layout,
    *,
    like: jax.Array,
) -> QuantizedPlusLowRank:
    """Put the factors of all layers beside the codes of a leaf.

    Args:
        packed: the codes.
        factors: layer to `[batch, columns, rank]` and `[batch, rank, outputs]`; layers
            without some get zeros.
        layout: of the matrices, for which `is_aligned` holds.
        like: the leaf as it was, on whose mesh the factors shall lie.

    Returns:
        The leaf.
    """
    ndim = len(layout.shape)
    groups = [[atom.axis for atom in group] for group in layout.groups]
    inputs, outputs = (tuple(sorted(a - ndim for a in group)) for group in groups[2:])
    lead = [*groups[0], *groups[1]]
    with automatic():
        a = _leaf_of(factors, 0, layout, [*lead, *groups[2], outputs[-1] + ndim])
        b = _leaf_of(factors, 1, layout, [*lead, inputs[0] + ndim, *groups[3]])
    a, b = beside(a, like), beside(b, like)
    return QuantizedPlusLowRank(packed, a, b, inputs, outputs)


def _leaf_of(
    factors: Mapping[int, tuple[jax.Array, jax.Array]],
    which: int,
    layout: Layout,
    axes: list[int],
) -> jax.Array:
    """Arrange one factor of all layers in the order of the leaf's axes."""
    one = next(iter(factors.values()))[which]
    num_layers = layout.sizes[0]
    zeros = jnp.zeros_like(one)
    pairs = [factors[i][which] if i in factors else zeros for i in range(num_layers)]
    rank = one.shape[1 if which else 2]
    sizes = [layout.shape[axis] for axis in axes]
    num_outputs = len(layout.groups[3])
    sizes[-1 if which == 0 else -1 - num_outputs] = rank
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    whole = jnp.transpose(jnp.stack(pairs).reshape(sizes), order)
    gone = [axis for axis in range(len(layout.shape)) if axis not in axes]
    return jnp.expand_dims(whole, gone)


def multiply_low_rank(use: Use) -> jax.Array | None:
    """Multiply the input of a site by the factors of its weight.

    Args:
        use: of a site whose weight is a `QuantizedPlusLowRank`.

    Returns:
        float32 `(x A) B`, of the shape of the site's result, or `(x B^T) A^T` where the
        outputs are contracted, as of a tied weight; None if the site contracts neither,
        or is no `dot_general` and no plain convolution.
    """
    site, w = use.site, use.weight
    if site.primitive == "conv_general_dilated":
        return _convolve(use, w)
    letters = _letters(site, w) if site.primitive == "dot_general" else None
    if letters is None:
        return None
    x_axes, out_axes = letters
    a, b = w.factors()
    is_tied = not all(string.ascii_lowercase[i + w.ndim] in x_axes for i in w.inputs)
    (a, a_axes), (b, b_axes) = (b, a) if is_tied else (a, b)
    x = jnp.asarray(to_array(use.x))
    thin = [n for n in x_axes + a_axes if not (n in x_axes and n in a_axes)]
    # What all three share is a batch; it stays.
    shared = [n for n in x_axes if n in a_axes and n in b_axes]
    between = "".join([*shared, *thin])
    first = jnp.einsum(
        f"{x_axes},{a_axes}->{between}",
        x,
        a.astype(x.dtype),
        precision=site.params["precision"] or lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jnp.einsum(
        f"{between},{b_axes}->{out_axes}",
        first.astype(x.dtype),
        b.astype(x.dtype),
        precision=site.params["precision"] or lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
        out_sharding=site.params.get("out_sharding"),
    )


def _convolve(use: Use, w: QuantizedPlusLowRank) -> jax.Array | None:
    """Convolve with one factor, to as many features as the rank, and mix these."""
    site, params = use.site, dict(use.site.params)
    numbers = params["dimension_numbers"]
    counts = params["feature_group_count"], params["batch_group_count"]
    if site.operand != 1 or counts != (1, 1):
        return None
    if w.outputs != (numbers.rhs_spec[0] - w.ndim,):
        return None
    x = jnp.asarray(to_array(use.x))
    precision = params["precision"] or lax.Precision.HIGHEST
    params |= {"precision": precision, "preferred_element_type": jnp.float32}
    first = lax.conv_general_dilated(x, w.lora_a.astype(x.dtype), **params)
    _, (b, b_axes) = w.factors()
    between = list(string.ascii_lowercase[w.ndim : w.ndim + first.ndim])
    out = list(between)
    between[numbers.out_spec[1]] = "R"
    out[numbers.out_spec[1]] = b_axes.replace("R", "")
    return jnp.einsum(
        f"{''.join(between)},{b_axes}->{''.join(out)}",
        first.astype(x.dtype),
        b.astype(x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=params.get("out_sharding"),
    )


def _letters(site: Site, w: QuantizedPlusLowRank) -> tuple[str, str] | None:
    """Name the axes of the input and of the result as those of the weight are named."""
    contracted, batch = site.params["dimension_numbers"]
    side = site.operand
    if {a - w.ndim for a in contracted[side]} not in ({*w.inputs}, {*w.outputs}):
        return None
    names = string.ascii_lowercase
    x_axes = list(names[w.ndim : w.ndim + len(site.in_shapes[1 - side].shape)])
    for pairs in (contracted, batch):
        for own, other in zip(pairs[side], pairs[1 - side], strict=True):
            x_axes[other] = names[own]
    sides: list[list[str]] = [x_axes, x_axes]
    sides[side] = list(names[: w.ndim])
    out = [sides[0][axis] for axis in batch[0]]
    for i, letters in enumerate(sides):
        out += [
            n
            for axis, n in enumerate(letters)
            if axis not in (*contracted[i], *batch[i])
        ]
    return "".join(x_axes), "".join(out)
