"""Scores: how much each weight is worth keeping, higher = keep.

A score is a function `(param, grad) -> scores` on one leaf, of the leaf's shape; a
criterion of your own is such a function, passed by value:

    jopt.prune(inner, sparsity=0.9, scores=lambda param, grad: jnp.abs(param * grad))

A criterion with memory, randomness, or an eye on the mask or the count is a `Score`:
three functions on one leaf. All see what enters the step. Next: `allocation`, how many
weights each leaf gives.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.arrays import packing


class ScoreInputs(NamedTuple):
    """What a criterion sees of one leaf when a step begins."""

    param: jax.Array
    grad: Any  # as param; None where a host call got none
    packed_mask: jax.Array  # as the state stores it
    count: jax.Array  # type: ignore[assignment]  # shape=(), int32: updates so far
    key: jax.Array  # folded from path and count for a `Score` with `random=True`
    extra_args: Mapping[str, Any]  # what `update` got beside params
    stacked_axis: int | None = None  # the axis that stacks layers
    context: Any = None  # what `Score.context` found for this leaf

    @property
    def mask(self) -> jax.Array:
        """The mask of the step before, True = kept."""
        return packing.unpack_mask(self.packed_mask)


class Score(NamedTuple):
    """A criterion with memory: functions on one leaf.

    `init(param) -> state`; `update(inputs, state) -> state`, called on every step;
    `scores(inputs, state) -> scores`, called when the mask is recomputed; `random` says
    that `inputs.key` is used. The inputs are `ScoreInputs`.

    What a leaf's score needs from elsewhere, a moment of the inner optimizer or another
    leaf, comes from `context(params, inner_state) -> tree`: of the structure of params,
    or with a subtree in place of each leaf, which is then `inputs.context`.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[ScoreInputs, Any], Any]
    scores: Callable[[ScoreInputs, Any], jax.Array]
    random: bool = False
    context: Callable[[Any, Any], Any] | None = None


ScoreFunction = Callable[[jax.Array, jax.Array], jax.Array]


def as_score(scores: ScoreFunction | Score) -> Score:
    """Lift a plain function `(param, grad) -> scores` to a `Score` without memory."""
    if isinstance(scores, Score):
        return scores
    if not callable(scores):
        raise TypeError(
            "scores must be a function (param, grad) -> scores or a jopt.scores.Score, "
            f"got {scores!r}; for example jopt.scores.magnitude"
        )
    return Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=lambda inputs, state: scores(inputs.param, inputs.grad),
    )


def magnitude(param: jax.Array, grad: jax.Array) -> jax.Array:
    """Score by |w|.

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks,
        arXiv:1506.02626.

    >>> import jax.numpy as jnp
    >>> magnitude(jnp.array([-2.0, 1.0]), jnp.zeros(2))
    Array([2., 1.], dtype=float32)
    """
    return jnp.abs(param)


def saliency(param: jax.Array, grad: jax.Array) -> jax.Array:
    """Score by |w g|, the first-order change of the loss if w were removed.

    The gradient is that of the current step alone; the product is taken in float32,
    where float16 would underflow and leave ties.

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient
        Inference, arXiv:1611.06440.

    >>> import jax.numpy as jnp
    >>> saliency(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
    Array([1., 3.], dtype=float32)
    """
    wide = jnp.promote_types(param.dtype, jnp.float32)
    return jnp.abs(param.astype(wide) * grad.astype(wide))


def random() -> Score:
    """Score by independent uniform numbers, new ones at each mask update.

    `jopt.prune` needs a `key=`, which it folds with the leaf's path and the count:
    another layer in the model does not reshuffle this one.

    >>> random().random
    True
    """
    return Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=lambda inputs, state: jax.random.uniform(inputs.key, inputs.param.shape),
        random=True,
    )
