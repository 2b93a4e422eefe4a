"""Gram matrices: of large ones half is computed, in little room, added where it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jopt
from jopt.programs import statistics


@pytest.fixture(params=[5, 16, 17, 21])
def columns(request, monkeypatch):
    """Numbers below what counts as large here, and even, prime and odd ones above."""
    monkeypatch.setattr(statistics, "_LARGE", 8)
    return request.param


def draw(*shape, seed=0):
    """Draw normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gram(x):
    """Compute it by hand."""
    return np.einsum("bmk,bml->bkl", x, x)


def test_half_is_mirrored_to_the_whole(columns):
    x = draw(2, 7, columns)
    found = statistics.mirrored(statistics.gram_below(x))
    np.testing.assert_allclose(found, gram(x), rtol=1e-5, atol=1e-5)
    if columns >= statistics._LARGE:
        np.testing.assert_array_equal(found, np.swapaxes(found, 1, 2))
    squares, again = statistics.squares_and_whole(statistics.gram_below(x))
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(squares, np.diagonal(found, axis1=1, axis2=2))


def test_is_added_to_what_was_before_and_leaves_further_rows(columns):
    x, y = draw(2, 7, columns), draw(2, 3, columns, seed=1)
    before = jnp.pad(statistics.gram_below(y), ((0, 0), (0, 1), (0, 0)))
    before = before.at[:, -1].set(5.0)
    found = statistics.mirrored(statistics.gram_below(x, before))
    np.testing.assert_allclose(found[:, :-1], gram(x) + gram(y), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[:, -1], 5.0)


def test_inside_of_shard_map(columns, auto_mesh):
    x = draw(1, 16, columns)

    def part(x):
        return jax.lax.psum(statistics.gram_below(x), "data")

    run = jax.jit(
        jax.shard_map(
            part, mesh=auto_mesh, in_specs=P(None, "data", None), out_specs=P()
        )
    )
    found = statistics.mirrored(run(x))
    np.testing.assert_allclose(found, gram(x), rtol=1e-5, atol=1e-5)


def test_nothing_of_its_size_is_held_beside_it():
    size = 1024  # large
    shapes = [jax.ShapeDtypeStruct((1, n, size), jnp.float32) for n in (64, size)]
    programs = {
        jax.jit(statistics.gram_below, donate_argnums=1): shapes,
        jax.jit(statistics.mirrored, donate_argnums=0): shapes[1:],
    }
    for program, inputs in programs.items():
        memory = program.lower(*inputs).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.2 * size * size * 4
        assert memory.alias_size_in_bytes == size * size * 4


@pytest.mark.parametrize("method", ["sparsegpt", "gptq", "awq"])
def test_uses_of_one_leaf_add_up(method, columns):
    """Two sites, and one matrix for each entry of a batch, as one with all rows."""
    params = {"w": draw(columns, 4, seed=2)}
    x, y = draw(40, columns), draw(2, 24, columns, seed=3)

    def apart(params, x, y):
        return x @ params["w"], jnp.einsum("bmk,kn->bmn", y, params["w"])

    def together(params, x):
        return x @ params["w"]

    how = {"sparsity": 0.5} if method == "sparsegpt" else {}
    spec = [jopt.QuantSpec(jopt.formats.int4)] * (method != "sparsegpt")
    run = getattr(jopt, method)
    every = np.concatenate([x, y.reshape(-1, columns)])
    found = run(apart, params, [(x, y)], *spec, progress=False, **how)
    expected = run(together, params, [every], *spec, progress=False, **how)
    for one, other in zip(found[:1], expected[:1], strict=True):
        one, other = (v["w"].to_array() if spec else v["w"] for v in (one, other))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "gptq"])
def test_what_made_inputs_infinite_is_named(method):
    """A leaf that is no target, or else the batches."""
    how = {"progress": False, "select": jopt.matching("w")}
    how |= {"sparsity": 0.5} if method != "gptq" else {}
    spec = [jopt.QuantSpec(jopt.formats.int4)] * (method == "gptq")

    def run(norm, x):
        params = {"norm": jnp.full(4, norm), "w": draw(4, 4)}
        inputs = [jnp.full((8, 4), x)]
        return getattr(jopt, method)(
            lambda p, x: (x * p["norm"][None]) @ p["w"], params, inputs, *spec, **how
        )

    with pytest.raises(ValueError, match=r"'w'.*; look at 'norm' of the params"):
        run(np.nan, 1.0)
    with pytest.raises(ValueError, match=r"'w'.*; look at the batches"):
        run(1.0, np.inf)
