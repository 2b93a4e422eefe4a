"""When sites run, and which of them see one input."""

import jax
import jax.numpy as jnp
from jax import lax

from jopt.programs.sites import analyse
from jopt.programs.sources import Sources
from tests.programs import zoo


def sources_of(apply, params, *inputs):
    analysis = analyse(apply, params, inputs, {})
    return Sources(analysis.traced.body), analysis.table


def groups_of(name):
    """The sites of a model of the zoo, those with one input together."""
    model = zoo.ZOO[name]()
    sources, table = sources_of(model.apply, model.params, *model.inputs)
    groups = {}
    for site in table:
        if site.kind == "weight":
            groups.setdefault(sources.input_of(site), []).append(site.name)
    return sorted(groups.values())


def test_products_of_one_value_are_found_through_calls_casts_and_loops():
    assert groups_of("einsum") == [["out"], ["query", "key", "value"]]
    layer = [f"layers/attention/{name}/kernel" for name in ("query", "key", "value")]
    assert layer in groups_of("linen_transformer")
    assert layer in groups_of("nnx_transformer")
    layer = [f"attention/{name}_proj/weight" for name in ("query", "key", "value")]
    assert layer in groups_of("equinox_conv_attention")
    assert groups_of("split") == [["fused", "fused#1", "fused#2"]]


def test_what_may_run_apart_is_kept_apart():
    """In the branch that was not taken nothing was seen."""
    assert all(len(group) == 1 for group in groups_of("cond"))
    assert all(len(group) == 1 for group in groups_of("moe_ragged"))

    def apply(params, x):
        # One value, contracted over another axis.
        return x @ params["right"], x.T @ params["left"], (2 * x) @ params["other"]

    params = dict.fromkeys(("right", "left", "other"), jnp.ones((3, 3)))
    sources, table = sources_of(apply, params, jnp.ones((3, 3)))
    assert len({sources.input_of(site) for site in table}) == 3


def test_sites_are_ordered_layer_by_layer_backwards_in_a_reversed_scan():
    def apply(params, x):
        def layer(x, one):
            x = jax.jit(lambda x: jnp.tanh(x @ one["a"]))(x)
            return lax.cond(x[0, 0] > 0, lambda x: x @ one["b"], jnp.tanh, x), None

        x, _ = lax.scan(layer, x @ params["first"], params["layers"], reverse=True)
        return x @ params["last"]

    square = jnp.ones((3, 3))
    layers = dict.fromkeys("ab", jnp.ones((2, 3, 3)))
    params = {"first": square, "last": square, "layers": layers}
    sources, table = sources_of(apply, params, square)
    moments = []
    for site in table:
        loops = [around.key for around in site.around]
        for layer in range(2) if loops else (0,):
            order = sources.order(site, dict.fromkeys(loops, layer))
            moments.append((order, site.name, layer))
    assert [(name, layer) for _, name, layer in sorted(moments)] == [
        ("first", 0),
        ("layers/a", 1),
        ("layers/b", 1),
        ("layers/a", 0),
        ("layers/b", 0),
        ("last", 0),
    ]
