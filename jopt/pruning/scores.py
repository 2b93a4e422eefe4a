"""Scores: how much each weight is worth keeping, higher = keep.

A score is a function `(param, grad) -> scores` on one leaf, of the leaf's shape; a
criterion of your own is such a function, passed by value:

    jopt.prune(inner, sparsity=0.9, scores=lambda param, grad: jnp.abs(param * grad))

A criterion with memory or randomness is a `Score`: three functions on one leaf. Both
see the params and gradients that enter the step. Next: `allocation`, how many weights
each leaf gives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Score(NamedTuple):
    """A criterion with memory: functions on one leaf.

    `init(param) -> state`; `update(param, grad, state) -> state`, called on every step;
    `scores(param, grad, state, key) -> scores`, called when the mask is recomputed,
    with a key folded from the leaf's path and the count; `random` says that the key is
    used.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, jax.Array, Any], Any]
    scores: Callable[[jax.Array, Any, Any, jax.Array], jax.Array]
    random: bool = False


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
        update=lambda param, grad, state: state,
        scores=lambda param, grad, state, key: scores(param, grad),
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

    The gradient is that of the current step alone.

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient
        Inference, arXiv:1611.06440.

    >>> import jax.numpy as jnp
    >>> saliency(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
    Array([1., 3.], dtype=float32)
    """
    return jnp.abs(param * grad)


def random() -> Score:
    """Score by independent uniform numbers, new ones at each mask update.

    `jopt.prune` needs a `key=`, which it folds with the leaf's path and the count:
    another layer in the model does not reshuffle this one.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.zeros(2)
    >>> random().scores(w, w, (), jax.random.key(0)).shape
    (2,)
    """
    return Score(
        init=lambda param: (),
        update=lambda param, grad, state: state,
        scores=lambda param, grad, state, key: jax.random.uniform(key, param.shape),
        random=True,
    )
