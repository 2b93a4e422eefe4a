"""Scores: how much each weight is worth keeping, higher = keep.

A score is a function `(param, grad) -> scores` on one leaf, of the leaf's shape, or on
one layer of a leaf that stacks layers; a criterion of your own is such a function,
passed by value:

    jopt.prune(inner, sparsity=0.9, scores=lambda param, grad: jnp.abs(param * grad))

A criterion with memory, randomness, or an eye on the mask or the count is a `Score`:
three functions on one leaf. All see what enters the step. Next: `weights`, `channels`,
`gradients`, `at_initialization`: the criteria of the field.
"""

import inspect
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
    """Lift a plain function `(param, grad) -> scores` to a `Score` without memory.

    Raises:
        TypeError: `scores` is neither, such as a criterion with options that was not
            called.

    >>> as_score(lambda param, grad: param * grad).random
    False
    """
    if isinstance(scores, Score):
        return scores
    if not callable(scores):
        raise TypeError(
            "scores must be a function (param, grad) -> scores or a jopt.scores.Score, "
            f"got {scores!r}; for example jopt.scores.magnitude"
        )
    if not takes_two(scores):
        name = getattr(scores, "__name__", repr(scores))
        raise TypeError(
            f"scores must take (param, grad), got {name}, which does not; a criterion "
            f"with options is called first: scores=jopt.scores.{name}(...)"
        )
    return Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=lambda inputs, state: per_layer(
            scores, inputs.stacked_axis, inputs.param, inputs.grad
        ),
    )


def takes_two(fn: Callable[..., Any]) -> bool:
    """Tell whether a function can be called with two arguments."""
    try:
        inspect.signature(fn).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True


def per_layer(fn: Callable[..., Any], stacked_axis: int | None, *leaves: Any) -> Any:
    """Call a function of one layer of each leaf for all layers that are stacked.

    >>> per_layer(lambda w: w / w.sum(), 0, jnp.array([[1.0, 3.0], [2.0, 2.0]]))
    Array([[0.25, 0.75],
           [0.5 , 0.5 ]], dtype=float32)
    """
    if stacked_axis is None:
        return fn(*leaves)
    axes = tuple(None if leaf is None else stacked_axis for leaf in leaves)
    return jax.vmap(fn, in_axes=axes, out_axes=stacked_axis)(*leaves)


def as_float32(x: jax.Array) -> jax.Array:
    """Widen what is narrower than float32: products underflow there, and tie."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def moving_average(
    decay: Any, count: jax.Array, old: jax.Array, new: jax.Array
) -> jax.Array:
    """Average values over steps in float32, corrected for the start.

    old + rate (new - old),   rate = (1 - decay) / (1 - decay^(count + 1))

    This is Adam's mu / (1 - decay^t) kept in corrected form: after every step the
    weights of the values so far sum to one.

    Args:
        decay: in [0, 1).
        count: of values so far.
        old: their average, float32; zeros at first.
        new: the next value.

    Returns:
        The average with it.

    >>> average = moving_average(0.9, 0, jnp.zeros(1), jnp.array([2.0]))
    >>> moving_average(0.9, 1, average, jnp.array([4.0])).round(4)
    Array([3.0526], dtype=float32)
    """
    decay = jnp.asarray(decay, jnp.float32)
    # expm1, because 1 - decay^t of a decay close to 1 has few digits.
    share = -jnp.expm1(jnp.log(decay) * (count + 1))
    rate = (1 - decay) / share
    return (1 - rate) * old + rate * new.astype(jnp.float32)


def check_decay(decay: Any, *, most: float | None = None) -> None:
    """Raise for what is no weight of the past; traced numbers pass."""
    if not isinstance(decay, int | float):
        return
    if not (0 <= decay < 1 or decay == most):
        bracket = ")" if most is None else "]"
        raise ValueError(
            f"decay must be in [0, 1{bracket}, got {decay}; 0.9 averages about 10 steps"
        )


def zeros_of(param: jax.Array) -> jax.Array:
    """Return the float32 memory of a leaf, where the leaf lies."""
    return jnp.zeros_like(param, jnp.float32)
