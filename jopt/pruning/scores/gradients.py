"""Scores with gradients: what the loss would change by if a weight were removed.

With g the gradient and h the curvature, removing w changes the loss by

    -w g + w^2 h / 2 + ...

Saliency and first-order Taylor take the first term, Fisher and OBD the second, and
second-order Taylor both. All compute in float32. Averages over steps are corrected for
the start, as `score.moving_average` says: no ranking within or across leaves sees the
correction, but the sum of two terms does.
"""

from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp

from jopt.pruning.scores.score import (
    Score,
    ScoreFunction,
    ScoreInputs,
    as_float32,
    check_decay,
    moving_average,
    zeros_of,
)
from jopt.updates import moments


@overload
def saliency(param: jax.Array, grad: jax.Array) -> jax.Array: ...


@overload
def saliency(*, decay: float) -> Score: ...


def saliency(param: Any = None, grad: Any = None, *, decay: float | None = None) -> Any:
    """Score by |w g|, the first-order change of the loss if w were removed.

    With `decay` it is a criterion that averages over steps, in float32,

        average = decay * average + (1 - decay) * |w g|,

    divided by 1 - decay^t after t steps.

    Args:
        param: w.
        grad: g, of the current step alone.
        decay: of the average, in [0, 1), in place of both.

    Returns:
        Scores; a `Score` for `decay`, with 4 bytes of state per weight.

    Raises:
        ValueError: `decay` is out of range.

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient
        Inference, arXiv:1611.06440.

    >>> import jax.numpy as jnp
    >>> saliency(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0]))
    Array([1., 3.], dtype=float32)
    """
    if decay is None:
        if param is None:
            raise TypeError(
                "saliency needs param and grad, or decay=, got neither; pass the "
                "function itself, scores=jopt.scores.saliency, for that of each step"
            )
        return jnp.abs(as_float32(param) * as_float32(grad))
    if param is not None or grad is not None:
        raise TypeError("saliency takes decay= alone, got param or grad beside it")
    return _averaged(saliency, decay)


def taylor(
    *,
    order: int = 1,
    decay: float | None = None,
    curvature: str | Callable[[Any, Any], Any] | None = None,
) -> ScoreFunction | Score:
    """Score by the change of the loss if w were removed, to first or second order.

    order 1: (w g)^2;   order 2: |-w g + w^2 h / 2|

    The curvature h is the mean of g^2, the diagonal of the empirical Fisher
    information, or what `curvature` says.

    Args:
        order: 1 or 2.
        decay: of a moving average over steps, in [0, 1): of (w g)^2, or of the g^2 that
            is h; None for the gradient of one step alone.
        curvature: for order 2, in place of g^2: the name of a field of the inner
            optimizer's state, such as "nu", or a function `(params, inner_state) ->
            tree like params`.

    Returns:
        `(param, grad) -> scores`; a `Score` for `decay`, with 4 bytes of state per
        weight, and for `curvature`, without state.

    Raises:
        ValueError: `order` is neither, `decay` is out of range, or `curvature` has
            nothing to stand for; (when used) the optimizer does not keep the field.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning,
        arXiv:1906.10771.

    >>> import jax.numpy as jnp
    >>> taylor()(jnp.array([-2.0, 1.0]), jnp.array([0.5, 4.0]))
    Array([ 1., 16.], dtype=float32)
    >>> taylor(order=2)(jnp.array([-2.0, 1.0]), jnp.array([0.5, 4.0]))
    Array([1.5, 4. ], dtype=float32)
    """
    if order not in (1, 2):
        raise ValueError(
            f"order must be 1 or 2, got {order!r}; 1 needs the gradient alone, 2 the "
            "curvature too"
        )
    if curvature is not None and (order == 1 or decay is not None):
        raise ValueError(
            "curvature must stand for the g^2 of order=2 without decay=, got "
            f"order={order} and decay={decay}; leave one of them out"
        )
    if order == 1:
        return _first_squared if decay is None else _averaged(_first_squared, decay)
    if curvature is not None:
        return _with_curvature(curvature, _both_terms)
    if decay is None:
        return lambda param, grad: _both_terms(param, grad, _squared(grad))
    return _with_squares(decay, _both_terms)


def movement(*, decay: float = 1.0) -> Score:
    """Score by the sum of -w g over steps: weights that move away from zero stay.

    score <- decay * score - w g

    In the paper w and g are those of dense weights behind a straight-through mask. In
    `jopt.prune` what is pruned is zero and moves no further: its score stays where it
    was, and it comes back when what is kept falls below.

    Args:
        decay: of the past, in [0, 1]; 1 as published.

    Returns:
        A score with 4 bytes of state per weight.

    Raises:
        ValueError: `decay` is out of range.

    References:
        Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning,
        arXiv:2005.07683.

    >>> import jax.numpy as jnp, jopt
    >>> masks = jopt.make_masks(
    ...     {"w": jnp.array([[1.0, -2.0]])},
    ...     grads={"w": jnp.array([[0.1, 0.1]])},
    ...     scores=jopt.scores.movement(),
    ...     sparsity=0.5,
    ... )
    >>> masks["w"]  # a step along -g makes the first smaller, the second larger
    Array([[False,  True]], dtype=bool)
    """
    check_decay(decay, most=1.0)

    def update(inputs: ScoreInputs, state: jax.Array) -> jax.Array:
        moved = as_float32(inputs.param) * as_float32(inputs.grad)
        return jnp.asarray(decay, jnp.float32) * state - moved.astype(jnp.float32)

    return Score(init=zeros_of, update=update, scores=lambda inputs, state: state)


def fisher(*, decay: float | None = None) -> Score:
    """Score by w^2 F / 2, with F the diagonal of the Fisher information.

    F = E[g^2], of the gradients that the optimizer sees: those of batches, where the
    paper takes those of single examples

    Args:
        decay: of a moving average of g^2 of its own, in [0, 1), 4 bytes of state per
            weight, with any optimizer; None reads the `nu` that Adam and its kin keep
            anyway, as `obd` does.

    Returns:
        A score.

    Raises:
        ValueError: `decay` is out of range; (when used) the inner optimizer keeps no
            `nu`, or none of a leaf's shape.

    References:
        Theis et al., Faster gaze prediction with dense networks and Fisher pruning,
        arXiv:1801.05787.

    >>> import jax.numpy as jnp, jopt
    >>> masks = jopt.make_masks(
    ...     {"w": jnp.array([[1.0, -2.0]])},
    ...     grads={"w": jnp.array([[0.5, 0.1]])},
    ...     scores=jopt.scores.fisher(decay=0.99),
    ...     sparsity=0.5,
    ... )
    >>> masks["w"]
    Array([[ True, False]], dtype=bool)
    """
    if decay is None:
        return _with_curvature("nu", _second_term)
    return _with_squares(decay, _second_term)


def obd(*, moment: str = "nu") -> Score:
    """Score by w^2 h / 2: optimal brain damage with a curvature that is kept anyway.

    Args:
        moment: the field of the inner optimizer's state that stands for the diagonal
            Hessian h: Adam's `nu`, the mean of g^2; Sophia's `nu`, an estimate of the
            Hessian itself. Negative curvature counts as 0. Not every `nu` is such a
            mean: AdaMax has the largest |g|, AdaBelief the variance.

    A mask update before the optimizer's first step finds 0 everywhere, and ties: let
    `begin_step` be 1 or more.

    Returns:
        A score without state.

    Raises:
        ValueError: (when used) the inner optimizer keeps no such field for a leaf.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, NeurIPS 1989.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.prune(
    ...     optax.adam(1e-3), sparsity=0.5, scores=jopt.scores.obd(), begin_step=1
    ... )
    >>> params = {"w": jnp.array([[3.0, -1.0, 2.0, 0.5]])}
    >>> grads = {"w": jnp.array([[0.1, 1.0, 0.1, 4.0]])}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     _, state = tx.update(grads, state, params)
    >>> jopt.get_masks(state)["w"]
    Array([[False,  True, False,  True]], dtype=bool)
    """
    return _with_curvature(moment, _second_term)


def _squared(grad: jax.Array) -> jax.Array:
    return jnp.square(as_float32(grad))


def _first_squared(param: jax.Array, grad: jax.Array) -> jax.Array:
    return jnp.square(as_float32(param) * as_float32(grad))


def _second_term(param: jax.Array, grad: Any, curvature: jax.Array) -> jax.Array:
    # The square of a small w underflows before the product does.
    w = as_float32(param)
    return w * (w * jnp.maximum(curvature, 0.0)) / 2


def _both_terms(param: jax.Array, grad: jax.Array, curvature: jax.Array) -> jax.Array:
    w = as_float32(param)
    return jnp.abs(w * (w * curvature / 2 - as_float32(grad)))


def _averaged(scores: ScoreFunction, decay: float) -> Score:
    """Average scores over steps."""
    check_decay(decay)
    return Score(
        init=zeros_of,
        update=lambda inputs, state: moving_average(
            decay, inputs.count, state, scores(inputs.param, inputs.grad)
        ),
        scores=lambda inputs, state: state,
    )


Terms = Callable[[jax.Array, Any, jax.Array], jax.Array]  # of w, g and h


def _with_squares(decay: float, terms: Terms) -> Score:
    """Take for the curvature an average of g^2 that the score keeps."""
    check_decay(decay)
    return Score(
        init=zeros_of,
        update=lambda inputs, state: moving_average(
            decay, inputs.count, state, _squared(inputs.grad)
        ),
        scores=lambda inputs, state: terms(inputs.param, inputs.grad, state),
    )


def _with_curvature(curvature: str | Callable[[Any, Any], Any], terms: Terms) -> Score:
    """Take the curvature from the inner optimizer, or from a function."""

    def find(params: Any, inner_state: Any) -> Any:
        if callable(curvature):
            return curvature(params, inner_state)
        return moments.find_moment(inner_state, params, curvature)

    return Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=lambda inputs, state: terms(
            inputs.param, inputs.grad, moments.read_moment(inputs.context)
        ),
        context=find,
    )
