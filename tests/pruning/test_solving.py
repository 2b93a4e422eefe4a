"""What one-shot pruning computes with: the factor in place, errors, meshes, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jopt
from jopt.arrays import factors, gram_errors, sweeps
from jopt.programs import passes
from jopt.pruning import solving
from tests import hlo


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and chunks in matrices of some dozen columns."""
    for module, name, size in (
        (factors, "_TILE", 8),
        (gram_errors, "_TILE", 8),
        (gram_errors, "_OUTPUTS", 4),
        (sweeps, "_ROWS", 16),
    ):
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("size", [1, 8, 21, 24, 40])
def test_the_factor_lies_above_a_gram_matrix_that_stays(size, small_tiles):
    x = draw(3 * size, size).astype(np.float64)
    x[:, size // 2] = 0 if size > 1 else x[:, 0]  # an input that never comes
    gram = x.T @ x
    h = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(size)
    if size > 1:
        h[size // 2, size // 2] = 1
    expected = scipy.linalg.cholesky(np.linalg.inv(h))
    found = jax.jit(factors.inverse_factor.__wrapped__)(jnp.float32(gram), 0.01)
    np.testing.assert_allclose(np.triu(found), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.tril(found, -1), np.tril(gram.astype("f"), -1))


@pytest.mark.parametrize("bad", [0, 9, 20])
def test_the_first_of_the_factor_tells_what_is_not_positive_definite(bad, small_tiles):
    gram = jnp.eye(21).at[bad, bad].set(-1.0)
    found = jax.jit(factors.inverse_factor.__wrapped__)(gram, 0.0)
    assert bool(jnp.isnan(found[0, 0]))


@pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (8, 4), (21, 7), (5, 30)])
def test_squared_norms_are_those_of_the_results(columns, outputs, small_tiles):
    x, w = draw(50, columns), draw(columns, outputs, seed=1)
    pruned = np.where(draw(columns, outputs, seed=2) > 0, w, 0)
    gram = x.T @ x
    anything = np.triu(np.full_like(gram, np.nan))  # on and above the diagonal
    found = gram_errors.squared_norms(
        jnp.asarray(w),
        jnp.asarray(pruned),
        jnp.asarray(np.where(np.isnan(anything), np.nan, gram)),
        jnp.asarray(np.diag(gram)),
    )
    expected = [np.square(x @ (w - pruned)).sum(), np.square(x @ w).sum()]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("spec", [P(None, "data"), P("data", None)])
@pytest.mark.parametrize("kind", ["auto_mesh", "explicit_mesh"])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_on_a_mesh_no_weight_is_gathered(
    name, kind, spec, request, monkeypatch, small_tiles
):
    """A leaf split by inputs is exchanged once, and none is whole on a device."""
    texts = []
    run = solving._anew

    def recorded(*args, **kwargs):
        texts.append(run.lower(*args, **kwargs).compile().as_text())
        return run(*args, **kwargs)

    monkeypatch.setattr(solving, "_anew", recorded)
    mesh = request.getfixturevalue(kind)
    size = 128
    w, x = draw(size, size), draw(2 * size, size, seed=1)
    call = getattr(jopt, name)

    def apply(params, x):
        out = NamedSharding(jax.typeof(x).sharding.mesh, P("data", None))
        return jnp.einsum("mk,kn->mn", x, params["w"], out_sharding=out)

    def alone(params, x):
        return x @ params["w"]

    options = {"sparsity": 0.5, "progress": False}
    placed = jax.device_put(w, NamedSharding(mesh, spec))
    rows = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    function = apply if kind == "explicit_mesh" else alone
    sparse, masks, _ = call(function, {"w": placed}, [rows], **options)
    (text,) = texts
    for collective in hlo.collectives(text):
        small = collective.num_bytes * 8 <= w.nbytes  # one device's part
        assert small and (collective.kind != "all-gather" or spec[0]), collective
    expected, same, _ = call(alone, {"w": w}, [x], **options)
    np.testing.assert_array_equal(masks["w"], same["w"])
    np.testing.assert_allclose(sparse["w"], expected["w"], rtol=1e-4, atol=1e-5)
    assert sparse["w"].sharding == placed.sharding
    assert masks["w"].sharding == placed.sharding


@pytest.mark.parametrize("num_layers", [2, 6])
def test_a_pass_holds_one_gram_matrix_of_each_size(num_layers, monkeypatch):
    """However many layers might be asked for."""
    held = []
    make = passes.moments_of_some

    def recorded(*args):
        run = make(*args)

        def go(*inputs):
            memory = run.lower(*inputs).compile().memory_analysis()
            held.append(memory.temp_size_in_bytes)
            return run(*inputs)

        return go

    monkeypatch.setattr(passes, "moments_of_some", recorded)
    size = 128
    params = {f"w{i}": draw(size, size, seed=i) / 12 for i in range(num_layers)}

    def apply(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x

    jopt.sparsegpt(apply, params, [draw(8, size)], sparsity=0.5, progress=False)
    assert max(held) < 2 * size * size * 4
