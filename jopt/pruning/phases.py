"""AC/DC: training that alternates between compressed and decompressed phases.

From `begin_step` on

    compressed for compressed_steps:   mask = top (1 - sparsity) when the phase begins
    dense for dense_steps:             mask = everything
    ... and compressed from `end_step` on,

so that one run ends with a sparse model and passes through dense ones, whose weights
are good too (Peste et al., arXiv:2106.12379). Dense phases are what lets pruned weights
return: from zero, with moments that start anew. No latent copy is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.arrays import patterns
from jopt.arrays.arguments import require_count
from jopt.pruning import allocation as allocations
from jopt.pruning import masks
from jopt.pruning import scores as criteria
from jopt.pruning.arguments import (
    check_allocation,
    check_key_of,
    check_steps,
    check_uniform,
)
from jopt.pruning.leaves import Leaf, Patterns, Sparsities, make_choice
from jopt.pruning.wrapper import Masks, Method, masked, placed_as
from jopt.trees import rules


def ac_dc(
    inner: optax.GradientTransformation,
    *,
    sparsity: Sparsities = None,
    compressed_steps: int,
    dense_steps: int,
    end_step: int,
    begin_step: int = 0,
    final_dense_steps: int = 0,
    scores: criteria.ScoreFunction | criteria.Score = criteria.magnitude,
    pattern: Patterns = patterns.Unstructured(),  # noqa: B008
    select: rules.Select = None,
    allocation: allocations.Allocation = allocations.uniform,
    stacked_axes: rules.StackedAxes = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` with AC/DC: compressed and dense phases in turn, compressed at last.

    update = where(mask, inner(where(mask, g, 0)), -w)
    mask = top (1 - sparsity) of scores(w, g) as a compressed phase begins, or all

    Args:
        inner: any Optax transformation; moments of weights that return start anew.
        sparsity: fraction of zeros in compressed phases, a number, a schedule or
            ordered rules, as in `jopt.prune`; None for `jopt.NM`.
        compressed_steps: updates in a compressed phase, at least 1.
        dense_steps: updates in a dense phase, at least 1.
        end_step: count from which training stays compressed; the mask is computed there
            for the last time.
        begin_step: count of the first compressed phase; dense before it.
        final_dense_steps: how many of the updates before `end_step` are dense whatever
            the beat, for a longer last dense phase.
        scores: `(param, grad) -> scores`, higher = keep, or a `jopt.scores.Score`.
        pattern: which weights live and die together, or ordered rules.
        select: which leaves are pruned, as in `jopt.prune`.
        allocation: how many weights each leaf keeps.
        stacked_axes: which axis stacks layers, as in `jopt.prune`.
        key: a PRNG key for scores that need one.

    Returns:
        A transformation; `jopt.get_masks(state)` reads its masks.

    Raises:
        TypeError: `inner` is no transformation, or params hold quantized arrays.
        ValueError: a number of steps is out of range, or as `jopt.prune`.

    References:
        Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
        Networks, arXiv:2106.12379.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.ac_dc(
    ...     optax.sgd(1.0), sparsity=0.5, compressed_steps=1, dense_steps=1, end_step=4
    ... )
    >>> params = {"w": jnp.array([[4.0, 2.0]])}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": jnp.array([[1.0, -3.0]])}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["w"])
    [[3. 0.]]
    [[2. 3.]]
    [[0. 6.]]
    """
    choice = make_choice(sparsity, pattern, select, stacked_axes)
    check_allocation(allocation)
    check_uniform(allocation, pattern)
    check_steps(1, begin_step, end_step)
    require_count("end_step", end_step)
    require_count("compressed_steps", compressed_steps, least=1)
    require_count("dense_steps", dense_steps, least=1)
    require_count("final_dense_steps", final_dense_steps)
    score = criteria.as_score(scores)
    check_key_of(score, key)
    recipe = masks.Recipe(score, allocation)
    is_compressed = _phases(
        compressed_steps, dense_steps, begin_step, end_step, final_dense_steps
    )

    def is_due(count: jax.Array) -> jax.Array:
        changes = is_compressed(count) != is_compressed(count - 1)
        return changes | (count == end_step)

    def renew(leaves: Sequence[Leaf], count: jax.Array) -> Masks:
        old = [leaf.inputs.packed_mask for leaf in leaves]

        def compress() -> Masks:
            packed, num_nonfinite = masks.in_one_program(leaves, recipe, count)
            return placed_as(old, packed), num_nonfinite

        def open_all() -> Masks:
            full = [jnp.invert(jnp.zeros_like(mask)) for mask in old]
            return full, jnp.zeros([], jnp.int32)

        found: Masks = jax.lax.cond(is_compressed(count), compress, open_all)
        return found

    method = Method(
        name="ac_dc",
        choice=choice,
        score=score,
        is_due=is_due,
        renew=renew,
        sparse_gradients=True,
    )
    return masked(inner, method, key=key)


def _phases(
    compressed_steps: int,
    dense_steps: int,
    begin_step: int,
    end_step: int,
    final_dense_steps: int,
) -> Callable[[Any], Any]:
    """Tell whether a count is in a compressed phase."""

    def is_compressed(count: Any) -> Any:
        since = count - begin_step
        on_beat = (since >= 0) & (
            since % (compressed_steps + dense_steps) < compressed_steps
        )
        return (on_beat & (count < end_step - final_dense_steps)) | (count >= end_step)

    return is_compressed
