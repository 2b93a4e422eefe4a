"""Programs in which a weight takes a detour: views, control flow, own gradients."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.programs.zoo_model import Model, dense, dot, draw, floats


def scaled() -> Model:
    """Weights scaled by constants, cast, transposed and reshaped."""

    def apply(params, x):
        x = jnp.tanh(x @ (params["halved"] * 0.5))
        x = jnp.tanh(x @ (params["divided"] / jnp.sqrt(8.0)))
        x = jnp.tanh(x.astype(jnp.bfloat16) @ params["cast"].astype(jnp.bfloat16))
        x = jnp.tanh(x.astype(jnp.float32) @ params["twice"].T.T)
        x = jnp.tanh(x @ params["merged"].reshape(8, 6))
        x = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, params["parted"].reshape(6, 2, 4)))
        blocks = params["blocks"].reshape(2, 4, 3)
        return jnp.einsum("bhk,gko->bhgo", x, blocks)

    shapes = {
        "halved": (4, 8),
        "divided": (8, 8),
        "cast": (8, 8),
        "twice": (8, 8),
        "merged": (2, 4, 3, 2),
        "parted": (6, 8),
        "blocks": (8, 3),
    }
    return Model(
        apply,
        draw(shapes),
        (floats(2, 4),),
        weights={
            "halved": dot("in out"),
            "divided": dot("in out"),
            "cast": dot("in out"),
            "twice": dot("in out"),
            "merged": dot("in in out out"),
            "parted": dot("in out"),
            # The outer part of axis 0 counts blocks, the inner one is contracted.
            "blocks": dot("mixed out"),
        },
    )


def guarded() -> Model:
    """Weights behind operations that change no value."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def apply(params, x):
        x = jnp.tanh(x @ lax.stop_gradient(params["frozen"]))
        x = jnp.tanh(x @ lax.optimization_barrier(params["fenced"]))
        placed = lax.with_sharding_constraint(
            params["placed"], NamedSharding(mesh, P("data", None))
        )
        x = jnp.tanh(x @ placed)
        copies = jnp.broadcast_to(params["copied"], (x.shape[0], 8, 3))
        return jnp.einsum("bsd,bdo->bso", x, copies)

    shapes = {"frozen": (4, 8), "fenced": (8, 8), "placed": (8, 8), "copied": (8, 3)}
    return Model(
        apply,
        draw(shapes),
        (floats(2, 3, 4),),
        weights={
            "frozen": dot("in out"),
            "fenced": dot("in out"),
            "placed": dot("in out"),
            # The batch axis is not the leaf's.
            "copied": dot("in out"),
        },
    )


def split() -> Model:
    """One fused kernel, split first and used in three products."""

    def apply(params, x):
        left, middle, right = jnp.split(params["fused"], [4, 7], axis=1)
        return x @ left, x @ middle, x @ right

    return Model(
        apply,
        draw({"fused": (4, 12)}),
        (floats(2, 4),),
        weights={
            "fused": dot("in out"),
            "fused#1": dot("in out"),
            "fused#2": dot("in out"),
        },
    )


def unstack() -> Model:
    """Layers in one stacked leaf, unstacked into a Python loop."""

    def apply(params, x):
        for kernel in jnp.unstack(params["layers"]):
            x = jnp.tanh(x @ kernel)
        return x

    return Model(
        apply,
        draw({"layers": (3, 4, 4)}),
        (floats(2, 4),),
        weights={
            "layers": dot("stacked in out"),
            "layers#1": dot("stacked in out"),
            "layers#2": dot("stacked in out"),
        },
    )


def vmap_weights() -> Model:
    """An ensemble: stacked weights under vmap, with inputs of their own and shared."""

    def apply(params, x, common):
        def member(one, mine):
            h = dense(mine, one["up"], one["bias"]) + common @ one["common"]
            return jnp.tanh(h) @ one["down"]

        return jax.vmap(member)(params, x)

    shapes = {"up": (3, 4, 8), "bias": (3, 8), "common": (3, 5, 8), "down": (3, 8, 2)}
    return Model(
        apply,
        draw(shapes),
        (floats(3, 2, 4), floats(2, 5)),
        weights={
            "up": dot("batch in out"),
            # An input that all members share has no such axis to batch over.
            "common": dot("out in out"),
            "down": dot("batch in out"),
        },
        uncovered=frozenset({"bias"}),
    )


def weight_norm() -> Model:
    """A kernel by its direction and its length."""

    def apply(params, x):
        norm = jnp.sqrt(jnp.sum(jnp.square(params["v"]), axis=0, keepdims=True))
        h = jnp.tanh(x @ (params["g"][None] * params["v"] / norm))
        return h @ params["head"]

    return Model(
        apply,
        draw({"v": (4, 8), "g": (8,), "head": (8, 2)}),
        (floats(2, 4),),
        weights={"head": dot("in out")},
        derived=(frozenset({"v", "g"}),),
    )


def lora() -> Model:
    """A kernel with a low-rank term added before the product."""

    def apply(params, x):
        h = jnp.tanh(x @ (params["kernel"] + params["a"] @ params["b"]))
        return h @ params["head"]

    return Model(
        apply,
        draw({"kernel": (4, 8), "a": (4, 2), "b": (2, 8), "head": (8, 2)}),
        (floats(2, 4),),
        # The product of `a` and `b` sees no data: it prepares a weight.
        weights={"head": dot("in out")},
        derived=(frozenset({"kernel", "a", "b"}),),
    )


def concat() -> Model:
    """Two kernels in one product."""

    def apply(params, x):
        both = jnp.concatenate([params["left"], params["right"]], axis=1)
        return jnp.tanh(x @ both) @ params["head"]

    return Model(
        apply,
        draw({"left": (4, 3), "right": (4, 5), "head": (8, 2)}),
        (floats(2, 4),),
        weights={"head": dot("in out")},
        derived=(frozenset({"left", "right"}),),
    )


def hyper() -> Model:
    """A network that writes the kernel of another, one for every example."""

    def apply(params, x, context):
        kernel = (context @ params["hyper"]).reshape(-1, 4, 6)
        h = jnp.tanh(jnp.einsum("bd,bdo->bo", x, kernel))
        return h @ params["head"]

    return Model(
        apply,
        draw({"hyper": (3, 24), "head": (6, 2)}),
        (floats(2, 4), floats(2, 3)),
        weights={"hyper": dot("in out"), "head": dot("in out")},
        num_activations=1,
    )


def cond() -> Model:
    """Two branches, each with a kernel of its own, and one that both use."""

    def apply(params, x, flag):
        def yes(h):
            return jnp.tanh(h @ params["left"]) @ params["shared"]

        def no(h):
            return jax.nn.relu(h @ params["right"]) @ params["shared"]

        return lax.cond(flag, yes, no, x)

    return Model(
        apply,
        draw({"left": (4, 8), "right": (4, 8), "shared": (8, 2)}),
        (floats(2, 4), jnp.array(True)),
        weights={
            "left": dot("in out"),
            "right": dot("in out"),
            "shared": dot("in out"),
            "shared#1": dot("in out"),
        },
    )


def while_() -> Model:
    """A loop that runs as often as its input says, so has no reverse mode."""

    def apply(params, x, steps):
        def body(state):
            i, h = state
            return i + 1, jnp.tanh(h @ params["kernel"])

        _, h = lax.while_loop(lambda state: state[0] < steps, body, (0, x))
        return h @ params["head"]

    return Model(
        apply,
        draw({"kernel": (4, 4), "head": (4, 2)}),
        (floats(2, 4), jnp.array(3)),
        weights={"kernel": dot("in out"), "head": dot("in out")},
    )


def rnn_remat_scan_cond() -> Model:
    """A scan over time, in it remat, in it a scan over layers with a branch."""

    def apply(params, x):
        def layer(h, now):
            one, previous = now
            mixed = h @ one["input"] + previous @ one["hidden"]
            new = lax.cond(
                jnp.mean(mixed) > 0,
                lambda m: jnp.tanh(m @ one["left"]),
                lambda m: jax.nn.silu(m @ one["right"]),
                mixed,
            )
            return new, new

        @jax.checkpoint
        def step(states, now):
            h, states = lax.scan(
                layer, now @ params["embed"], (params["layers"], states)
            )
            return states, h

        states = jnp.zeros((2, x.shape[0], 4))
        _, outputs = lax.scan(step, states, jnp.swapaxes(x, 0, 1))
        return outputs @ params["head"]

    names = ("input", "hidden", "left", "right")
    layers = dict.fromkeys(names, (2, 4, 4))
    return Model(
        apply,
        draw({"embed": (3, 4), "layers": layers, "head": (4, 2)}),
        (floats(2, 5, 3),),
        weights={
            "embed": dot("in out"),
            "layers/input": dot("stacked in out"),
            "layers/hidden": dot("stacked in out"),
            "layers/left": dot("stacked in out"),
            "layers/right": dot("stacked in out"),
            "head": dot("in out"),
        },
    )


def custom_vjp() -> Model:
    """A product with a backward rule of twice the true gradient."""

    @jax.custom_vjp
    def product(x, kernel):
        return x @ kernel

    def forward(x, kernel):
        return x @ kernel, (x, kernel)

    def backward(kept, gradient):
        x, kernel = kept
        return 2 * gradient @ kernel.T, 2 * x.T @ gradient

    product.defvjp(forward, backward)
    return _with_own_rule(product)


def custom_jvp() -> Model:
    """A product with a forward rule of twice the true derivative."""

    @jax.custom_jvp
    def product(x, kernel):
        return x @ kernel

    @product.defjvp
    def rule(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        return x @ kernel, 2 * (dx @ kernel + x @ dkernel)

    return _with_own_rule(product)


def _with_own_rule(product) -> Model:
    def apply(params, x):
        h = jnp.tanh(product(jnp.tanh(x @ params["first"]), params["inner"]))
        return h @ params["last"]

    return Model(
        apply,
        draw({"first": (4, 6), "inner": (6, 8), "last": (8, 2)}),
        (floats(2, 4),),
        weights={
            "first": dot("in out"),
            "inner": dot("in out"),
            "last": dot("in out"),
        },
        opaque=frozenset({"inner"}),
    )


def shard_map_tp() -> Model:
    """A tensor-parallel MLP under shard_map, with one weight gathered before use."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "up": P(None, "model"),
        "down": P("model", None),
        "gathered": P("data", None),
    }

    def device(params, x):
        h = jax.nn.gelu(x @ params["up"]) @ params["down"]
        h = lax.psum(h, "model")
        whole = lax.all_gather(params["gathered"], "data", axis=0, tiled=True)
        return h @ whole

    apply = jax.shard_map(
        device, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data")
    )
    return Model(
        apply,
        draw({"up": (4, 16), "down": (16, 8), "gathered": (8, 2)}),
        (floats(4, 4),),
        weights={
            "up": dot("in out"),
            "down": dot("in out"),
            "gathered": dot("in out"),
        },
    )


PROGRAMS = (
    scaled,
    guarded,
    split,
    unstack,
    vmap_weights,
    weight_norm,
    lora,
    concat,
    hyper,
    cond,
    while_,
    rnn_remat_scan_cond,
    custom_vjp,
    custom_jvp,
    shard_map_tp,
)
