"""Scores at initialisation: trees of scores of a loss or a function, no training.

masks = jopt.make_masks(
    params, scores=jopt.scores.snip(loss, params, batches), sparsity=0.9,
    allocation=jopt.allocation.global_ranking,
)
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jopt.programs.record import inputs_of, require_batches
from jopt.pruning.scores.score import as_float32


def snip(loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]) -> Any:
    """Score by |w g|: how much the loss notices whether a connection is there.

    Args:
        loss: `loss(params, *inputs) -> scalar`.
        params: the params, at initialisation.
        batches: of inputs: tuples, or single arrays; the gradient is their mean.

    Returns:
        A tree like params of float32 scores; 0 for leaves that are no floats.

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
    return _map_floats(lambda w, g: jnp.abs(w * g), params, grads)


def grasp(loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]) -> Any:
    """Score by w (H g): keep what the gradient's norm needs.

    Removing w changes ||g||^2 by about -2 w (H g), so what has the lowest w (H g) goes:
    the gradient flow that is left is largest. (The paper's score is its negative.)

    Args:
        loss: `loss(params, *inputs) -> scalar`, twice differentiable. The paper divides
            the logits by a temperature of 200.
        params: the params, at initialisation.
        batches: of inputs, iterated over twice: a list, not a generator.

    Returns:
        A tree like params of float32 scores; 0 for leaves that are no floats.

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
    if iter(batches) is batches:
        raise TypeError(
            "batches must be iterable twice, got an iterator; pass list(batches)"
        )
    grads, count = _mean_gradient(loss, params, batches)
    take, put = _floats_of(params)

    @jax.jit
    def product(floats: Any, grads: Any, inputs: Any) -> Any:
        def gradient(floats: Any) -> Any:
            return jax.grad(lambda f: loss(put(f), *inputs))(floats)

        return jax.jvp(gradient, (floats,), (grads,))[1]

    floats, total = take(params), None
    tangent = [g.astype(w.dtype) for g, w in zip(take(grads), floats, strict=True)]
    for item in batches:
        one = product(floats, tangent, inputs_of(item))
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    products = put(jax.tree.map(lambda h: h / count, total))
    return _map_floats(lambda w, h: w * h, params, products)


def synflow(apply: Callable[..., Any], params: Any, *inputs: Any) -> Any:
    """Score by the flow through a weight when all weights are positive: no data.

    R = sum of apply(|params|, ones),   score = |w| dR/d|w|

    Pruned once it can remove a layer; in rounds it does not, and a hundred are usual:

        jopt.iterative_masks(
            lambda p: jopt.scores.synflow(apply, p, x), params, sparsity=0.98
        )

    Args:
        apply: `apply(params, *inputs)`, without what centres its inputs: a norm over
            the batch should be in evaluation mode.
        params: the params; float leaves are replaced by their absolute values.
        inputs: of the shapes and dtypes that `apply` takes; floats become ones.

    Returns:
        A tree like params of float32 scores; 0 for leaves that are no floats.

    Raises:
        ValueError: (where values are known) the flow overflows or vanishes.

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively
        conserving synaptic flow, arXiv:2006.05467.

    >>> params = {"w": jnp.array([[1.0], [-2.0]])}
    >>> synflow(lambda p, x: x @ p["w"], params, jnp.zeros((1, 2)))
    {'w': Array([[1.],
           [2.]], dtype=float32)}
    """
    ones = jax.tree.map(lambda x: jnp.ones_like(x) if _is_float(x) else x, inputs)
    take, put = _floats_of(params)

    def flow(floats: Any) -> jax.Array:
        out = jax.tree.leaves(apply(put(floats), *ones))
        total = sum(jnp.sum(y.astype(jnp.float32)) for y in out if _is_float(y))
        return jnp.asarray(total)

    positive = [jnp.abs(w) for w in take(params)]
    value, grads = jax.value_and_grad(flow)(positive)
    if not isinstance(value, jax.core.Tracer) and not (0 < float(value) < jnp.inf):
        raise ValueError(
            f"apply must let a positive, finite flow through, got {float(value)}; "
            "scale the params of a deep model, or take its norms out"
        )
    return _map_floats(lambda w, g: jnp.abs(w) * g, params, put(grads))


def _mean_gradient(
    loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]
) -> tuple[Any, int]:
    """Average the gradient over batches, in float32."""
    require_batches(batches)
    take, put = _floats_of(params)

    @jax.jit
    def gradient(floats: Any, inputs: Any) -> Any:
        grads = jax.grad(lambda f: loss(put(f), *inputs))(floats)
        return [g.astype(jnp.float32) for g in grads]

    total, count = None, 0
    for item in batches:
        one = gradient(take(params), inputs_of(item))
        total = one if total is None else jax.tree.map(jnp.add, total, one)
        count += 1
    if total is None:
        raise ValueError("batches must have at least one item, got none")
    return put([g / count for g in total]), count


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


def _map_floats(fn: Callable[..., jax.Array], params: Any, other: Any) -> Any:
    def score(w: Any, x: Any) -> jax.Array:
        if not _is_float(w):
            return jnp.zeros(jnp.shape(w), jnp.float32)
        return fn(as_float32(w), as_float32(x)).astype(jnp.float32)

    return jax.tree.map(score, params, other)


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))
