"""Small models, and the sites that must be found in them, written down by hand.

`ZOO` has them all. Plain models stand here, programs in which a weight takes a detour
in `zoo_programs`, those written with a framework in `zoo_flax` and `zoo_equinox`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tests.programs import zoo_equinox, zoo_flax, zoo_programs
from tests.programs.zoo_model import (
    LOOKUP,
    Model,
    attend,
    conv,
    dense,
    dot,
    draw,
    expand,
    floats,
    loss,
    ragged,
    rms_norm,
    tokens,
)

__all__ = ["Model", "ZOO", "loss"]


def mlp() -> Model:
    """Two linear layers with biases."""

    def apply(params, x):
        h = jax.nn.relu(dense(x, params["up"]["kernel"], params["up"]["bias"]))
        return dense(h, params["down"]["kernel"], params["down"]["bias"])

    shapes = {
        "up": {"kernel": (4, 8), "bias": (8,)},
        "down": {"kernel": (8, 3), "bias": (3,)},
    }
    return Model(
        apply,
        draw(shapes),
        (floats(2, 4),),
        weights={"up/kernel": dot("in out"), "down/kernel": dot("in out")},
        uncovered=frozenset({"up/bias", "down/bias"}),
    )


def haiku_style() -> Model:
    """Modules in one flat dict, with slashes inside of its keys."""
    first, second = "mlp/~/linear_0", "mlp/~/linear_1"

    def apply(params, x):
        h = jnp.tanh(dense(x, **named(params[first])))
        return dense(h, **named(params[second]))

    def named(layer):
        return {"kernel": layer["w"], "bias": layer["b"]}

    shapes = {first: {"w": (4, 8), "b": (8,)}, second: {"w": (8, 3), "b": (3,)}}
    return Model(
        apply,
        draw(shapes),
        (floats(2, 4),),
        weights={
            "mlp/~/linear_0/w": dot("in out"),
            "mlp/~/linear_1/w": dot("in out"),
        },
        uncovered=frozenset({"mlp/~/linear_0/b", "mlp/~/linear_1/b"}),
    )


def einsum() -> Model:
    """Attention by einsum, with one kernel axis per head and per feature."""

    def apply(params, x):
        query, key, value = (
            jnp.einsum("bsd,dhk->bshk", x, params[name])
            for name in ("query", "key", "value")
        )
        return jnp.einsum("bshk,hkd->bsd", attend(query, key, value), params["out"])

    kernel = (8, 2, 4)
    shapes = {"query": kernel, "key": kernel, "value": kernel, "out": (2, 4, 8)}
    return Model(
        apply,
        draw(shapes),
        (floats(2, 3, 8),),
        weights={
            "query": dot("in out out"),
            "key": dot("in out out"),
            "value": dot("in out out"),
            "out": dot("in in out"),
        },
        num_activations=2,
    )


def gqa() -> Model:
    """Grouped-query attention: bfloat16 params, RoPE, key and value in one leaf."""
    heads, kv_heads, size = 4, 2, 4

    def apply(params, x):
        query = x @ params["query"].astype(x.dtype)
        # Fused kernels are split before the products or after; this one is before.
        key = x @ params["kv"][:, : kv_heads * size].astype(x.dtype)
        value = x @ params["kv"][:, kv_heads * size :].astype(x.dtype)
        query = rotate(query.reshape(*x.shape[:2], heads, size))
        key = rotate(key.reshape(*x.shape[:2], kv_heads, size))
        value = value.reshape(*x.shape[:2], kv_heads, size)
        out = grouped(query, key, value)
        return out.reshape(*x.shape[:2], -1) @ params["out"].astype(x.dtype)

    def rotate(x):
        frequency = 10.0 ** -jnp.arange(size // 2, dtype=x.dtype)
        angle = jnp.outer(jnp.arange(x.shape[1], dtype=x.dtype), frequency)
        sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
        left, right = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)

    def grouped(query, key, value):
        query = query.reshape(*query.shape[:2], kv_heads, heads // kv_heads, size)
        logits = jnp.einsum("bqhgd,bkhd->bhgqk", query, key)
        return jnp.einsum("bhgqk,bkhd->bqhgd", jax.nn.softmax(logits), value)

    shapes = {"query": (8, 16), "kv": (8, 16), "out": (16, 8)}
    return Model(
        apply,
        draw(shapes, jnp.bfloat16),
        (floats(2, 3, 8),),
        weights={
            "query": dot("in out"),
            "kv": dot("in out"),
            "kv#1": dot("in out"),
            "out": dot("in out"),
        },
        num_activations=2,
    )


def moe_ragged() -> Model:
    """A mixture of experts: top-1 router, tokens sorted by expert, ragged dots."""

    def apply(params, x):
        chances = jax.nn.softmax(x @ params["router"])
        expert = jnp.argmax(chances, axis=-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=3)
        h = jax.nn.gelu(lax.ragged_dot(x[order], params["up"], sizes))
        out = lax.ragged_dot(h, params["down"], sizes)
        return jnp.max(chances, axis=-1, keepdims=True) * out[jnp.argsort(order)]

    return Model(
        apply,
        draw({"router": (4, 3), "up": (3, 4, 8), "down": (3, 8, 4)}),
        (floats(6, 4),),
        weights={
            "router": dot("in out"),
            "up": ragged("batch in out"),
            "down": ragged("batch in out"),
        },
    )


def moe_dense() -> Model:
    """A mixture of experts that all see every token."""

    def apply(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        h = jax.nn.gelu(jnp.einsum("bd,edf->ebf", x, params["up"]))
        out = jnp.einsum("ebf,efd->ebd", h, params["down"])
        return jnp.einsum("be,ebd->bd", gates, out)

    return Model(
        apply,
        draw({"router": (4, 3), "up": (3, 4, 8), "down": (3, 8, 4)}),
        (floats(2, 4),),
        weights={
            "router": dot("in out"),
            # The tokens have no expert axis yet to batch over.
            "up": dot("out in out"),
            "down": dot("batch in out"),
        },
        num_activations=1,
    )


def lstm_scan() -> Model:
    """An LSTM over time, both kernels closed over."""

    def apply(params, x):
        def step(carry, now):
            cell, hidden = carry
            gates = dense(now, params["input"], params["bias"])
            gates = gates + hidden @ params["hidden"]
            keep, write, read, new = jnp.split(gates, 4, axis=-1)
            cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(write) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(read) * jnp.tanh(cell)
            return (cell, hidden), hidden

        start = jnp.zeros((x.shape[0], 6))
        _, outputs = lax.scan(step, (start, start), jnp.swapaxes(x, 0, 1))
        return outputs[-1] @ params["head"]

    shapes = {"input": (4, 24), "hidden": (6, 24), "bias": (24,), "head": (6, 3)}
    return Model(
        apply,
        draw(shapes),
        (floats(2, 5, 4),),
        weights={
            "input": dot("in out"),
            "hidden": dot("in out"),
            "head": dot("in out"),
        },
        uncovered=frozenset({"bias"}),
    )


def gru_scan() -> Model:
    """A GRU: inputs projected ahead of time, the hidden kernel used in two parts."""
    size = 6

    def apply(params, x):
        def step(hidden, now):
            gates = now[:, : 2 * size] + hidden @ params["hidden"][:, : 2 * size]
            update, reset = jnp.split(jax.nn.sigmoid(gates), 2, axis=-1)
            new = (reset * hidden) @ params["hidden"][:, 2 * size :]
            new = jnp.tanh(now[:, 2 * size :] + new)
            hidden = update * hidden + (1 - update) * new
            return hidden, hidden

        projected = dense(x, params["input"], params["bias"])
        start = jnp.zeros((x.shape[0], size))
        _, outputs = lax.scan(step, start, jnp.swapaxes(projected, 0, 1))
        return jnp.swapaxes(outputs, 0, 1)

    shapes = {"input": (4, 18), "hidden": (6, 18), "bias": (18,)}
    return Model(
        apply,
        draw(shapes),
        (floats(2, 5, 4),),
        weights={
            "input": dot("in out"),
            "hidden": dot("in out"),
            "hidden#1": dot("in out"),
        },
        uncovered=frozenset({"bias"}),
    )


def vit() -> Model:
    """A vision transformer: patches by convolution, class token, unrolled blocks."""

    def apply(params, images):
        patches = lax.conv_general_dilated(
            images,
            params["patch"],
            window_strides=(4, 4),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(params["class"], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + params["position"]
        for layer in params["blocks"]:
            x = block(layer, x)
        return x[:, 0] @ params["head"]

    def block(layer, x):
        fused = rms_norm(x, layer["norm_1"]) @ layer["qkv"]
        heads = jnp.split(fused.reshape(*x.shape[:2], 6, 4), 3, axis=2)
        x = x + attend(*heads).reshape(x.shape) @ layer["out"]
        h = jax.nn.gelu(rms_norm(x, layer["norm_2"]) @ layer["up"])
        return x + h @ layer["down"]

    kernels = {"qkv": (8, 24), "out": (8, 8), "up": (8, 12), "down": (12, 8)}
    norms = {"norm_1": (8,), "norm_2": (8,)}
    shapes = {
        "patch": (4, 4, 3, 8),
        "class": (1, 1, 8),
        "position": (1, 5, 8),
        "blocks": [kernels | norms, kernels | norms],
        "head": (8, 3),
    }
    plain = {"class", "position"}
    return Model(
        apply,
        draw(shapes),
        (floats(2, 8, 8, 3),),
        weights={
            "patch": conv("in in in out"),
            "blocks/0/qkv": dot("in out"),
            "blocks/0/out": dot("in out"),
            "blocks/0/up": dot("in out"),
            "blocks/0/down": dot("in out"),
            "blocks/1/qkv": dot("in out"),
            "blocks/1/out": dot("in out"),
            "blocks/1/up": dot("in out"),
            "blocks/1/down": dot("in out"),
            "head": dot("in out"),
        },
        num_activations=4,
        uncovered=frozenset(
            plain | {f"blocks/{i}/{name}" for i in range(2) for name in norms}
        ),
    )


def stacked_scan() -> Model:
    """Layers stacked on axis 0, a scan over them with remat inside."""

    def apply(params, x):
        @jax.checkpoint
        def layer(h, one):
            new = rms_norm(h, one["norm"]) @ one["up"]
            return h + jax.nn.silu(new) @ one["down"], None

        h, _ = lax.scan(layer, x, params["layers"])
        return h @ params["head"]

    layers = {"norm": (3, 4), "up": (3, 4, 8), "down": (3, 8, 4)}
    return Model(
        apply,
        draw({"layers": layers, "head": (4, 2)}),
        (floats(2, 4),),
        weights={
            "layers/up": dot("stacked in out"),
            "layers/down": dot("stacked in out"),
            "head": dot("in out"),
        },
        uncovered=frozenset({"layers/norm"}),
    )


def indexed_layers() -> Model:
    """Layers stacked on axis 0, each taken out by its index in a loop."""

    def apply(params, x):
        def layer(i, h):
            h = jnp.tanh(h @ params["w"][i] + params["b"][i][None])
            return h @ lax.dynamic_index_in_dim(params["v"], i, axis=1, keepdims=False)

        return lax.fori_loop(0, 3, layer, x)

    return Model(
        apply,
        # A stack need not be on axis 0, nor the same one for all leaves.
        draw({"w": (3, 4, 8), "b": (3, 8), "v": (8, 3, 4)}),
        (floats(2, 4),),
        weights={"w": dot("stacked in out"), "v": dot("in stacked out")},
        uncovered=frozenset({"b"}),
    )


def tied() -> Model:
    """One embedding, looked up first and multiplied with last."""

    def apply(params, ids):
        h = jnp.tanh(params["embedding"][ids] @ params["kernel"])
        return h @ params["embedding"].T

    return Model(
        apply,
        draw({"embedding": (11, 4), "kernel": (4, 4)}),
        (tokens(2, 5, vocabulary=11),),
        weights={
            "embedding": LOOKUP,
            "kernel": dot("in out"),
            "embedding#1": dot("out in"),
        },
    )


def conv_transpose() -> Model:
    """A strided convolution and a transposed one back to the size of the input."""
    layout = ("NHWC", "HWIO", "NHWC")

    def apply(params, x):
        h = lax.conv_general_dilated(
            x, params["down"], (2, 2), "SAME", dimension_numbers=layout
        )
        h = jax.nn.relu(h + expand(params["bias"], 4))
        return lax.conv_transpose(
            h, params["up"], (2, 2), "SAME", dimension_numbers=layout
        )

    return Model(
        apply,
        draw({"down": (3, 3, 2, 4), "bias": (4,), "up": (3, 3, 4, 2)}),
        (floats(2, 6, 6, 2),),
        weights={"down": conv("in in in out"), "up": conv("in in in out")},
        uncovered=frozenset({"bias"}),
    )


def mixer() -> Model:
    """An MLP-Mixer block: one kernel over tokens on the left, one on the right."""

    def apply(params, x):
        h = jax.nn.gelu(params["token_in"] @ x)
        h = jnp.swapaxes(h, 1, 2) @ params["token_out"]
        x = x + jnp.swapaxes(h, 1, 2)
        return x + jax.nn.gelu(x @ params["up"]) @ params["down"]

    shapes = {"token_in": (6, 5), "token_out": (6, 5), "up": (4, 8), "down": (8, 4)}
    return Model(
        apply,
        draw(shapes),
        (floats(2, 5, 4),),
        weights={
            "token_in": dot("out in"),
            "token_out": dot("in out"),
            "up": dot("in out"),
            "down": dot("in out"),
        },
    )


PLAIN = (
    mlp,
    haiku_style,
    einsum,
    gqa,
    moe_ragged,
    moe_dense,
    lstm_scan,
    gru_scan,
    vit,
    stacked_scan,
    indexed_layers,
    tied,
    conv_transpose,
    mixer,
)
ZOO: dict[str, Callable[[], Model]] = {
    # The name of one program is a keyword, which a function wears with an underscore.
    builder.__name__.rstrip("_"): builder
    for builder in (
        *PLAIN,
        *zoo_programs.PROGRAMS,
        *zoo_flax.FLAX,
        *zoo_equinox.EQUINOX,
    )
}
