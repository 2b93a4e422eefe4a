"""Rotated functions are the functions they were, and lose less to rounding."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jopt

INT4 = jopt.QuantSpec(jopt.formats.int4)
KEY = jax.random.key(7)


def normal(*shape, seed=5, dtype=np.float32):
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return (values / np.sqrt(max(shape[0], 1))).astype(dtype)


def normals(shapes, dtype=np.float32):
    return {
        name: normal(*shape, seed=i, dtype=dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def drawn(params):
    """Numbers in place of what a module would be initialized with."""
    rng = np.random.default_rng(5)

    def draw(leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2:][0])
        return values.astype(np.float32)

    return jax.tree.map(draw, params)


def model(params, x):
    """Two products in a row, attention's kernels of three axes, and a stack."""
    h = (x @ params["first"] + params["bias"][None]) @ params["second"]
    h = jax.nn.relu(h)
    q = jnp.einsum("bi,ihd->bhd", h, params["q"])
    k = jnp.einsum("bi,ihd->bhd", h, params["k"])
    h = jnp.einsum("bhd,hdo->bo", jnp.tanh(q) * k, params["out"])

    def layer(h, w):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(layer, h, params["layers"])[0]


def make_params(dtype=jnp.float32):
    shapes = {
        "first": (16, 24),
        "bias": (24,),
        "second": (24, 16),
        "q": (16, 2, 4),
        "k": (16, 2, 4),
        "out": (2, 4, 16),
        "layers": (2, 16, 16),
    }
    return normals(shapes, dtype)


@pytest.fixture(scope="module")
def rotated():
    params, x = make_params(), normal(6, 16)
    return params, x, *jopt.rotate(model, params, x, key=KEY)


def test_the_function_is_unchanged(rotated):
    params, x, apply, found, _ = rotated
    want = np.asarray(jax.jit(model)(params, x))
    for rows in (6, 3):  # of any number
        np.testing.assert_allclose(apply(found, x[:rows]), want[:rows], atol=2e-6)
    fast = jax.jit(apply)
    np.testing.assert_allclose(fast(found, x), want, atol=2e-6)
    mapped = jax.vmap(apply, in_axes=(None, 0))(found, x[:, None])
    np.testing.assert_allclose(np.asarray(mapped)[:, 0], want, atol=2e-6)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, params, found["params"])
    assert all(jax.tree.leaves(same))


def test_what_is_rotated_how(rotated):
    *_, found, report = rotated
    assert {row.name: row.folded_into for row in report} == {
        "first": None,
        "second": "first",
        "q": None,
        "k": None,
        "out": None,
        "layers": None,
    }
    assert set(found["signs"]) == {"first", "q & k", "out", "layers"}
    assert report["out"].sizes == report["out"].blocks == (2, 4)
    assert not report.left_alone
    assert "by first" in str(report)


def test_weights_are_rotated_as_the_equation_says(rotated):
    params, _, _, found, _ = rotated
    signs = np.asarray(found["signs"]["q & k"], np.float64)
    matrix = scipy.linalg.hadamard(16) / 4
    expected = np.einsum("ij,jhd->ihd", matrix * signs, np.asarray(params["q"]))
    np.testing.assert_allclose(found["params"]["q"], expected, atol=1e-6)
    signs = np.asarray(found["signs"]["out"], np.float64)
    both = np.kron(scipy.linalg.hadamard(2), scipy.linalg.hadamard(4)) / np.sqrt(8)
    flat = (both * signs) @ np.asarray(params["out"]).reshape(8, 16)
    np.testing.assert_allclose(
        found["params"]["out"], flat.reshape(2, 4, 16), atol=1e-6
    )


def test_gradients_are_those_of_the_function_in_other_coordinates(rotated):
    params, x, apply, found, _ = rotated

    def loss(f):
        return lambda p: (f(p, x) ** 2).sum()

    grads = jax.jit(jax.grad(loss(apply)))(found)
    assert not any(np.any(g) for g in jax.tree.leaves(grads["signs"]))
    dense = jax.jit(jax.grad(loss(model)))(params)
    for name in ("q", "layers", "second"):
        norms = [np.linalg.norm(t[name]) for t in (grads["params"], dense)]
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_only_the_signs_of_signs_count(rotated):
    _, x, apply, found, _ = rotated
    shrunk = {
        **found,
        "signs": jax.tree.map(lambda s: np.asarray(s) / 8, found["signs"]),
    }
    np.testing.assert_array_equal(apply(shrunk, x), apply(found, x))


def test_saved_params_say_all(rotated, tmp_path):
    _, x, apply, found, _ = rotated
    jopt.save(tmp_path / "rotated", found)
    again = jopt.execute_rotated(model)(jopt.restore(tmp_path / "rotated"), x)
    np.testing.assert_array_equal(again, apply(found, x))


def test_shared_inputs_are_rotated_once():
    """XLA finds that three products rotate one value by one vector of signs."""

    def shared(params, x):
        return [x @ w for w in params]

    x = normal(4, 64)
    sums = []
    for count in (1, 3):
        params = [normal(64, 8, seed=i) for i in range(count)]
        apply, found, _ = jopt.rotate(shared, params, x, key=KEY)
        assert len(found["signs"]) == 1
        text = jax.jit(apply).lower(found, x).compile().as_text()
        sums.append(text.count(" subtract("))
    assert sums[0] == sums[1] > 0


def outlier_layer():
    """One input out of 64 is fifty times as large as the others."""
    x = np.random.default_rng(5).normal(size=(128, 64)).astype(np.float32)
    x[:, 5] *= 50
    w = normal(64, 32)
    w[9] *= 20
    return {"w": w}, x


def relative(got, want):
    got, want = (np.asarray(y, np.float64) for y in (got, want))
    return np.sum((got - want) ** 2) / np.sum(want**2)


def test_four_bits_lose_far_less():
    def apply(params, x):
        return x @ params["w"]

    params, x = outlier_layer()
    turned, found, _ = jopt.rotate(apply, params, x, key=KEY)
    errors = {}
    for name, f, p in (("plain", apply, params), ("rotated", turned, found)):
        packed = jopt.quantize(p, INT4, sites=jopt.sites(f, p, x))
        y = jopt.execute(f, activations=INT4)(packed, x)
        errors[name] = relative(y, apply(params, x))
        qat = jopt.fake_quantize(f, INT4, activations=INT4)(p, x)
        np.testing.assert_allclose(y, qat, rtol=1e-4, atol=1e-3)
    assert 5 * errors["rotated"] < errors["plain"], errors


def test_everything_else_takes_the_rotated_function():
    def stack(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    params, x = {"w": normal(2, 12, 12)}, normal(32, 12)
    apply, found, _ = jopt.rotate(stack, params, x, key=KEY)
    packed, report = jopt.gptq(apply, found, [x], INT4, progress=False)
    assert report["params/w[1]"].error < 0.05
    assert isinstance(packed["params"]["w"], jopt.QuantizedArray)
    assert not any(isinstance(s, jopt.QuantizedArray) for s in packed["signs"].values())
    y = jopt.execute(apply)(packed, x)
    np.testing.assert_allclose(y, apply(jopt.dequantize(packed), x), atol=1e-5)
    int8 = jopt.QuantSpec(jopt.formats.int8)
    calibration = jopt.calibrate(apply, found, [x], activations=int8, progress=False)
    packed = jopt.quantize(found, int8, sites=jopt.sites(apply, found, x))
    y = jopt.execute(apply, activations=calibration)(packed, x)
    assert relative(y, stack(params, x)) < 1e-2


def test_whole_numbers_are_the_same_bit_for_bit():
    """Of 4^k numbers H has entries that are powers of two: nothing is rounded."""

    def apply(params, x):
        h = x @ params["a"] + params["b"][None]
        return jax.nn.relu(h @ params["c"]) @ params["d"]

    rng = np.random.default_rng(7)

    def draw(*shape):
        return rng.integers(-3, 4, shape).astype(np.float32)

    shapes = {"a": (16, 64), "b": (64,), "c": (64, 16), "d": (16, 4)}
    params = {name: draw(*shape) for name, shape in shapes.items()}
    x = draw(5, 16)
    turned, found, report = jopt.rotate(apply, params, x, key=KEY)
    assert report["c"].folded_into == "a"
    assert not np.array_equal(found["params"]["c"], params["c"])
    np.testing.assert_array_equal(turned(found, x), apply(params, x))


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(8, marks=pytest.mark.exhaustive),
        24,
        512,
        pytest.param(768, marks=pytest.mark.exhaustive),
    ],
)
def test_rounding_is_within_its_bound(size):
    """Norms of a transform err by a half ulp per stage, sums of products by one each.

    |y' - y| <= 2 (log2 n + 12 + n) u |x| |w| with u = 2^-24, Paley's factor counting
    for at most 12 of its sums.
    """
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    params, x = {"w": normal(size, 6)}, normal(9, size)
    turned, found, _ = jopt.rotate(apply, params, x, key=KEY)
    exact = np.asarray(x, np.float64) @ np.asarray(params["w"], np.float64)
    norms = np.outer(
        np.linalg.norm(x, axis=1), np.linalg.norm(params["w"], axis=0)
    ).astype(np.float64)
    share = np.abs(np.asarray(turned(found, x), np.float64) - exact) / norms
    assert share.max() <= 2 * (np.log2(size) + 12 + size) * 2.0**-24
    with jax.enable_x64(True):
        params, x = {"w": params["w"].astype(np.float64)}, x.astype(np.float64)
        turned, found, _ = jopt.rotate(apply, params, x, key=KEY)
        assert found["params"]["w"].dtype == jnp.float64
        share = np.abs(np.asarray(turned(found, x)) - exact) / norms
    assert share.max() <= 2 * (np.log2(size) + 12 + size) * 2.0**-53


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(h))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12)(x)
        x = nn.Dense(16)(x)
        x, _ = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}
        )(name="stack")(x, jnp.zeros(2))
        return nn.Dense(4)(x)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(8, 16, rngs=rngs)
        self.b = nnx.Linear(16, 12, rngs=rngs)
        self.c = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        return self.c(nnx.relu(self.b(self.a(x))))


def make_linen(x):
    module = Stack()
    names = {"Dense_1": "Dense_0", "Dense_2": None, "stack/Dense_0": None}
    names = {f"params/{n}/kernel": o and f"params/{o}/kernel" for n, o in names.items()}
    params = jax.eval_shape(module.init, KEY, x)
    return module.apply, drawn(params), names


def make_nnx(x):
    apply, params, *_ = jopt.functional(Layers(nnx.Rngs(0)))
    return apply, params, {"b/kernel": "a/kernel", "c/kernel": None}


def make_equinox(x):
    equinox = pytest.importorskip("equinox")
    shapes = equinox.filter_eval_shape(equinox.nn.MLP, 8, 4, 16, 2, key=KEY)
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    params, rest = equinox.partition(shapes, is_shape)
    params = drawn(params)

    def apply(params, x):
        return jax.vmap(equinox.combine(params, rest))(x)

    return apply, params, {"layers/1/weight": None}


@pytest.mark.parametrize("make", [make_linen, make_nnx, make_equinox])
def test_modules_of_every_library(make):
    """Kernels either way round, loops, remat; folded where nothing is between."""
    x = normal(3, 8)
    apply, params, folded = make(x)
    turned, found, report = jopt.rotate(apply, params, x, key=KEY)
    np.testing.assert_allclose(turned(found, x), apply(params, x), atol=5e-6)
    assert {name: report[name].folded_into for name in folded} == folded
    same = jax.tree.map(lambda a, b: a.shape == b.shape, params, found["params"])
    assert all(jax.tree.leaves(same))


def test_half_precision():
    params, x = make_params(jnp.bfloat16), normal(6, 16, dtype=jnp.bfloat16)
    apply, found, _ = jopt.rotate(model, params, x, key=KEY)
    assert found["params"]["q"].dtype == jnp.bfloat16
    y = apply(found, x)
    assert y.dtype == jnp.bfloat16
    assert relative(y, jax.jit(model)(params, x)) < 1e-3


def test_what_cannot_be_rotated_is_listed():
    mask = jnp.tril(jnp.ones((8, 8)))

    def apply(params, i):
        x = params["table"][i] @ params["masked_in"]
        x = x @ (params["masked"] * mask) + x @ params["fine"]
        y = x @ params["odd"]
        y = jax.nn.relu(y) @ params["three"]
        y = jax.nn.relu(y) @ params["read"] @ params["fifth"]
        return y @ params["table"].T + jnp.sum(params["read"])

    shapes = {
        "table": (5, 8),
        "masked_in": (8, 8),
        "masked": (8, 8),
        "fine": (8, 8),
        "odd": (8, 3),
        "three": (3, 8),
        "read": (8, 5),
        "fifth": (5, 8),
    }
    params = normals(shapes)
    i = jnp.array([0, 3])
    turned, found, report = jopt.rotate(
        apply, params, i, key=KEY, select=lambda path, leaf: True
    )
    np.testing.assert_allclose(turned(found, i), apply(params, i), atol=2e-5)
    assert "which would see it rotated" in report.left_alone["table"]
    assert "which would see it rotated" in report.left_alone["read"]
    assert "not made of its numbers alone" in report.left_alone["masked"]
    assert "shares its rotation" in report.left_alone["fine"]
    assert "an odd number" in report.left_alone["three"]
    assert {row.path for row in report} == {"masked_in", "odd"}


@pytest.mark.parametrize("kind", ["twice", "result", "nonlinear", "part", "bias"])
def test_folded_only_where_nothing_else_sees_it(kind):
    def apply(params, x):
        h = x @ params["a"] + params["b"][None]
        out = 0
        if kind == "twice":
            out = jnp.sum(h)
        if kind == "nonlinear":
            h = jnp.abs(h)
        if kind == "part":
            return jnp.einsum("bhd,do->bho", h.reshape(-1, 2, 8), params["c"])
        if kind == "bias":
            out = jnp.sum(params["b"])
        y = h @ params["c"] + out
        return (y, h) if kind == "result" else y

    inner = 8 if kind == "part" else 16
    params = {"a": normal(4, 16), "b": normal(16), "c": normal(inner, 4)}
    x = normal(3, 4)
    turned, found, report = jopt.rotate(apply, params, x, key=KEY)
    assert report["c"].folded_into is None
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-6),
        turned(found, x),
        apply(params, x),
    )


def test_folded_through_reshapes_and_axes_of_any_number():
    def apply(params, x):
        h = jnp.einsum("bti,ihd->bthd", x, params["a"]) + params["b"][None, None]
        h = h.reshape(*h.shape[:2], -1)
        return h @ params["c"], jax.nn.relu(h @ params["d"])

    params = {
        "a": normal(4, 3, 8),
        "b": normal(3, 8),
        "c": normal(24, 4),
        "d": normal(24, 2),
    }
    x = normal(2, 3, 4)
    turned, found, report = jopt.rotate(apply, params, x, key=KEY)
    assert report["c"].folded_into == report["d"].folded_into == "a"
    assert set(found["signs"]) == {"a"}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-6),
        turned(found, x),
        apply(params, x),
    )


@pytest.mark.parametrize(
    ("kind", "is_set"),
    [(AxisType.Auto, False), (AxisType.Explicit, False), (AxisType.Explicit, True)],
)
def test_on_meshes(kind, is_set):
    """Results lie where leaves lay, split along inputs, outputs or layers, or not."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))

    def apply(params, x):
        h = (x @ params["a"] + params["bias"][None]) @ params["b"]
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
        return h @ params["c"]

    shapes = {"a": (16, 32), "bias": (32,), "b": (32, 8), "stack": (2, 8, 8)}
    params = normals(shapes)
    params["c"] = normal(8, 4)
    x = normal(8, 16)
    want = apply(params, x)
    alone = jopt.rotate(apply, params, x, key=KEY)[1]
    specs = {"a": P(None, "model"), "bias": P("model")}
    if kind == AxisType.Auto:  # explicit meshes have no contraction of split axes
        specs |= {"b": P("model"), "c": P("model"), "stack": P("model")}

    def place(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    params = {name: place(w, specs.get(name, P())) for name, w in params.items()}
    x = place(x, P("data"))
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        turned, found, report = jopt.rotate(apply, params, x, key=KEY)
    assert report["b"].folded_into == "a"
    for name, w in params.items():
        now = found["params"][name]
        assert now.sharding == w.sharding
        np.testing.assert_allclose(now, alone["params"][name], atol=1e-6)
    for name, signs in found["signs"].items():
        assert signs.sharding == NamedSharding(mesh, P())
        np.testing.assert_array_equal(signs, alone["signs"][name])
    with jax.set_mesh(mesh):
        y = jax.jit(turned)(found, x)
    np.testing.assert_allclose(np.asarray(y), want, atol=1e-5)


def test_inside_shard_map(auto_mesh):
    """Where devices see parts of a weight it is listed; where they see all, rotated."""

    def apply(params, x):
        def parts(x, w):
            return jax.lax.psum(x @ w, "data")

        def rows(h, w):
            return jnp.tanh(h @ w)

        run = functools.partial(jax.shard_map, mesh=auto_mesh)
        h = run(parts, in_specs=(P(None, "data"), P("data")), out_specs=P())(
            x, params["parts"]
        )
        return run(rows, in_specs=(P("data"), P()), out_specs=P("data"))(
            h, params["whole"]
        )

    params, x = {"parts": normal(16, 8), "whole": normal(8, 4)}, normal(8, 16)
    turned, found, report = jopt.rotate(apply, params, x, key=KEY)
    assert {row.path for row in report} == {"whole"}
    assert "only as the program runs" in report.left_alone["parts"]
    np.testing.assert_allclose(turned(found, x), apply(params, x), atol=1e-6)


def test_errors(rotated):
    params, x, apply, found, _ = rotated
    with pytest.raises(ValueError, match="got no leaf that it can"):
        jopt.rotate(lambda p, x: x + p["b"], {"b": jnp.ones(4)}, jnp.ones(4), key=KEY)
    with pytest.raises(TypeError, match=r"rotate must be called outside of jax.jit"):
        jax.jit(lambda p: jopt.rotate(model, p, x, key=KEY)[1])(params)
    packed = jopt.quantize(params, INT4)
    with pytest.raises(ValueError, match="start from the floats"):
        jopt.rotate(model, packed, x, key=KEY)
    with pytest.raises(TypeError, match=r"returned, got a dict; pass rotated params"):
        apply(params, x)
    strange = {**found, "signs": {"nowhere": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"got signs for \['nowhere'\]"):
        apply(strange, x)
