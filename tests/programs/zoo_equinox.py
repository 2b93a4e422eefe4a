"""Models of the zoo that are written with Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.programs.zoo_model import Model, conv, dot, floats, randomize


def equinox_mlp(num_inputs: int = 4, num_outputs: int = 3, depth: int = 2) -> Model:
    """An Equinox MLP under vmap; its weights stand on the left."""
    apply, params = _batched(
        lambda key: eqx.nn.MLP(
            num_inputs, num_outputs, width_size=8, depth=depth, key=key
        )
    )
    layers = [f"layers/{i}" for i in range(depth + 1)]
    return Model(
        apply,
        params,
        (floats(2, num_inputs),),
        weights={f"{layer}/weight": dot("out in") for layer in layers},
        uncovered=frozenset(f"{layer}/bias" for layer in layers),
    )


class ConvAttention(eqx.Module):
    """A convolution whose pixels attend to each other."""

    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(3, 8, kernel_size=2, stride=2, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(
            2, 8, use_output_bias=True, key=keys[1]
        )
        self.head = eqx.nn.Linear(8, 3, use_bias=False, key=keys[2])

    def __call__(self, image):
        pixels = jax.nn.relu(self.conv(image)).reshape(8, -1).T
        mixed = self.attention(pixels, pixels, pixels)
        return self.head(jnp.mean(mixed, axis=0))


def equinox_conv_attention() -> Model:
    """Convolution and attention of Equinox under vmap."""
    apply, params = _batched(ConvAttention)
    return Model(
        apply,
        params,
        (floats(2, 3, 4, 4),),
        weights={
            "conv/weight": conv("out in in in"),
            "attention/query_proj/weight": dot("out in"),
            "attention/key_proj/weight": dot("out in"),
            "attention/value_proj/weight": dot("out in"),
            "attention/output_proj/weight": dot("out in"),
            "head/weight": dot("out in"),
        },
        num_activations=2,
        uncovered=frozenset({"conv/bias", "attention/output_proj/bias"}),
    )


def _batched(module):
    model = randomize(eqx.filter_eval_shape(module, jax.random.key(0)))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return apply, params


EQUINOX = (equinox_mlp, equinox_conv_attention)
