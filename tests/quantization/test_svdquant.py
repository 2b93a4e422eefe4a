"""Low rank beside few bits: the best factors, less error, and every byte counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt.quantization.svdquant import low_rank_factors, split_and_round

INT4 = jopt.QuantSpec(jopt.formats.int4)
INT8 = jopt.QuantSpec(jopt.formats.int8)
RNG = np.random.default_rng(11)


@pytest.fixture(scope="module", autouse=True)
def numbers():
    """The same numbers whichever tests are chosen."""
    RNG.bit_generator.state = np.random.default_rng(11).bit_generator.state


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


def model(params, x):
    """Kernels of two and three axes, a stack, and a transposed kernel."""
    h = jax.nn.relu(x @ params["up"])
    h = jnp.tanh(jnp.einsum("bi,ihd->bhd", h, params["q"]))
    h = jnp.einsum("bhd,hdo->bo", h, params["out"])

    def layer(h, w):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(layer, h, params["layers"])[0] @ params["head"].T


@pytest.fixture(scope="module")
def packed():
    shapes = {
        "up": (16, 24),
        "q": (24, 4, 4),
        "out": (4, 4, 16),
        "layers": (2, 16, 16),
        "head": (12, 16),
    }
    params = {name: normal(*shape) for name, shape in shapes.items()}
    params["up"] += 20 * jnp.outer(normal(16), normal(24))
    batches = [3 * jnp.asarray(RNG.normal(size=(32, 16)), jnp.float32)]
    found, report = jopt.svdquant(model, params, batches, INT4, rank=3, progress=False)
    return params, batches, found, report


def best(w, rank):
    """The best approximation of a rank, by NumPy in float64."""
    u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_factors_are_eckart_and_youngs():
    w = RNG.normal(size=(12, 9))
    a, b = low_rank_factors(jnp.asarray(w, jnp.float32), None, 4)
    np.testing.assert_allclose(a @ b, best(w, 4), atol=1e-5)


def test_weighted_factors_are_the_best_for_the_inputs():
    """||X (W - L)|| is what the singular values of X W that are left out say."""
    x = RNG.normal(size=(50, 12)) * np.exp(RNG.normal(size=12))
    w = RNG.normal(size=(12, 9))
    a, b = low_rank_factors(
        jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), 4, damping=0.0
    )
    np.testing.assert_allclose(x @ np.asarray(a @ b), best(x @ w, 4), atol=1e-4)
    left = np.linalg.svd(x @ w, compute_uv=False)[4:]
    error = np.linalg.norm(x @ (w - np.asarray(a @ b, np.float64)))
    np.testing.assert_allclose(error, np.linalg.norm(left), rtol=1e-4)


@pytest.mark.parametrize("residual_method", ["rtn", "gptq"])
@pytest.mark.parametrize("refit", [False, True])
def test_one_matrix_is_what_numpy_computes(residual_method, refit):
    x, w = RNG.normal(size=(64, 12)), RNG.normal(size=(12, 8))
    w = w + 30 * np.outer(RNG.normal(size=12), RNG.normal(size=8))
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    found, _ = jopt.svdquant(
        apply,
        {"w": jnp.asarray(w, jnp.float32)},
        [jnp.asarray(x, jnp.float32)],
        INT4,
        rank=2,
        residual_method=residual_method,
        refit=refit,
        factor_dtype=jnp.float32,
        damping=1e-6,
        progress=False,
    )
    leaf = found["w"]
    q = np.asarray(jopt.dequantize(leaf.residual), np.float64)
    rest = w - best(w, 2)
    scale = np.asarray(leaf.residual.scale, np.float64)
    np.testing.assert_allclose(scale[0], np.abs(rest).max(0) / 7, rtol=2**-7)
    if residual_method == "rtn":
        np.testing.assert_allclose(q, np.rint(rest / scale) * scale, atol=1e-5)
    low = np.asarray(leaf.lora_a @ leaf.lora_b, np.float64)
    if refit:
        np.testing.assert_allclose(x @ low, best(x @ (w - q), 2), atol=1e-2)
        # The best for this Q: no worse than the low rank that it was rounded with.
        losses = [np.linalg.norm(x @ (w - q - part)) for part in (low, best(w, 2))]
        assert losses[0] < losses[1]
    else:
        np.testing.assert_allclose(low, best(w, 2), atol=1e-3)


def test_less_is_lost_than_by_rounding(packed):
    params, batches, _, report = packed
    _, plain = jopt.rtn(model, params, batches, INT4, progress=False)
    assert 4 * report["up"].error < plain["up"].error
    for row in report:
        assert row.error < plain[row.name].error, row
    assert not report.left_alone


def test_leaves(packed):
    params, _, found, report = packed
    shapes = {
        "up": ((16, 3), (3, 24)),
        "q": ((24, 1, 3), (3, 4, 4)),
        "out": ((4, 4, 3), (3, 1, 16)),
        "layers": ((2, 16, 3), (2, 3, 16)),
        "head": ((3, 16), (12, 3)),
    }
    for name, (a, b) in shapes.items():
        leaf = found[name]
        assert (leaf.lora_a.shape, leaf.lora_b.shape) == (a, b)
        assert leaf.lora_a.dtype == jnp.bfloat16
        assert leaf.shape == params[name].shape
        count = np.prod(a) + np.prod(b)
        scales = leaf.residual.scale.size
        bits = 4 + (16 * count + 16 * scales) / leaf.size
        assert leaf.bits_per_weight == pytest.approx(bits)
    assert report["q"].bits == found["q"].bits_per_weight
    table = jopt.report(found)
    assert table.total.nbytes == sum(x.nbytes for x in jax.tree.leaves(found))
    assert "int4 + rank 3" in str(table)
    low = np.einsum(
        "hdr,ro->hdo",
        np.asarray(found["out"].lora_a, np.float64),
        np.asarray(found["out"].lora_b[:, 0], np.float64),
    )
    whole = np.asarray(jopt.dequantize(found["out"].residual), np.float64) + low
    np.testing.assert_allclose(found["out"].to_array(), whole, atol=1e-6)


def test_execution(packed):
    _, (x,), found, _ = packed
    want = model(jopt.dequantize(found), x)
    run = jax.jit(jopt.execute(model))
    np.testing.assert_allclose(run(found, x), want, atol=1e-4)
    fast = jax.jit(jopt.execute(model, activations=INT8))
    y = fast(found, x)
    assert float(jnp.sum((y - want) ** 2) / jnp.sum(want**2)) < 5e-3
    text = fast.lower(found, x).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert sum("xi8>" in line for line in products) == 5
    assert len(products) == 15  # codes and two thin ones at each of five sites
    exact = jax.grad(lambda x: model(jopt.dequantize(found), x).sum())(x)
    for f, least in ((run, 1e-5), (fast, 0.2)):
        grads = jax.grad(lambda x, f=f: f(found, x).sum())(x)
        assert float(jnp.linalg.norm(grads - exact) / jnp.linalg.norm(exact)) < least


def test_views_keep_factors(packed):
    """What a program does to a kernel before it multiplies."""
    _, (x,), found, _ = packed
    leaf, dense = found["layers"], found["layers"].to_array()

    def apply(params, x, i):
        w = params["w"]
        h = x @ w[1]
        h = h @ w[i].T
        return jnp.einsum("bi,oi->bo", h, jnp.transpose(w, (0, 2, 1))[0])

    text = jax.jit(jopt.execute(apply)).lower({"w": leaf}, x, 1)
    assert text.as_text().count("stablehlo.dot_general") == 9
    y = jopt.execute(apply)({"w": leaf}, x, 1)
    np.testing.assert_allclose(y, apply({"w": dense}, x, 1), atol=1e-4)
    # Whatever else is done to it, it is decoded.
    strange = lambda params, x: x @ params["w"].reshape(16, 32)  # noqa: E731
    y = jopt.execute(strange)({"w": leaf}, x)
    np.testing.assert_allclose(y, strange({"w": dense}, x), atol=1e-4)


def test_save_and_restore(packed, tmp_path):
    *_, found, _ = packed
    jopt.save(tmp_path / "run", found)
    again = jopt.restore(tmp_path / "run")
    assert isinstance(again["q"], jopt.QuantizedPlusLowRank)
    for one, other in zip(*map(jax.tree.leaves, (found, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert again["q"].inputs == found["q"].inputs == (-3,)


def test_what_cannot_be_split_is_listed():
    def apply(params, x):
        q, k = jnp.split(x @ params["fine"], 2, axis=1)
        h = q @ params["fused"][:, :8] + k @ params["fused"][:, 8:]
        return h @ params["thin"]

    params = {"fine": normal(8, 16), "fused": normal(8, 16), "thin": normal(8, 2)}
    x = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
    found, report = jopt.svdquant(apply, params, [x], INT4, rank=2, progress=False)
    assert "not whole axes" in report.left_alone["fused"]
    assert "rank 2 is no less" in report.left_alone["thin"]
    assert {row.path for row in report} == {"fine"}
    assert found["thin"] is params["thin"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": -1}, "rank must be a count, 0 for none, got -1"),
        ({"rank": True}, "rank must be a count, 0 for none, got True"),
        ({"factor_dtype": jnp.int8}, "must be a float dtype, got int8"),
        ({"residual_method": "awq"}, "must be 'rtn' or 'gptq', got 'awq'"),
        ({"damping": -1.0}, "damping must be at least 0"),
        ({"rank": 50}, "must have something to quantize"),
    ],
)
def test_errors(options, match):
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    with pytest.raises(ValueError, match=match):
        jopt.svdquant(apply, {"w": normal(8, 8)}, [jnp.eye(8)], INT4, **options)


def test_the_second_factors_are_kept_only_where_they_are_better():
    """In bfloat16 their rounding is not made up for, and an outlier makes it matter."""
    w = normal(16, 8) + 1000 * jnp.outer(normal(16), normal(8))
    options = {
        "rank": 1,
        "factor_dtype": jnp.bfloat16,
        "residual_method": "rtn",
        "damping": 0.01,
        "fit": jopt.scale_fits.by_range,
    }
    gram = jnp.eye(16)
    spec = INT4
    losses = []
    for refit in (True, False):
        found = split_and_round(
            w, gram, jnp.ones(16), None, spec, refit=refit, **options
        )
        a, b = (np.asarray(f, np.float64) for f in found.low_rank)
        losses.append(np.linalg.norm(np.asarray(w) - np.asarray(found.values) - a @ b))
    assert losses[0] <= losses[1] * (1 + 1e-5)
