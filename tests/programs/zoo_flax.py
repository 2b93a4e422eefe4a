"""Models of the zoo that are written with Flax: Linen and NNX."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.programs.zoo_model import (
    LOOKUP,
    Model,
    conv,
    dot,
    floats,
    randomize,
    tokens,
)

KERNEL_2D = conv("in in in out")


class LinenResidual(nn.Module):
    """Two convolutions, and a projection beside them."""

    features: int

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(self.features, (3, 3), strides=2, name="conv_1")(x)
        h = nn.relu(nn.BatchNorm(use_running_average=True, name="norm_1")(h))
        h = nn.Conv(self.features, (3, 3), use_bias=False, name="conv_2")(h)
        side = nn.Conv(self.features, (1, 1), strides=2, name="side")(x)
        return nn.relu(h + side)


class LinenCNN(nn.Module):
    """Stem, residual block, depthwise and pointwise convolution, head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = LinenResidual(6, name="block")(x)
        x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        x = nn.Conv(8, (1, 1), use_bias=False, name="pointwise")(nn.relu(x))
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


def linen_cnn() -> Model:
    """Linen convolutions of all kinds, with the batch statistics closed over."""
    model = LinenCNN()
    images = floats(2, 8, 8, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    statistics = _statistics(shapes["batch_stats"])

    def apply(params, x):
        return model.apply({"params": params, "batch_stats": statistics}, x)

    return Model(
        apply,
        randomize(shapes["params"]),
        (images,),
        weights={
            "stem/kernel": KERNEL_2D,
            "block/conv_1/kernel": KERNEL_2D,
            "block/conv_2/kernel": KERNEL_2D,
            "block/side/kernel": KERNEL_2D,
            "depthwise/kernel": KERNEL_2D,
            "pointwise/kernel": KERNEL_2D,
            "head/kernel": dot("in out"),
        },
        uncovered=frozenset(
            {
                "norm/scale",
                "norm/bias",
                "block/conv_1/bias",
                "block/norm_1/scale",
                "block/norm_1/bias",
                "block/side/bias",
                "depthwise/bias",
                "head/bias",
            }
        ),
    )


class LinenLayer(nn.Module):
    """A transformer layer in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(h, h)
        h = nn.Dense(12, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(8, name="down")(nn.gelu(h)), None


class LinenTransformer(nn.Module):
    """Layers stacked by scan and recomputed, between a tied embedding."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8, name="embed")
        layers = nn.scan(
            nn.remat(LinenLayer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = layers(name="layers")(embed(ids), None)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def linen_transformer() -> Model:
    """A Linen transformer with scan, remat and a tied embedding."""
    model = LinenTransformer()
    ids = tokens(2, 5, vocabulary=11)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)

    def apply(params, x):
        return model.apply({"params": params}, x)

    return Model(
        apply,
        randomize(shapes["params"]),
        (ids,),
        weights={
            "embed/embedding": LOOKUP,
            **_stacked_layer(),
            "embed/embedding#1": dot("out in"),
        },
        num_activations=2,
        uncovered=_plain_leaves() | {"norm/scale", "norm/bias"},
    )


def _stacked_layer():
    return {
        "layers/attention/query/kernel": dot("stacked in out out"),
        "layers/attention/key/kernel": dot("stacked in out out"),
        "layers/attention/value/kernel": dot("stacked in out out"),
        "layers/attention/out/kernel": dot("stacked in in out"),
        "layers/up/kernel": dot("stacked in out"),
        "layers/down/kernel": dot("stacked in out"),
    }


def _plain_leaves():
    biases = {name.replace("kernel", "bias") for name in _stacked_layer()}
    norms = {f"layers/norm_{i}/{name}" for i in (1, 2) for name in ("scale", "bias")}
    return frozenset(biases | norms)


class NnxCNN(nnx.Module):
    """Plain and grouped convolutions, a norm and a head."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.grouped = nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.pointwise = nnx.Conv(8, 6, (1, 1), use_bias=False, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = self.pointwise(nnx.relu(self.grouped(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))


def nnx_cnn() -> Model:
    """NNX convolutions, with the batch statistics closed over."""
    apply, params = _nnx_apply(NnxCNN)
    return Model(
        apply,
        params,
        (floats(2, 6, 6, 3),),
        weights={
            "stem/kernel": KERNEL_2D,
            "grouped/kernel": KERNEL_2D,
            "pointwise/kernel": KERNEL_2D,
            "head/kernel": dot("in out"),
        },
        uncovered=frozenset(
            {"stem/bias", "norm/scale", "norm/bias", "grouped/bias", "head/bias"}
        ),
    )


class NnxLayer(nnx.Module):
    """A transformer layer."""

    def __init__(self, rngs):
        self.norm_1 = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class NnxTransformer(nnx.Module):
    """Layers stacked by vmap, run by scan and recomputed."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return NnxLayer(rngs)

        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = stack(rngs)
        self.head = nnx.Linear(8, 11, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return layer(x)

        return self.head(run(self.embed(ids), self.layers))


def nnx_transformer() -> Model:
    """An NNX transformer with vmapped creation, scan and remat."""
    apply, params = _nnx_apply(NnxTransformer)
    return Model(
        apply,
        params,
        (tokens(2, 5, vocabulary=11),),
        weights={
            "embed/embedding": LOOKUP,
            **_stacked_layer(),
            "head/kernel": dot("in out"),
        },
        num_activations=2,
        uncovered=_plain_leaves(),
    )


def _nnx_apply(module):
    model = nnx.eval_shape(lambda: module(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    rest = _statistics(rest)

    def apply(params, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    return apply, randomize(params)


def _statistics(shapes):
    # Variances above all: whatever they are, they must not be negative.
    return jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.5, randomize(shapes))


FLAX = (linen_cnn, linen_transformer, nnx_cnn, nnx_transformer)
