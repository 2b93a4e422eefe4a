"""Calibration data that a language model makes up itself.

A model knows what it was trained on: text that it samples meets its layers much as real
text does, and better than random tokens do. The first token of a row is random, a few
more are the likeliest (a model is sure of little at first, and would wander off), and
the rest are drawn:

    x_0 ~ uniform,   x_t = argmax p(. | x_<t)  for t <= num_greedy,   x_t ~ p(. | x_<t)

Liu et al., LLM-QAT: Data-Free Quantization Aware Training for Large Language Models,
arXiv:2305.17888.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jopt.arrays.arguments import check_key


def sample_tokens(
    apply: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    shape: tuple[int, int],
    num_batches: int,
    num_greedy: int = 4,
    temperature: float = 1.0,
) -> list[jax.Array]:
    """Let a language model write the batches that it is calibrated with.

    One program, compiled once, runs the model once per token, on rows of the full
    length, without a cache.

    Args:
        apply: a pure function `apply(params, tokens)` of int32 `[batch, length]` to
            logits `[batch, length, tokens]`, those at a place for the token after it,
            and not dependent on any after the place: what stands there is 0.
        params: its parameters.
        key: a PRNG key.
        shape: `(batch, length)` of each batch.
        num_batches: how many.
        num_greedy: tokens after the first that are the likeliest, not drawn.
        temperature: that logits are divided by.

    Returns:
        The batches, int32, for `jopt.gptq` and all others that take batches.

    Raises:
        TypeError: `shape` is not of two integers, or `key` no PRNG key.
        ValueError: `apply` gives no logits of that shape, a number is out of range, or
            logits are NaN or +inf, or -inf for all tokens (not told inside of
            `jax.jit`).

    References:
        Liu et al., LLM-QAT: Data-Free Quantization Aware Training for Large Language
        Models, arXiv:2305.17888.

    >>> import jax.numpy as jnp, jopt
    >>> apply = lambda params, tokens: params["next"][tokens]
    >>> params = {"next": 100.0 * jnp.eye(3)[jnp.array([1, 2, 0])]}
    >>> (batch,) = sample_tokens(
    ...     apply, params, jax.random.key(0), shape=(1, 4), num_batches=1
    ... )
    >>> ((batch[:, 1:] - batch[:, :-1]) % 3).tolist()  # always the next one
    [[1, 1, 1]]
    """
    sizes = shape if isinstance(shape, tuple | list) else ()
    if len(sizes) != 2 or not all(isinstance(n, int | np.integer) for n in sizes):
        raise TypeError(
            f"shape must be two integers (batch, length), got {shape!r}; for example "
            "shape=(8, 512)"
        )
    check_key(key, is_optional=False)
    if min(shape) < 1 or num_batches < 1 or num_greedy < 0 or not temperature > 0:
        raise ValueError(
            "shape and num_batches must be at least 1, num_greedy 0 and temperature "
            f"above 0, got {shape}, {num_batches}, {num_greedy} and {temperature}"
        )
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)  # type: ignore[no-untyped-call]
    found = jax.eval_shape(apply, params, tokens)
    got = getattr(found, "shape", None)
    if got is None or got[:-1] != tuple(shape):
        raise ValueError(
            f"apply must give logits of shape {(*shape, 'tokens')} for tokens of shape "
            f"{shape}, got {found}; wrap it to return those alone"
        )

    @jax.jit
    def write(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = jax.random.fold_in(key, 0)
        first = jax.random.randint(start, shape[:1], 0, got[-1], jnp.int32)
        rows = jnp.zeros(shape, jnp.int32).at[:, 0].set(first)

        def step(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
            rows, is_sound = carry
            logits = apply(params, rows).astype(jnp.float32)
            now = lax.dynamic_index_in_dim(logits, t - 1, 1, keepdims=False)
            own = jax.random.fold_in(key, t)
            drawn = jax.random.categorical(own, now / temperature)
            new = jnp.where(t <= num_greedy, jnp.argmax(now, axis=-1), drawn)
            # -inf forbids a token; NaN, +inf and -inf alone are no distribution.
            is_sound &= jnp.isfinite(jnp.max(now, axis=-1)).all()
            return rows.at[:, t].set(new.astype(jnp.int32)), is_sound

        return lax.fori_loop(1, shape[1], step, (rows, jnp.bool_(True)))

    batches = []
    for i, one in enumerate(jax.random.split(key, num_batches)):
        rows, is_sound = write(params, one)
        if not isinstance(is_sound, jax.core.Tracer) and not bool(is_sound):
            raise ValueError(
                "apply must give logits that are finite, or -inf for some tokens, got "
                f"NaN, infinity or -inf for all in batch {i}; look at the params"
            )
        batches.append(rows)
    return batches
