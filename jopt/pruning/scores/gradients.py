"""Scores with gradients: what the loss would change by if a weight were removed.

With g the gradient and h the curvature, removing w changes the loss by

    -w g + w^2 h / 2 + ...

Saliency and first-order Taylor take the first term, Fisher and OBD the second, and
second-order Taylor both. All compute in float32.
"""

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

    With `decay` it is a criterion that averages over steps,

        average = decay * average + (1 - decay) * |w g|,

    from 0, in float32. The start makes all averages too small by one factor, which no
    ranking sees.

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


def taylor(*, order: int = 1, decay: float | None = None) -> ScoreFunction | Score:
    """Score by the square of the change of the loss, or by two terms of it.

    order 1: (w g)^2;   order 2: |-w g + w^2 g^2 / 2|, with g^2 for the curvature

    Args:
        order: 1 or 2.
        decay: of a moving average of the scores over steps, in [0, 1); None for the
            gradient of one step alone.

    Returns:
        `(param, grad) -> scores`, or a `Score` with 4 bytes of state per weight.

    Raises:
        ValueError: `order` is neither, or `decay` is out of range.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning,
        arXiv:1906.10771.

    >>> import jax.numpy as jnp
    >>> taylor(order=2)(jnp.array([-2.0, 1.0]), jnp.array([0.5, 4.0]))
    Array([1.5, 4. ], dtype=float32)
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")

    def scores(param: jax.Array, grad: jax.Array) -> jax.Array:
        first = as_float32(param) * as_float32(grad)
        if order == 1:
            return jnp.square(first)
        return jnp.abs(-first + jnp.square(first) / 2)

    return scores if decay is None else _averaged(scores, decay)


def movement(*, decay: float = 1.0) -> Score:
    """Score by the sum of -w g over steps: weights that move away from zero stay.

    score <- decay * score - w g

    Args:
        decay: of the past, in [0, 1]; 1 as published.

    Returns:
        A score with 4 bytes of state per weight.

    Raises:
        ValueError: `decay` is out of range.

    References:
        Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning,
        arXiv:2005.07683.

    >>> movement().random
    False
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}; 1 forgets nothing")
    return Score(
        init=zeros_of,
        update=lambda inputs, state: (
            decay * state
            - (as_float32(inputs.param) * as_float32(inputs.grad)).astype(jnp.float32)
        ),
        scores=lambda inputs, state: state,
    )


def fisher(*, decay: float | None = None) -> Score:
    """Score by w^2 F / 2, with F the diagonal of the Fisher information.

    F = E[g^2], of the gradients that the optimizer sees

    Args:
        decay: of a moving average of g^2 of its own, in [0, 1), 4 bytes of state per
            weight; None reads the `nu` that Adam and its kin keep anyway.

    Returns:
        A score.

    Raises:
        ValueError: `decay` is out of range; (when used) the inner optimizer keeps no
            `nu`.

    References:
        Theis et al., Faster gaze prediction with dense networks and Fisher pruning,
        arXiv:1801.05787.

    >>> fisher(decay=0.9).random
    False
    """
    if decay is None:
        return _from_moment("nu", "fisher")
    check_decay(decay)
    return Score(
        init=zeros_of,
        update=lambda inputs, state: moving_average(
            decay, state, jnp.square(as_float32(inputs.grad))
        ),
        scores=lambda inputs, state: _second_term(inputs.param, state),
    )


def obd(*, moment: str = "nu") -> Score:
    """Score by w^2 h / 2: optimal brain damage with a curvature that is kept anyway.

    Args:
        moment: the field of the inner optimizer's state that stands for the diagonal
            Hessian h: Adam's `nu`, the mean of g^2; Sophia's `nu`, an estimate of the
            Hessian itself. Negative curvature counts as 0.

    Returns:
        A score without state.

    Raises:
        ValueError: (when used) the inner optimizer keeps no such field for a leaf.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, NeurIPS 1989.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.prune(optax.adam(1e-3), sparsity=0.5, scores=jopt.scores.obd())
    >>> params = {"w": jnp.array([[3.0, -1.0, 2.0, 0.5]])}
    >>> _, state = tx.update(params, tx.init(params), params)  # nu is 0: ties
    >>> jopt.get_masks(state)["w"]
    Array([[ True,  True, False, False]], dtype=bool)
    """
    return _from_moment(moment, "obd")


def _from_moment(moment: str, name: str) -> Score:
    def scores(inputs: ScoreInputs, state: Any) -> jax.Array:
        if inputs.context is None:
            raise ValueError(
                f"{name} needs an inner optimizer that keeps {moment!r} for every "
                f"pruned weight, got none for shape {inputs.param.shape}; use "
                "optax.adam or its kin, or jopt.scores.fisher(decay=0.999)"
            )
        return _second_term(inputs.param, inputs.context)

    return Score(
        init=lambda param: (),
        update=lambda inputs, state: state,
        scores=scores,
        context=lambda params, inner_state: moments.find_moment(
            inner_state, params, moment
        ),
    )


def _second_term(param: jax.Array, curvature: jax.Array) -> jax.Array:
    curvature = jnp.maximum(as_float32(curvature), 0.0)
    return jnp.square(as_float32(param)) * curvature / 2


def _averaged(scores: ScoreFunction, decay: float) -> Score:
    check_decay(decay)
    return Score(
        init=zeros_of,
        update=lambda inputs, state: moving_average(
            decay, state, scores(inputs.param, inputs.grad)
        ),
        scores=lambda inputs, state: state,
    )
