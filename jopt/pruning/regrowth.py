"""Masks that move: of what is kept the least is dropped, and as much grows elsewhere.

With the mask m, the share f to drop, a drop score (|w|) and a growth score,

    survivors = the (1 - f) |m| kept units of highest drop score
    new mask  = survivors + the best of all others by growth score, |m| in all

Unit counts stay exact because the second line is one ranking: survivors above all else.
N:M fills the hole in each group with the best of that group; blocks and channels are
dropped and grown whole. What was dropped may grow again at once, as in RigL (Evci et
al., arXiv:1911.11134).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays import axes, counts, patterns
from jopt.arrays.counts import Count
from jopt.pruning import layers, masks
from jopt.pruning import scores as criteria
from jopt.pruning.leaves import Leaf

_ROUNDS = 4  # of handing on what layers that are full do not take


def regrow(
    leaves: Sequence[Leaf],
    growth: criteria.Score,
    drop: criteria.Score,
    fraction: Any,
    *,
    redistribute: bool = False,
) -> tuple[list[jax.Array], jax.Array]:
    """Move the masks of all leaves.

    Args:
        leaves: with the masks that are to move.
        growth: scores of what may grow; its state is that of the leaves.
        drop: scores of what is kept, without a state.
        fraction: of the kept units to drop.
        redistribute: whether layers compete for what grows, by their mean growth score
            over kept units; otherwise each keeps its count. N:M always keeps it.

    Returns:
        The packed masks, and how many scores were not finite.
    """
    dropping = [
        masks.score_layers(leaf._replace(score_state=()), drop) for leaf in leaves
    ]
    growing = [masks.score_layers(leaf, growth) for leaf in leaves]
    kept = [
        layers.to_layers(leaf.inputs.mask, leaf.plan.stacked_axis) for leaf in leaves
    ]

    def move(group: Sequence[int]) -> tuple[list[jax.Array], jax.Array]:
        pattern = leaves[group[0]].plan.pattern
        mine = [dropping[i] for i in group]
        lots = layers.make_lots(mine)
        d, g = (
            [layers.only_finite(x) for x in layers.stack([of[i] for i in group], lots)]
            for of in (dropping, growing)
        )
        num_nonfinite = layers.count_nan([*d, *g])
        old = layers.stack([kept[i] for i in group], lots)
        shapes = [x.shape[1:] for x in d]
        d, g, old = ([layers.pool(x, pattern) for x in xs] for xs in (d, g, old))
        # A block is kept whole, so that the mean of its mask is 0 or 1.
        new = _move(d, g, [x > 0 for x in old], fraction, pattern, redistribute)
        spread = [
            layers.spread(x, pattern, shape)
            for x, shape in zip(new, shapes, strict=True)
        ]
        members = [leaves[i] for i in group]
        return masks.take_apart(spread, lots, members, mine), num_nonfinite

    return masks.by_group(leaves, move)


def _move(
    drop: Sequence[jax.Array],
    growth: Sequence[jax.Array],
    old: Sequence[jax.Array],
    fraction: Any,
    pattern: patterns.Pattern,
    redistribute: bool,
) -> list[jax.Array]:
    """Move unit masks [layers, ...] by drop and growth scores of the same shapes."""
    active = [_count_layers(m) for m in old]
    dropped = [_part_of(count, fraction) for count in active]
    rest = [counts.subtract(a, d) for a, d in zip(active, dropped, strict=True)]
    # What is not finite goes before what is small, and after it what is not kept.
    candidates = [
        jnp.where(m, jnp.where(jnp.isnan(d), -jnp.inf, d), jnp.nan)
        for d, m in zip(drop, old, strict=True)
    ]
    survivors = layers.top_k_together(candidates, rest)
    ranked = [jnp.where(s, jnp.inf, g) for s, g in zip(survivors, growth, strict=True)]
    if isinstance(pattern, patterns.NM):
        return [layers.nm_masks(x, pattern) for x in ranked]
    if not redistribute:
        return layers.top_k_together(ranked, active)
    wanted = [_mean_over(g, m) for g, m in zip(growth, old, strict=True)]
    sizes = [counts.as_count(m[0].size) for m in old]
    room = [counts.subtract(s, r) for s, r in zip(sizes, rest, strict=True)]
    grown = _share_out(dropped, wanted, room)
    kept = [counts.add(r, g) for r, g in zip(rest, grown, strict=True)]
    return layers.top_k_together(ranked, kept)


def _count_layers(mask: jax.Array) -> Count:
    """Count what each layer keeps."""
    count: Count = jax.vmap(counts.sum_of_booleans)(mask)
    return Count(*(axes.gather_values(limb) for limb in count))


def _part_of(count: Count, fraction: Any) -> Count:
    """Return round(fraction * count), exact below 2^24 and to 2^-24 above."""
    fraction = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0)
    return counts.smaller(
        _as_count(jnp.round(counts.to_float(count) * fraction)), count
    )


def _as_count(number: jax.Array) -> Count:
    """Convert whole float32 numbers below 2^48."""
    high = jnp.floor(number / 65536)
    low = number - high * 65536
    return Count(high.astype(jnp.uint32), low.astype(jnp.uint32))


def _mean_over(growth: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean growth score of what each layer keeps."""
    inside = mask & ~jnp.isnan(growth)
    over = tuple(range(1, growth.ndim))
    total = jnp.sum(jnp.where(inside, growth, 0), axis=over, dtype=jnp.float32)
    number = jnp.sum(inside, axis=over, dtype=jnp.float32)
    return axes.gather_values(total / jnp.maximum(number, 1))


def _share_out(
    dropped: Sequence[Count], wanted: Sequence[jax.Array], room: Sequence[Count]
) -> list[Count]:
    """Give what all layers dropped to layers in proportion, as far as there is room."""
    sizes = [len(w) for w in wanted]
    weight = jnp.concatenate(list(wanted))
    free = Count(*(jnp.concatenate(limbs) for limbs in zip(*room, strict=True)))
    all_dropped = Count(*(jnp.concatenate(x) for x in zip(*dropped, strict=True)))
    left = counts.total(all_dropped)
    given = Count(*(jnp.zeros_like(limb) for limb in free))
    for _ in range(_ROUNDS):
        open_to = ~counts.equal(free, given)
        shares = jnp.where(open_to, weight, 0.0)
        shares = jnp.where(jnp.sum(shares) > 0, shares, open_to.astype(jnp.float32))
        shares = shares / jnp.maximum(jnp.sum(shares), 1e-30)
        more = _as_count(jnp.floor(counts.to_float(left) * shares))
        more = counts.smaller(more, counts.subtract(free, given))
        left = counts.subtract(left, counts.total(more))
        given = counts.add(given, more)
    given = counts.add(given, counts.deal(left, counts.subtract(free, given)))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        Count(given.high[end - size : end], given.low[end - size : end])
        for size, end in zip(sizes, ends, strict=True)
    ]
