"""Proximal maps: the closest sparse array, in closed form.

    prox(w) = argmin over v of  ||v - w||^2 / 2 + strength * penalty(v)

Penalties that are not smooth at zero, and so hold weights there exactly. In a step of
gradient descent, strength is the learning rate times the weight of the penalty; as a
schedule it follows the learning rate, or ramps up.

    l1              sum of |v|                            soft threshold
    group_lasso     sum over groups of sqrt(size) ||v||   shrinks groups whole
    hard_threshold  number of v that are not zero         hard threshold

Groups are those of a pattern. The groupers of torchao's PAT are written so: element
`Unstructured()`; dim `Channel(axis)`; filter of a convolution [height, width, in, out]
`Channel(-1)`; k elements `Block((1, k))` or `Block((k, 1))`; head `Block((in, k))` for
k columns of a kernel with `in` rows; layer `Block(shape of the leaf)`. Its lasso and
group lasso are here. Its maps to a given sparsity, of a leaf or of all, and to N:M are
the business of `jopt.prune`. Not here: those of singular values (nuclear norm, rank),
which make no zeros.

References:
    Parikh and Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1(3),
    2014, sections 6.1 and 6.5; Yuan and Lin, Model selection and estimation in
    regression with grouped variables, JRSS B 68(1), 2006.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.arrays import patterns
from jopt.arrays.arguments import check_strength
from jopt.pruning.scores.score import as_float32

Strength = float | jax.Array | Callable[[Any], Any]


class ProximalMap(NamedTuple):
    """A proximal map of one layer, and which weights it makes zero together.

    `prox(w, count) -> w'`, of the shape of the layer, float32 or wider.
    """

    prox: Callable[[jax.Array, jax.Array], jax.Array]
    pattern: patterns.Pattern = patterns.Unstructured()


def l1(strength: Strength) -> ProximalMap:
    """Shrink every weight towards zero, and stop there: the soft threshold.

    prox(w) = sign(w) * max(|w| - strength, 0)

    Args:
        strength: a number or a schedule of the count, at least 0.

    Returns:
        The map.

    Raises:
        ValueError: `strength` is negative or not finite.

    References:
        Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.2.

    >>> l1(1.0).prox(jnp.array([-3.0, 0.5, 2.0]), 0)
    Array([-2.,  0.,  1.], dtype=float32)
    """
    _check_strength(strength)

    def prox(w: jax.Array, count: Any) -> jax.Array:
        w = as_float32(w)
        return jnp.sign(w) * jnp.maximum(jnp.abs(w) - _at(strength, count), 0)

    return ProximalMap(prox)


def group_lasso(strength: Strength, pattern: patterns.Pattern) -> ProximalMap:
    """Shrink the norm of every group, and make groups whole zero.

    prox(w) = w * max(1 - strength * sqrt(size) / ||w||, 0)   in each group

    With sqrt(size) groups of different sizes are treated alike; then a group is zero
    when the root mean square of its weights is at most `strength`.

    Args:
        strength: a number or a schedule of the count, at least 0.
        pattern: whose blocks or channels are the groups; with `Unstructured()` it is
            `l1`.

    Returns:
        The map.

    Raises:
        TypeError: `pattern` has no groups that die together.
        ValueError: `strength` is negative or not finite.

    References:
        Yuan and Lin, Model selection and estimation in regression with grouped
        variables, 2006; Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.4.

    >>> w = jnp.array([[2.0, 0.1], [2.0, 0.1]])
    >>> group_lasso(0.5, patterns.Channel()).prox(w, 0)
    Array([[1.5, 0. ],
           [1.5, 0. ]], dtype=float32)
    """
    _check_strength(strength)
    if not isinstance(
        pattern, patterns.Unstructured | patterns.Block | patterns.Channel
    ):
        raise TypeError(
            f"pattern must be Block(shape) or Channel(axis), got {pattern!r}; for N:M "
            "use jopt.prune(inner, pattern=jopt.NM(2, 4))"
        )
    groups = pattern
    if isinstance(pattern, patterns.Block):
        groups = dataclasses.replace(pattern, reduce="mean")

    def prox(w: jax.Array, count: Any) -> jax.Array:
        w, least = as_float32(w), _at(strength, count)
        size = jnp.sqrt(patterns.pool(jnp.square(w), groups))
        # Not 1 - min(...): a norm that is NaN has to stay one.
        factor = jnp.where(size <= least, jnp.zeros_like(size), 1 - least / size)
        return w * patterns.spread(factor, groups, w.shape)

    return ProximalMap(prox, groups)


def hard_threshold(strength: Strength) -> ProximalMap:
    """Make weights zero that are worth less than what each costs: the l0 penalty.

    prox(w) = w where |w| > sqrt(2 * strength), 0 elsewhere

    Args:
        strength: a number or a schedule of the count, at least 0.

    Returns:
        The map.

    Raises:
        ValueError: `strength` is negative or not finite.

    References:
        Blumensath and Davies, Iterative Thresholding for Sparse Approximations, 2008.

    >>> hard_threshold(0.5).prox(jnp.array([-3.0, 0.5, 1.0, 2.0]), 0)
    Array([-3.,  0.,  0.,  2.], dtype=float32)
    """
    _check_strength(strength)

    def prox(w: jax.Array, count: Any) -> jax.Array:
        w = as_float32(w)
        least = jnp.sqrt(2 * jnp.asarray(_at(strength, count), w.dtype))
        return jnp.where(jnp.abs(w) <= least, jnp.zeros_like(w), w)

    return ProximalMap(prox)


def _at(strength: Strength, count: Any) -> Any:
    return strength(count) if callable(strength) else strength


def _check_strength(strength: Any) -> None:
    if not callable(strength):
        example = "it is the learning rate times the weight of the penalty"
        check_strength("strength", strength, example)
