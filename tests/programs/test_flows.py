"""What depends on the inputs, through an index too, is told from what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jopt
from tests.programs.zoo_model import draw

INT8 = jopt.QuantSpec(jopt.formats.int8)
IDENTITY = jopt.Handler(lambda use: use.run(), select=lambda site: True)


def language_model(params, tokens):
    """An unbatched recurrent net: one row of the table per step."""

    def step(h, token):
        h = jnp.tanh(params["embed"][token] @ params["in"] + h @ params["hidden"])
        return h, h @ params["out"]

    return lax.scan(step, jnp.zeros(8), tokens)[1]


LANGUAGE_MODEL = draw({"embed": (50, 8), "in": (8, 8), "hidden": (8, 8), "out": (8, 5)})


def test_a_row_at_an_index_of_the_inputs_is_data():
    """It met the next weight as if both came from params alone."""
    table = jopt.sites(language_model, LANGUAGE_MODEL, jnp.arange(5))
    assert table.names == ("embed", "in", "hidden", "out")
    assert table["embed"].roles == {0: "index", 1: "out"} and not table.uncovered
    assert table.flops == sum(
        jopt.count_flops(language_model, LANGUAGE_MODEL, jnp.arange(5)).values()
    )


def test_an_unbatched_language_model_trains_and_runs_in_int8():
    params, tokens = LANGUAGE_MODEL, jnp.arange(5) * 7
    same = jopt.rewrite(language_model, IDENTITY)(params, tokens)
    np.testing.assert_array_equal(same, jax.jit(language_model)(params, tokens))
    table = jopt.sites(language_model, params, tokens)
    packed = jopt.quantize(params, INT8, sites=table)
    assert packed["embed"].scale.shape == (50, 1)
    got = jopt.execute(language_model)(packed, tokens)
    want = jax.jit(language_model)(jopt.dequantize(packed), tokens)
    np.testing.assert_array_equal(got, want)
    qat = jopt.fake_quantize(language_model, INT8, activations=INT8)
    run = jopt.execute(language_model, activations=INT8)
    np.testing.assert_allclose(run(packed, tokens), qat(params, tokens), atol=1e-5)


@pytest.mark.parametrize("length", [1, 2])
def test_one_token_has_the_sites_of_many(length):
    def apply(params, tokens):
        return params["embed"][tokens] @ params["in"]

    table = jopt.sites(apply, LANGUAGE_MODEL, jnp.zeros(length, int))
    assert table.names == ("embed", "in")


def test_a_matrix_at_an_index_of_the_inputs_is_a_weight():
    """A chosen expert multiplies; what it meets may be a parameter as well."""
    params = draw({"experts": (3, 4, 5), "query": (2, 4), "out": (5, 2)})

    def apply(params, x, i):
        chosen = params["experts"][i]
        return (x + params["query"]) @ chosen, params["query"] @ chosen @ params["out"]

    table = jopt.sites(apply, params, jnp.ones((2, 4)), 1)
    assert table.names == ("experts", "query", "out")
    assert table["experts"].roles == {0: "stacked", 1: "in", 2: "out"}
    same = jopt.rewrite(apply, IDENTITY)(params, jnp.ones((2, 4)), 1)
    for a, b in zip(same, jax.jit(apply)(params, jnp.ones((2, 4)), 1), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "look", [lambda t, i: t[i], lambda t, i: jax.vmap(lambda j: t[j])(i)]
)
def test_every_row_of_a_table_has_a_scale_however_it_is_looked_up(look):
    params = {"table": draw((6, 4)) * jnp.logspace(-3, 0, 6)[:, None]}
    apply = lambda params, i: look(params["table"], i)  # noqa: E731
    table = jopt.sites(apply, params, jnp.arange(6))
    assert table["table"].roles == {0: "index", 1: "out"}
    assert jopt.quantize(params, INT8, sites=table)["table"].scale.shape == (6, 1)


def test_what_a_reference_holds_is_data():
    params = draw({"a": (3, 3), "b": (3, 3), "c": (3, 3)})

    def apply(params, x):
        ref = jax.new_ref(jnp.zeros_like(x))
        ref[...] = x
        return ref[...] @ params["a"] @ params["b"]

    table = jopt.sites(apply, params, jnp.ones((2, 3)))
    assert table.names == ("a", "b")
    assert table.uncovered == {"c": "never used"}


def test_a_weight_that_a_loop_changes_says_so():
    def apply(params, x):
        def step(w, _):
            return w - 0.1 * (x.T @ (x @ w)), None

        return lax.scan(step, params["w"], None, length=2)[0]

    table = jopt.sites(apply, draw({"w": (4, 4)}), jnp.ones((3, 4)))
    assert table.uncovered == {"w": "used by the carry of a loop"}


def test_products_of_params_alone_are_listed():
    params = draw({"a": (2, 3), "b": (3, 4)})
    table = jopt.sites(lambda p, x: x + p["a"] @ p["b"], params, jnp.ones((2, 4)))
    reason = "used by dot_general of params alone, add"
    assert table.uncovered == dict.fromkeys("ab", reason)


def test_a_covered_leaf_shows_what_else_uses_it():
    params = draw({"w": (3, 3)})
    table = jopt.sites(lambda p, x: x @ p["w"] + p["w"], params, jnp.ones((3, 3)))
    assert table.uncovered == {} and "w: add" in str(table)


def test_names_are_unique():
    params = {"a": jnp.eye(2), "a#1": jnp.eye(2)}
    table = jopt.sites(
        lambda p, x: x @ p["a"] @ p["a"] @ p["a#1"] @ p["a"], params, jnp.eye(2)
    )
    assert table.names == ("a", "a#2", "a#1", "a#3")


def test_nested_loops_are_walked_once_for_what_flows_in():
    """Each level began with a constant carry, and doubled the walks inside."""

    def nest(depth, params, x):
        if depth == 0:
            return x @ params["w"]

        def step(carry, _):
            return carry + nest(depth - 1, params, x), None

        return lax.scan(step, jnp.zeros_like(x), None, length=2)[0]

    params, x = draw({"w": (2, 2)}), jnp.ones((1, 2))
    table = jopt.sites(lambda p, x: nest(14, p, x), params, x)
    assert [site.runs for site in table] == [2**14]


def test_leaves_that_are_joined_are_followed_each():
    """As an LSTM joins its gates, and attention its projections."""
    params = draw({"q": (4, 3), "k": (4, 5), "deep": (2, 4, 3), "v": (4, 2)})

    def apply(params, x):
        both = jnp.concatenate([params["q"], params["k"]], axis=1)
        mixed = jnp.concatenate([params["deep"][1], params["v"]], axis=1)
        return x @ both.astype(jnp.bfloat16), (x @ mixed) @ jnp.sin(mixed).T

    table = jopt.sites(apply, params, jnp.ones((2, 4)))
    assert table.names == () and len(table.derived) == 3
    assert table.uncovered == {}
    found = [site.roles_by_path for site in table]
    assert found[0] == {key: {0: "in", 1: "out"} for key in "qk"}
    stacked = {0: "stacked", 1: "in", 2: "out"}
    assert found[1] == {"deep": stacked, "v": {0: "in", 1: "out"}}
    assert found[2] == {}
