"""Cross-layer equalization: paired channels get one range, without any data.

    x = f(z W + b),  y = x V:    W / s, b / s, s V     s = sqrt(r_W r_V) / r_V

with r_W, r_V the largest weight of a channel on either side, both of which are
sqrt(r_W r_V) afterwards. The function stays what it was, to rounding, because f passes
positive factors on. A chain is gone through again until nothing moves.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
arXiv:1906.04721.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.programs import channels, sites
from jopt.programs.channels import Group
from jopt.programs.sites import SiteTable
from jopt.programs.spread import as_automatic, automatic
from jopt.quantization.factors import (
    change_leaves,
    channel_max,
    divide,
    multiply,
    put_back,
    require_floats,
)
from jopt.trees.layer_report import LayerReport


@dataclasses.dataclass(frozen=True)
class EqualizedRow:
    """One pair of layers.

    Attributes:
        name: of the site whose outputs are scaled.
        next: names of the sites that read them, joined by commas.
        channels: their number.
        before: the largest ratio of the ranges of a channel on the two sides, the
            larger over the smaller.
        after: the same, afterwards; 1 where all are equal.
        error: None: the function is what it was.
    """

    name: str
    next: str
    channels: int
    before: float
    after: float
    error: float | None = None

    def cells(self) -> Mapping[str, str]:
        """What the table shows, by the names of columns."""
        return {
            "next": self.next,
            "channels": str(self.channels),
            "ratio before": f"{self.before:.4g}",
            "after": f"{self.after:.4g}",
        }


@dataclasses.dataclass(frozen=True, repr=False)
class EqualizationReport(LayerReport[EqualizedRow]):
    """The pairs of layers that were equalized, and what was left alone."""


def equalize(
    apply: Any,
    params: Any,
    inputs: Any,
    *,
    max_rounds: int = 100,
    tolerance: float = 1e-4,
) -> tuple[Any, EqualizationReport]:
    """Equalize the ranges of channels between layers, without data.

    s = sqrt(r_W r_V) / r_V:   W / s, b / s | s V

    Pairs are found in the program: what lies between may be nothing, relu or leaky
    relu, pooling, reshapes, dropout masks, a gate, attention over values; depthwise
    convolutions, stacked layers and several readers are pairs as well. Everything that
    is added on the way (biases) is scaled too. A BatchNorm between two layers is folded
    first: `jopt.fold_batch_norm`.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        inputs: one batch, or its shapes: a tuple of inputs, or a single one.
        max_rounds: how often the pairs are gone through at most.
        tolerance: until no factor is further from 1 than this.

    Returns:
        `(params, report)`: the params of the same function, and a row per pair.
        Channels that are zero on one side stay as they are.

    Raises:
        ValueError: a number is out of range, a leaf is compressed, weights are not
            finite, or there is no pair.

    References:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
        Correction, arXiv:1906.04721.

    >>> import jopt
    >>> apply = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    >>> params = {"w": jnp.array([[8.0, 1.0]]), "v": jnp.array([[2.0], [4.0]])}
    >>> equal, report = equalize(apply, params, jnp.ones((1, 1)))
    >>> equal["w"].tolist(), equal["v"].tolist(), report["w"].before
    ([[4.0, 2.0]], [[4.0], [2.0]], 4.0)
    """
    if max_rounds < 1 or not tolerance > 0:
        raise ValueError(
            "max_rounds must be at least 1 and tolerance above 0, got "
            f"{max_rounds} and {tolerance}"
        )
    require_floats(params)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    analysis = sites.analyse(apply, params, given, {})
    found, left = channels.find_groups(analysis, params)
    pairs = [group for group in found if group.source is not None]
    if not pairs:
        listed = "; ".join(f"{path}: {why}" for path, why in left.items())
        raise ValueError(
            f"equalize must have a pair of layers, got none ({listed or 'no products'})"
            "; fold norms first, or leave it out"
        )
    multiplies = {
        leaf for site in analysis.table if site.kind == "weight" for leaf in site.leaves
    }
    names = list(analysis.table.leaves)
    reasons = {p: why for p, why in left.items() if names.index(p) in multiplies}
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    for pair in pairs:
        for link in (pair.made[0], *pair.read):
            if not bool(jnp.isfinite(leaves[link.leaf]).all()):
                raise ValueError(
                    "params must be finite, got NaN or infinity in "
                    f"{names[link.leaf]!r}; repair it, its ranges have no equal"
                )
    with automatic():
        now = taken = [as_automatic(leaf) for leaf in leaves]
        before = [_ratio(*_ranges(now, pair)) for pair in pairs]
        step = jax.jit(functools.partial(_round, pairs=pairs))
        for _ in range(max_rounds):
            now, moved = step(now)
            if not float(moved) > tolerance:
                break
        after = [_ratio(*_ranges(now, pair)) for pair in pairs]
    rows = tuple(
        _row(analysis.table, pair, float(first), float(last))
        for pair, first, last in zip(pairs, before, after, strict=True)
    )
    scaled = {
        link.leaf
        for pair in pairs
        for links in (pair.made, pair.read)
        for link in links
    }
    now = [now[i] if i in scaled else leaf for i, leaf in enumerate(taken)]
    leaves = put_back(leaves, taken, now)
    return treedef.unflatten(leaves), EqualizationReport(rows, reasons)


def _row(table: SiteTable, pair: Group, before: float, after: float) -> EqualizedRow:
    assert pair.source is not None
    return EqualizedRow(
        table[pair.source].name, ", ".join(pair.sites), pair.size, before, after
    )


def _ranges(leaves: Sequence[Any], pair: Group) -> tuple[jax.Array, jax.Array]:
    """Return the ranges of the channels where they are made and where they are read."""
    first = pair.made[0]
    made = channel_max(leaves[first.leaf], first, pair.size)
    every = [channel_max(leaves[link.leaf], link, pair.size) for link in pair.read]
    return made, functools.reduce(jnp.maximum, every)


def _ratio(made: jax.Array, read: jax.Array) -> jax.Array:
    is_used = (made > 0) & (read > 0)
    ratio = jnp.where(is_used, made, 1.0) / jnp.where(is_used, read, 1.0)
    return jnp.max(jnp.maximum(ratio, 1 / ratio))


def _round(leaves: list[Any], *, pairs: Sequence[Group]) -> tuple[list[Any], jax.Array]:
    """Equalize every pair once; say how far a factor was from 1."""
    moved = jnp.float32(0)
    for pair in pairs:
        made, read = _ranges(leaves, pair)
        is_used = (made > 0) & (read > 0)
        made, read = (jnp.where(is_used, r, 1.0) for r in (made, read))
        ratio = made / read
        in_range = (ratio > jnp.finfo(jnp.float32).tiny) & (ratio < jnp.inf)  # type: ignore[no-untyped-call]
        # The root of a power of four is exact, which the quotient of two roots is not.
        s = jnp.where(in_range, jnp.sqrt(ratio), jnp.sqrt(made) / jnp.sqrt(read))
        leaves = change_leaves(divide, leaves, pair.made, s)
        leaves = change_leaves(multiply, leaves, pair.read, s)
        moved = jnp.maximum(moved, jnp.max(jnp.abs(s - 1)))
    return leaves, moved
