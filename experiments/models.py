"""Two NNX models as pure functions: a ResNet and a GPT.

`build(config, data, seed=...)` returns `(apply, params)` with `apply(params, x) ->
logits` and params as nested dicts: what every transformation of jopt takes. A GPT's
`apply(params, x, caches) -> (logits, caches)` goes on from cached tokens. Both models
normalise without running statistics, so nothing but params changes in training.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.data import Dataset

Apply = Callable[..., Any]  # (params, x) -> logits; a GPT's also (params, x, caches)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and how large."""

    kind: Literal["resnet", "gpt"] = "resnet"
    depth: int = 1  # blocks per stage; layers of a GPT
    width: int = 32  # channels of the first stage; features of a GPT
    connections: Literal["plain", "residual", "dense"] = "residual"
    heads: int = 4


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


class GroupNorm(nnx.Module):
    """Normalise groups of channels of one image; `nnx.GroupNorm` up to rounding.

    Channels are summed over the picture before they are summed into groups: a sum that
    keeps the last axis runs in vector registers, which makes a training step of the
    ResNet about twice as fast on a CPU.
    """

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        channels = x.shape[-1]
        grouped = (len(x), _groups(channels), -1)

        def over_groups(means):
            return means.reshape(grouped).mean(-1, keepdims=True)

        mean = over_groups(x.mean(axis=(1, 2)))
        square = over_groups(jnp.square(x).mean(axis=(1, 2)))
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        scale = self.scale[...].reshape(1, *grouped[1:]) * jax.lax.rsqrt(
            variance + 1e-6
        )
        bias = self.bias[...].reshape(1, *grouped[1:]) - mean * scale
        per_image = (len(x), 1, 1, channels)
        return x * scale.reshape(per_image) + bias.reshape(per_image)


class Block(nnx.Module):
    """norm, relu, 3x3, norm, relu, 3x3; its input is dropped, added or concatenated."""

    def __init__(self, cin: int, cout: int, *, stride: int, connections: str, rngs):
        conv = lambda a, b, s: nnx.Conv(  # noqa: E731
            a, b, (3, 3), strides=s, use_bias=False, rngs=rngs
        )
        self.norm1 = GroupNorm(cin)
        self.conv1 = conv(cin, cout, stride)
        self.norm2 = GroupNorm(cout)
        self.conv2 = conv(cout, cout, 1)
        self.connections = connections
        changes = cin != cout or stride != 1
        self.shortcut = (
            nnx.Conv(cin, cout, (1, 1), strides=stride, use_bias=False, rngs=rngs)
            if changes and connections == "residual"
            else None
        )

    def __call__(self, x):
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        if self.connections == "residual":
            return y + (x if self.shortcut is None else self.shortcut(x))
        if self.connections == "dense":
            return jnp.concatenate([x, y], axis=-1)
        return y


class ResNet(nnx.Module):
    """Three stages of widths w, 2w, 4w that halve the picture, mean, linear."""

    def __init__(self, config: ModelConfig, *, channels: int, classes: int, rngs):
        width, dense = config.width, config.connections == "dense"
        self.stem = nnx.Conv(channels, width, (3, 3), use_bias=False, rngs=rngs)
        blocks, transitions, cin = [], [], width
        for stage in range(3):
            cout = width * 2**stage
            for i in range(config.depth):
                stride = 2 if stage and not i and not dense else 1
                how = {"stride": stride, "connections": config.connections}
                blocks.append(Block(cin, cout, **how, rngs=rngs))
                cin = cin + cout if dense else cout
            if dense and stage < 2:  # fewer channels and half the size
                transitions.append(
                    nnx.Conv(cin, cout, (1, 1), strides=2, use_bias=False, rngs=rngs)
                )
                cin = cout
        self.blocks = nnx.List(blocks)
        self.transitions = nnx.List(transitions)
        self.depth = config.depth
        self.norm = GroupNorm(cin)
        self.head = nnx.Linear(cin, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            stage_ends = (i + 1) % self.depth == 0
            if stage_ends and i // self.depth < len(self.transitions):
                x = self.transitions[i // self.depth](x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


class Layer(nnx.Module):
    """Causal attention and a two-layer network, each behind a norm, residual."""

    def __init__(self, width: int, heads: int, *, rngs):
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)  # noqa: E731
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)
        self.heads = heads

    def __call__(self, x, attend):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1)
        mixed, memory = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x + self.out(mixed.reshape(batch, length, width))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)))), memory


def _attend(cache, query, key, value):
    """Attend to these tokens, or to all that a cache holds with them."""
    if cache is None:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True), None
    positions = cache.length[:, None] + jnp.arange(query.shape[1])[None]
    cache = cache.append(key, value)
    keys, values, mask = cache.read(positions)
    return jax.nn.dot_product_attention(query, keys, values, mask=mask), cache


class GPT(nnx.Module):
    """Characters in, the logits of the next character out.

    With caches, one `jopt.KeyValueCache` per layer, the characters go on from those
    that the caches hold, and the result is the logits and the caches.
    """

    def __init__(self, config: ModelConfig, *, classes: int, length: int, rngs):
        self.embed = nnx.Embed(classes, config.width, rngs=rngs)
        self.position = nnx.Embed(length, config.width, rngs=rngs)
        self.layers = nnx.List(
            [Layer(config.width, config.heads, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, classes, use_bias=False, rngs=rngs)

    def __call__(self, x, caches=None):
        positions = jnp.arange(x.shape[1])[None]
        held = [None] * len(self.layers) if caches is None else list(caches)
        if caches is not None:
            positions = positions + held[0].length[:, None]
        x = self.embed(x) + self.position(positions)
        for i, layer in enumerate(self.layers):
            x, held[i] = layer(x, functools.partial(_attend, held[i]))
        logits = self.head(self.norm(x))
        return logits if caches is None else (logits, held)


def build(config: ModelConfig, data: Dataset, *, seed: int) -> tuple[Apply, Any]:
    """Make a model for the data: a pure `apply(params, x)` and its first params."""
    if (config.kind == "gpt") != (data.kind == "text"):
        needs = "a text" if config.kind == "gpt" else "images"
        raise ValueError(
            f"model {config.kind} needs {needs}, got the {data.kind} {data.name!r}; "
            "choose another --model or --data-dir"
        )
    channels = data.train["x"].shape[-1] if data.kind == "images" else 0
    apply, draw = _functions(config, channels, data.num_classes, data.length)
    return apply, draw(seed)


@functools.cache
def _functions(
    config: ModelConfig, channels: int, classes: int, length: int
) -> tuple[Apply, Callable[[int], Any]]:
    """Return apply, and first params as a function of a seed."""

    def create() -> nnx.Module:
        rngs = nnx.Rngs(0)
        if config.kind == "gpt":
            return GPT(config, classes=classes, length=length, rngs=rngs)
        return ResNet(config, channels=channels, classes=classes, rngs=rngs)

    abstract = nnx.eval_shape(create)
    graph, shapes = nnx.split(abstract, nnx.Param)

    def apply(params, *inputs):
        state = jax.tree.map(lambda leaf: leaf, shapes)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state, copy=True)(*inputs)

    return apply, functools.partial(_draw, _string_keys(nnx.to_pure_dict(shapes)))


def _draw(shapes: Any, seed: int) -> Any:
    """Draw first params by NumPy: scales 1, biases 0, kernels of variance 2 / fan-in.

    The initialisers of the layers would compile for seconds, more than a short run
    takes.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else leaf.shape[-1]
        return jnp.asarray(rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


def _string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}


def num_params(params: Any) -> int:
    """Count the elements of all leaves."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def student_of(config: ModelConfig) -> ModelConfig:
    """Return a model of about a quarter of the parameters: half the width."""
    heads = max(config.heads // 2, 1) if config.kind == "gpt" else config.heads
    return dataclasses.replace(config, width=config.width // 2, heads=heads)
