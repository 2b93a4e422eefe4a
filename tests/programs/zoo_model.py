"""What a model of the zoo is, and the few words to write one down with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Site = tuple[str, dict[int, str]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A small model, and what must be found in it.

    The sites are written down from the text of the model, never copied from what a
    tool reports. A site is named by the path of its leaf, the second one of the same
    leaf by `path#1`; a body counts once, however often it runs.

    Attributes:
        apply: a pure function `apply(params, *inputs)`.
        params: a pytree of random floats.
        inputs: arrays.
        weights: name of a site to its primitive and the role of every leaf axis: 'in'
            is contracted, 'out' stays, 'batch' is a batch or group dimension, 'stacked'
            is sliced away before use, 'index' is looked up, 'mixed' is split by a
            reshape into parts of different roles.
        num_activations: dots and convolutions without any weight.
        derived: the leaves behind each operand that is computed from params alone, but
            is not a view of one leaf.
        uncovered: leaves that feed no site.
        opaque: leaves whose sites, listed in `weights` all the same, hide behind a
            custom differentiation rule.
    """

    apply: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    weights: dict[str, Site]
    num_activations: int = 0
    derived: tuple[frozenset[str], ...] = ()
    uncovered: frozenset[str] = frozenset()
    opaque: frozenset[str] = frozenset()


def loss(model: Model, params: Any, *inputs: Any) -> jax.Array:
    """Mean of squares of all outputs."""
    outputs = jax.tree.leaves(model.apply(params, *inputs))
    total = sum(jnp.sum(jnp.square(out.astype(jnp.float32))) for out in outputs)
    return total / sum(out.size for out in outputs)


def dot(roles: str) -> Site:
    """A `dot_general`, with the roles of the leaf axes in order."""
    return "dot_general", dict(enumerate(roles.split()))


def ragged(roles: str) -> Site:
    """A `ragged_dot`, with the roles of the leaf axes in order."""
    return "ragged_dot_general", dict(enumerate(roles.split()))


def conv(roles: str) -> Site:
    """A convolution, with the roles of the leaf axes in order."""
    return "conv_general_dilated", dict(enumerate(roles.split()))


LOOKUP: Site = ("gather", {0: "index", 1: "out"})


def draw(shapes: Any, dtype: Any = jnp.float32) -> Any:
    """Random params, one array per shape in a tree of tuples."""
    leaves = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return randomize(leaves)


def randomize(tree: Any) -> Any:
    """Random arrays in place of abstract ones, biases no zeros either."""
    # NumPy's generator has nothing to compile, which for most models is all the cost.
    numbers = np.random.default_rng(0)

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        # At this scale neither deep nor repeated layers blow up or fade away.
        return jnp.asarray(0.5 * numbers.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, tree)


def floats(*shape: int) -> jax.Array:
    """A random input."""
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def tokens(*shape: int, vocabulary: int) -> jax.Array:
    """A random input of token ids."""
    return jnp.asarray(np.random.default_rng(1).integers(vocabulary, size=shape))


def expand(vector: jax.Array, ndim: int) -> jax.Array:
    """Give a vector leading axes, for implicit ones are refused in tests."""
    return jnp.expand_dims(vector, tuple(range(ndim - vector.ndim)))


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """A linear layer over the last axis."""
    return x @ kernel + expand(bias, x.ndim)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Normalize the last axis and scale it by a parameter."""
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6) * expand(scale, x.ndim)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention over [batch, length, heads, features]: two dots of activations."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
