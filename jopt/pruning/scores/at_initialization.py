"""Scores at initialisation: trees of scores of a loss or a function, no training.

    masks = jopt.make_masks(
        params, scores=jopt.scores.snip(loss, params, batches), sparsity=0.9,
        allocation=jopt.allocation.global_ranking,
    )

Each is a function of trees and usable alone. Leaves that are no floats are not scored:
`optax.MaskedNode()` stands for them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt.programs.record import inputs_of, require_batches
from jopt.pruning.scores.score import as_float32


def snip(loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]) -> Any:
    """Score by |w g|: how much the loss notices whether a connection is there.

    score = |w dL/dw|,   L = mean of the loss over batches

    The paper divides by the sum over all weights, which changes no ranking.

    Args:
        loss: `loss(params, *inputs) -> scalar`.
        params: the params, at initialisation.
        batches: of inputs: tuples, or single arrays. Of the loss their mean is taken,
            each batch with the same weight.

    Returns:
        A tree like params of float32 scores.

    Raises:
        TypeError: `batches` cannot be iterated over.
        ValueError: there is no batch.

    References:
        Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity,
        arXiv:1810.02340.

    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> snip(lambda p, x: jnp.sum(p["w"] * x), params, [jnp.array([3.0, 1.0])])
    {'w': Array([3., 2.], dtype=float32)}
    """
    grads, _ = _mean_gradient(loss, params, batches)
    take, _ = _floats_of(params)
    pairs = zip(take(params), grads, strict=True)
    return _scores_of(params, [jnp.abs(as_float32(w) * g) for w, g in pairs])


def grasp(loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]) -> Any:
    """Score by w (H g): keep what the gradient's norm needs.

    score = w (H g),   g and H the gradient and Hessian of the mean loss over batches

    Removing w changes ||g||^2 by about -2 w (H g), so what has the lowest w (H g) goes:
    the gradient flow that is left is largest. (The paper's score, -w (H g), is high
    where weights are to be removed.) H g is a forward derivative of the gradient.

    Args:
        loss: `loss(params, *inputs) -> scalar`, twice differentiable. The paper divides
            the logits by a temperature of 200.
        params: the params, at initialisation.
        batches: of inputs, iterated over twice: a list, not a generator.

    Returns:
        A tree like params of float32 scores.

    Raises:
        TypeError: `batches` cannot be iterated over twice.
        ValueError: there is no batch.

    References:
        Wang et al., Picking Winning Tickets Before Training by Preserving Gradient
        Flow, arXiv:2002.07376.

    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> grasp(lambda p, x: jnp.sum(x * p["w"] ** 2) / 2, params, [jnp.ones(2)])
    {'w': Array([1., 4.], dtype=float32)}
    """
    require_batches(batches)
    if iter(batches) is batches:
        raise TypeError(
            "batches must be iterable twice, got an iterator; pass list(batches)"
        )
    grads, count = _mean_gradient(loss, params, batches)
    take, put = _floats_of(params)
    floats = take(params)
    # H is linear: a tangent of size 1 underflows in no dtype.
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g), initial=0.0) for g in grads]))
    size = jnp.where(largest > 0, largest, 1.0)
    tangent = [(g / size).astype(w.dtype) for g, w in zip(grads, floats, strict=True)]

    @jax.jit
    def product(floats: Any, tangent: Any, inputs: Any) -> Any:
        def gradient(floats: Any) -> Any:
            return jax.grad(lambda f: loss(put(f), *inputs))(floats)

        return _as_float32(jax.jvp(gradient, (floats,), (tangent,))[1])

    total = None
    for item in batches:
        one = product(floats, tangent, inputs_of(item))
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    assert total is not None
    factor = size / count
    products = zip(floats, total, strict=True)
    return _scores_of(params, [as_float32(w) * (h * factor) for w, h in products])


def synflow(
    apply: Callable[..., Any], params: Any, *inputs: Any, scale: float = 1.0
) -> Any:
    """Score by the flow through a weight when all weights are positive: no data.

    R = sum of apply(|params|, ones),   score = |w| dR/d|w|

    Pruned once it can remove a layer; in rounds it does not, and a hundred are usual:

        jopt.iterative_masks(
            lambda p: jopt.scores.synflow(apply, p, x), params, sparsity=0.98
        )

    R grows with the product of all layers and overflows float32 in deep models. There
    `scale`, small, multiplies the ones, and once more what is differentiated: in models
    without biases whose norms are in evaluation mode all scores change by one factor.
    Try one call outside of jit first: compiled, as in `iterative_masks`, an overflow
    cannot raise, and its scores are not finite.

    Args:
        apply: `apply(params, *inputs)`, without what centres its inputs: a norm over
            the batch should be in evaluation mode.
        params: the params; all float leaves are replaced by their absolute values, in
            float32 where they are narrower.
        inputs: arrays or `jax.ShapeDtypeStruct`, such as a batch of one; floats become
            ones, and what has no values, other than floats, zeros.
        scale: of the ones, such as 2.0**-60.

    Returns:
        A tree like params of float32 scores.

    Raises:
        ValueError: `scale` is not positive; (outside of jit) the flow overflows, or
            none comes through.

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively
        conserving synaptic flow, arXiv:2006.05467.

    >>> params = {"w": jnp.array([[1.0], [-2.0]])}
    >>> synflow(lambda p, x: x @ p["w"], params, jnp.zeros((1, 2)))
    {'w': Array([[1.],
           [2.]], dtype=float32)}
    """
    if not scale > 0:
        raise ValueError(
            f"scale must be positive, got {scale}; 2.0**-60 for a deep model"
        )
    take, put = _floats_of(params)
    ones = jax.tree.map(lambda x: _ones_like(x, scale), inputs)

    def flow(floats: Any) -> jax.Array:
        total = jnp.zeros([], jnp.float32)
        for y in jax.tree.leaves(apply(put(floats), *ones)):
            if _is_float(y):
                total += jnp.sum(y, dtype=jnp.float32)
        return total

    positive = [jnp.abs(as_float32(w)) for w in take(params)]
    value, pullback = jax.vjp(flow, positive)
    (grads,) = pullback(jnp.full_like(value, scale))
    scores = [w * g for w, g in zip(positive, grads, strict=True)]
    _check_flow(value, scores)
    return _scores_of(params, scores)


def _ones_like(x: Any, scale: float) -> Any:
    if _is_float(x):
        return jnp.full(jnp.shape(x), scale, x.dtype)
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _check_flow(value: jax.Array, scores: list[jax.Array]) -> None:
    """Raise where scores say nothing, if their values are known."""
    if isinstance(value, jax.core.Tracer):
        return
    is_finite = all(bool(jnp.isfinite(s).all()) for s in scores)
    flows = any(bool((s > 0).any()) for s in scores)
    if not (is_finite and flows and bool(jnp.isfinite(value))):
        what = "one that overflows" if not is_finite or value > 0 else "none"
        raise ValueError(
            f"apply must let a positive, finite flow through, got {what} (R = "
            f"{float(value)}); scale=2.0**-60 for a deep model, and norms in "
            "evaluation mode"
        )


def _mean_gradient(
    loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]
) -> tuple[list[jax.Array], int]:
    """Average the gradient of the float leaves over batches, in float32."""
    require_batches(batches)
    take, put = _floats_of(params)
    floats = take(params)
    if not floats:
        raise ValueError("params must have a float leaf to score, got none")

    @jax.jit
    def gradient(floats: Any, inputs: Any) -> Any:
        return _as_float32(jax.grad(lambda f: loss(put(f), *inputs))(floats))

    total, count = None, 0
    for item in batches:
        one = gradient(floats, inputs_of(item))
        total = one if total is None else jax.tree.map(jnp.add, total, one)
        count += 1
    if total is None:
        raise ValueError("batches must have at least one item, got none")
    return [g / count for g in total], count


def _floats_of(params: Any) -> tuple[Callable[[Any], list[Any]], Callable[..., Any]]:
    """Return functions that take the float leaves out, and put others in."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    where = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]

    def take(tree: Any) -> list[Any]:
        flat = treedef.flatten_up_to(tree)
        return [flat[i] for i in where]

    def put(floats: Any) -> Any:
        new = list(leaves)
        for i, leaf in zip(where, floats, strict=True):
            new[i] = leaf
        return treedef.unflatten(new)

    return take, put


def _scores_of(params: Any, scores: list[jax.Array]) -> Any:
    """Put scores in the places of the float leaves, and holes elsewhere."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    each = iter(scores)
    return treedef.unflatten(
        [
            next(each).astype(jnp.float32) if _is_float(leaf) else optax.MaskedNode()
            for leaf in leaves
        ]
    )


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and bool(jnp.issubdtype(x.dtype, jnp.floating))
