"""Low rank beside few bits: the best factors, less error, and every byte counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jopt
from jopt.quantization.svdquant import low_rank_factors, split_and_round

INT4 = jopt.QuantSpec(jopt.formats.int4)
INT8 = jopt.QuantSpec(jopt.formats.int8)


@pytest.fixture
def rng():
    """Numbers of each test's own."""
    return np.random.default_rng(11)


def normal(rng, *shape):
    return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)


def energy(x):
    return np.sum(np.square(np.asarray(x, np.float64)))


def square(params, x):
    return x @ params["w"]


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
    rng = np.random.default_rng(11)
    shapes = {
        "up": (16, 16),
        "q": (16, 4, 4),
        "out": (4, 4, 16),
        "layers": (2, 16, 16),
        "head": (12, 16),
    }
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    params["up"] += 20 * np.outer(normal(rng, 16), normal(rng, 16))
    batches = [(3 * rng.normal(size=(32, 16))).astype(np.float32)]
    found, report = jopt.svdquant(model, params, batches, INT4, rank=3, progress=False)
    return params, batches, found, report


def best(w, rank):
    """The best approximation of a rank, by NumPy in float64."""
    u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_factors_are_eckart_and_youngs(rng):
    w = rng.normal(size=(12, 9))
    a, b = map(np.asarray, low_rank_factors(w.astype(np.float32), None, 4))
    np.testing.assert_allclose(a @ b, best(w, 4), atol=1e-5)


def test_weighted_factors_are_the_best_for_the_inputs(rng):
    """||X (W - L)|| is what the singular values of X W that are left out say."""
    x = rng.normal(size=(50, 12)) * np.exp(rng.normal(size=12))
    w = rng.normal(size=(12, 9))
    gram = (x.T @ x).astype(np.float32)
    factors = low_rank_factors(w.astype(np.float32), gram, 4, damping=0.0)
    a, b = map(np.asarray, factors)
    np.testing.assert_allclose(x @ (a @ b), best(x @ w, 4), atol=1e-4)
    left = np.linalg.svd(x @ w, compute_uv=False)[4:]
    error = np.linalg.norm(x @ (w - a @ b))
    np.testing.assert_allclose(error, np.linalg.norm(left), rtol=1e-4)


@pytest.mark.parametrize("residual_method", ["rtn", "gptq"])
@pytest.mark.parametrize("refit", [False, True])
def test_one_matrix_is_what_numpy_computes(residual_method, refit, rng):
    x, w = rng.normal(size=(64, 12)), rng.normal(size=(12, 8))
    w = w + 30 * np.outer(rng.normal(size=12), rng.normal(size=8))
    found, _ = jopt.svdquant(
        square,
        {"w": w.astype(np.float32)},
        [x.astype(np.float32)],
        INT4,
        rank=2,
        residual_method=residual_method,
        refit=refit,
        factor_dtype=jnp.float32,
        damping=1e-6,
        fit=jopt.scale_fits.by_range,
        progress=False,
    )
    leaf = found["w"]
    q = np.asarray(jopt.dequantize(leaf.residual), np.float64)
    rest = w - best(w, 2)
    scale = np.asarray(leaf.residual.scale, np.float64)
    np.testing.assert_allclose(np.abs(scale[0]), np.abs(rest).max(0) / 8, rtol=2**-7)
    if residual_method == "rtn":
        levels = np.clip(np.rint(rest / scale), -8, 7)
        np.testing.assert_allclose(q, levels * scale, atol=1e-5)
    low = np.asarray(leaf.lora_a, np.float64) @ np.asarray(leaf.lora_b, np.float64)
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
        "up": ((16, 3), (3, 16)),
        "q": ((16, 1, 3), (3, 4, 4)),
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
    floats = jopt.dequantize(found)
    want = jax.jit(model)(floats, x)
    run = jax.jit(jopt.execute(model))
    np.testing.assert_allclose(run(found, x), want, atol=1e-4)
    fast = jax.jit(jopt.execute(model, activations=INT8))
    assert energy(fast(found, x) - want) / energy(want) < 5e-3
    text = fast.lower(found, x).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert sum("xi8>" in line for line in products) == 5
    assert len(products) == 15  # codes and two thin ones at each of five sites

    def gradient(f, params):
        return np.asarray(jax.jit(jax.grad(lambda x: f(params, x).sum()))(x))

    exact = gradient(model, floats)
    for f, least in ((run, 1e-5), (fast, 0.2)):
        grads = gradient(f, found)
        assert np.linalg.norm(grads - exact) / np.linalg.norm(exact) < least


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


@pytest.mark.parametrize("name", ["run", "model.safetensors"])
def test_save_and_restore(packed, tmp_path, name):
    *_, found, _ = packed
    jopt.save(tmp_path / name, found)
    again = jopt.restore(tmp_path / name)
    assert isinstance(again["q"], jopt.QuantizedPlusLowRank)
    for one, other in zip(*map(jax.tree.leaves, (found, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert again["q"].inputs == found["q"].inputs == (-3,)


def test_other_layouts_of_files_say_that_they_have_no_form_for_it(packed, tmp_path):
    *_, found, _ = packed
    with pytest.raises(TypeError, match="got QuantizedPlusLowRank at 'w'"):
        jopt.write_compressed_tensors(tmp_path, {"w": found["up"]})


def same(found, other):
    assert jax.tree.structure(found) == jax.tree.structure(other)
    for pair in zip(*map(jax.tree.leaves, (found, other)), strict=True):
        np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize(
    ("residual_method", "spec"),
    [
        ("rtn", jopt.QuantSpec(jopt.formats.int4, axis=())),
        pytest.param(
            "rtn", jopt.QuantSpec(jopt.formats.nvfp4), marks=pytest.mark.exhaustive
        ),
        ("gptq", jopt.QuantSpec(jopt.formats.int4, group_size=16)),
    ],
)
def test_rank_zero_is_rounding_itself(residual_method, spec, rng):
    params, x = {"w": normal(rng, 32, 8)}, normal(rng, 48, 32)
    found, report = jopt.svdquant(
        square, params, [x], spec, rank=0, residual_method=residual_method
    )
    method = getattr(jopt, residual_method)
    want, plain = method(square, params, [x], spec)
    same(found, want)
    assert report["w"] == plain["w"]


def test_what_is_left_of_random_weights_has_the_norm_of_the_other_directions(rng):
    """||W - A B||^2 is the sum of the squared singular values beyond the rank."""
    rank, w, x = 16, rng.normal(size=(128, 96)), rng.normal(size=(512, 128))
    params, x = {"w": w.astype(np.float32)}, x.astype(np.float32)
    options = {"rank": rank, "refit": False, "factor_dtype": jnp.float32}
    found, report = jopt.svdquant(square, params, [x], INT4, **options)
    a, b = found["w"].lora_a, found["w"].lora_b
    low = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    tail = np.sum(np.linalg.svd(w, compute_uv=False)[rank:] ** 2)
    np.testing.assert_allclose(np.sum((w - low) ** 2), tail, rtol=1e-4)
    # Half a step per weight at most, with steps of the range of the rest; a whole one
    # at the end that has one code less.
    rest = w - low
    steps = np.abs(rest).max(axis=0) / 8 * (1 + 2**-8)
    lost = np.abs(np.asarray(jopt.dequantize(found["w"])) - w)
    bound = np.where(np.abs(rest) > 7.5 * steps, steps, steps / 2)
    assert np.all(lost <= bound + np.abs(rest).max() * 2**-8 + 1e-5)
    refitted, better = jopt.svdquant(square, params, [x], INT4, rank=rank)
    _, plain = jopt.rtn(square, params, [x], INT4)
    assert better["w"].error < report["w"].error < plain["w"].error
    assert refitted["w"].lora_a.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["rows", "elements", "directions"])
def test_planted_outliers_go_into_the_factors(kind, rng):
    """Of sixteen directions: by ten times and more less is lost than by rounding."""
    w, x = rng.normal(size=(128, 96)), rng.normal(size=(256, 128))
    if kind == "rows":
        w[rng.choice(128, 8, replace=False)] *= 30
    elif kind == "elements":
        w[np.arange(12) * 10, np.arange(12) * 8] += 100
    else:
        w += 5 * rng.normal(size=(128, 12)) @ rng.normal(size=(12, 96))
    params, x = {"w": w.astype(np.float32)}, x.astype(np.float32)
    _, plain = jopt.rtn(square, params, [x], INT4)
    _, report = jopt.svdquant(square, params, [x], INT4, rank=16)
    assert 10 * report["w"].error < plain["w"].error


def test_layers_make_up_for_those_before(rng):
    """The whole loses less than without, and the first layer is as without."""

    def apply(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])

    params = {"a": 2 * normal(rng, 16, 16), "b": normal(rng, 16, 16)}
    x = rng.normal(size=(96, 16)).astype(np.float32)
    run = jax.jit(apply)
    want, lost, first = run(params, x), [], []
    options = {"rank": 2, "fit": jopt.scale_fits.least_error()}
    for correction in (0.0, 1.0):
        found, _ = jopt.svdquant(
            apply,
            params,
            [x],
            jopt.QuantSpec(jopt.formats.int2),
            correction=correction,
            **options,
        )
        lost.append(energy(run(jopt.dequantize(found), x) - want))
        first.append(found["a"])
    assert lost[1] < lost[0]
    same(*first)


def test_convolutions(rng):
    """Kernels HWIO and OIHW with strides and dilation; grouped ones are listed."""

    def conv(x, w, names, **options):
        return jax.lax.conv_general_dilated(
            x, w, padding="SAME", dimension_numbers=names, **options
        )

    def apply(params, x):
        names = ("NHWC", "HWIO", "NHWC")
        h = conv(x, params["k"], names, window_strides=(2, 1), rhs_dilation=(1, 2))
        h = conv(h, params["deep"], names, window_strides=(1, 1), feature_group_count=8)
        h = jnp.transpose(jax.nn.relu(h), (0, 3, 1, 2))
        return conv(h, params["last"], ("NCHW", "OIHW", "NCHW"), window_strides=(1, 1))

    shapes = {"k": (3, 3, 4, 8), "deep": (3, 3, 1, 8), "last": (6, 8, 3, 3)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    x = rng.normal(size=(2, 6, 6, 4)).astype(np.float32)
    found, report = jopt.svdquant(apply, params, [x], INT4, rank=2)
    assert "not whole axes" in report.left_alone["deep"]
    assert found["k"].lora_a.shape == (3, 3, 4, 2)
    assert found["last"].lora_b.shape == (6, 2, 1, 1)
    want = jax.jit(apply)(jopt.dequantize(found), x)
    run = jax.jit(jopt.execute(apply))
    np.testing.assert_allclose(run(found, x), want, atol=1e-4)
    assert run.lower(found, x).as_text().count("stablehlo.convolution") == 5
    y = jax.jit(jopt.execute(apply, activations=INT8))(found, x)
    assert energy(y - want) / energy(want) < 5e-3


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Auto, marks=pytest.mark.exhaustive),
        AxisType.Explicit,
    ],
)
def test_on_meshes(kind, rng):
    """As on one device, to the rounding of sums; factors lie on every device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    is_stacked = kind == AxisType.Auto

    def apply(params, x):
        if not is_stacked:
            return x @ params["w"]
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    w = normal(rng, 16, 2, 16).swapaxes(0, 1) if is_stacked else normal(rng, 16, 16)
    x = rng.normal(size=(32, 16)).astype(np.float32)
    alone, plain = jopt.svdquant(apply, {"w": w}, [x], INT4, rank=3)
    spec = P(None, None, "model") if is_stacked else P(None, "model")
    params = {"w": jax.device_put(w, NamedSharding(mesh, spec))}
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        found, report = jopt.svdquant(apply, params, [x], INT4, rank=3)
        y = jax.jit(jopt.execute(apply))(found, x)
        want = jax.jit(apply)(jopt.dequantize(found), x)
    np.testing.assert_allclose(y, want, atol=1e-5)
    for part in (found["w"].lora_a, found["w"].lora_b):
        assert part.sharding == NamedSharding(mesh, P())
    for row in report:  # a code at the edge may fall to the other side
        np.testing.assert_allclose(row.error, plain[row.name].error, rtol=0.1)
    low, other = (
        np.matmul(*(np.asarray(f, np.float32) for f in (leaf.lora_a, leaf.lora_b)))
        for leaf in (found["w"], alone["w"])
    )
    np.testing.assert_allclose(low, other, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes(dtype, rng):
    with jax.enable_x64(dtype == jnp.float64):
        params = {"w": rng.normal(size=(16, 8)).astype(dtype)}
        x = rng.normal(size=(24, 16)).astype(dtype)
        found, _ = jopt.svdquant(square, params, [x], INT4, rank=2)
        assert found["w"].dtype == found["w"].to_array().dtype == dtype
        y, want = jopt.execute(square)(found, x), square(jopt.dequantize(found), x)
        assert y.dtype == dtype
        # The weights are rounded, or both products and their sum: below 16, by half of
        # 2^-4 each.
        atol = 3 * 2.0**-5 if dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            np.asarray(y, np.float64), np.asarray(want, np.float64), atol=atol
        )


def test_what_cannot_be_split_is_listed(rng):
    def apply(params, x):
        q, k = jnp.split(x @ params["fine"], 2, axis=1)
        h = q @ params["fused"][:, :8] + k @ params["fused"][:, 8:]
        return h @ params["thin"]

    shapes = {"fine": (8, 16), "fused": (8, 16), "thin": (8, 2)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    x = rng.normal(size=(16, 8)).astype(np.float32)
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
def test_errors(options, match, rng):
    params, x = {"w": normal(rng, 8, 8)}, np.eye(8, dtype=np.float32)
    with pytest.raises(ValueError, match=match):
        jopt.svdquant(square, params, [x], INT4, **options)


def test_the_second_factors_are_kept_only_where_they_are_better(rng):
    """In bfloat16 their rounding is not made up for, and an outlier makes it matter."""
    w = normal(rng, 16, 8) + 1000 * np.outer(normal(rng, 16), normal(rng, 8))
    ones, losses = np.ones(16, np.float32), []
    for refit in (True, False):
        split = functools.partial(
            split_and_round,
            spec=INT4,
            rank=1,
            refit=refit,
            factor_dtype=jnp.bfloat16,
            residual_method="rtn",
            damping=0.01,
            fit=jopt.scale_fits.by_range,
        )
        found = jax.jit(split)(w, np.diag(ones), ones, None)
        a, b = (np.asarray(f, np.float64) for f in found.low_rank)
        losses.append(np.linalg.norm(w - np.asarray(found.values) - a @ b))
    assert losses[0] <= losses[1] * (1 + 1e-5)
